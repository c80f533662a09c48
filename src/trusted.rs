//! Files and folders that only this user and root can have changed.
//!
//! A path is walked from the root, one name at a time, over open descriptors:
//! what is checked is what is opened, and the folder of each symbolic link
//! counts as much as the folder that it leads to.

use std::{
    collections::VecDeque,
    ffi::{OsStr, OsString},
    fs::File,
    io,
    os::unix::ffi::OsStringExt as _,
    path::{Component, Path, PathBuf},
};

use rustix::{
    fd::OwnedFd,
    fs::{CWD, FileType, Mode, OFlags, Stat, fstat, openat, readlinkat},
    io::Errno,
    process::{getegid, geteuid},
};

/// Symbolic links that are followed on the way to one file, as the kernel does.
const MAX_LINKS: usize = 40;

const OTHERS_WRITE: u32 = 0o002;
const GROUP_WRITES: u32 = 0o020;
const STICKY: u32 = 0o1000;

/// What a file is read for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Its content is run as machine code. No group may write anything on its
    /// path, and in a folder such as `/tmp`, where everybody may add names but
    /// remove only their own, there may be no more than a folder on the way.
    Code,
    /// Keys, tokens, secrets. The private group of a user, which has the
    /// number of the user, may write, and files may be in such folders.
    Data,
}

/// Others than this user and root can change this file or folder.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("others than this user and root can change {}: chown and chmod go-w it, or name another path", .0.display())]
pub struct OpenToOthers(pub PathBuf);

impl OpenToOthers {
    /// The reason of an error, if it is this one.
    #[must_use]
    pub fn of(error: &io::Error) -> Option<&Self> {
        error.get_ref()?.downcast_ref()
    }
}

impl From<OpenToOthers> for io::Error {
    fn from(open: OpenToOthers) -> Self {
        Self::new(io::ErrorKind::PermissionDenied, open)
    }
}

/// Opens a file to read it.
///
/// # Errors
/// [`OpenToOthers`], if others can change it or its path; it is no regular
/// file, or can't be opened.
pub fn open(path: &Path, purpose: Purpose) -> io::Result<File> {
    let Walked { dir, name, .. } = walk(path, purpose)?;
    // What was looked at can't be read from; this is looked at once more.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = openat(&dir, &name, flags, Mode::empty())?;
    let stat = fstat(&file)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(io::Error::other("it is no regular file"));
    }
    if !is_own(&stat) || is_open(&stat, purpose) {
        return Err(OpenToOthers(path.to_owned()).into());
    }
    Ok(file.into())
}

/// Checks a file or folder whose content is data, and its path. Once this has
/// returned, nobody but this user and root can put another one there.
///
/// # Errors
/// [`OpenToOthers`], or it can't be looked at.
pub fn check(path: &Path) -> io::Result<()> {
    check_for(path, Purpose::Data)
}

/// As [`check`], for what is read for this purpose.
///
/// # Errors
/// The same.
pub fn check_for(path: &Path, purpose: Purpose) -> io::Result<()> {
    walk(path, purpose).map(drop)
}

/// The end of a path.
struct Walked {
    /// The folder that holds it.
    dir: OwnedFd,
    /// Its name there, no symbolic link.
    name: OsString,
}

fn walk(path: &Path, purpose: Purpose) -> io::Result<Walked> {
    let look = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let root = || -> io::Result<(OwnedFd, Stat)> {
        let root = openat(CWD, "/", look, Mode::empty())?;
        let stat = fstat(&root)?;
        Ok((root, stat))
    };
    let mut names: VecDeque<_> = names(&std::path::absolute(path)?);
    let (mut dir, mut dir_stat) = root()?;
    let mut at = PathBuf::from("/");
    let mut links = 0;
    if !is_own(&dir_stat) {
        return Err(OpenToOthers(at).into());
    }
    loop {
        let name = names.pop_front().unwrap_or_else(|| ".".into());
        let entry = openat(&dir, &name, look, Mode::empty())?;
        let stat = fstat(&entry)?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        let sticky = Mode::from_raw_mode(dir_stat.st_mode).bits() & STICKY != 0;
        let apart = sticky && (kind == FileType::Directory || purpose == Purpose::Data);
        if is_open(&dir_stat, purpose) && !apart {
            return Err(OpenToOthers(at).into());
        }
        let inside = if name == ".." {
            at.parent().unwrap_or(&at).to_owned()
        } else {
            at.join(&name)
        };
        if !is_own(&stat) {
            return Err(OpenToOthers(inside).into());
        }
        match kind {
            FileType::Symlink => {
                links += 1;
                if links > MAX_LINKS {
                    return Err(Errno::LOOP.into());
                }
                let target = readlinkat(&dir, &name, Vec::new())?.into_bytes();
                let target = PathBuf::from(OsString::from_vec(target));
                if target.is_absolute() {
                    (dir, dir_stat) = root()?;
                    at = PathBuf::from("/");
                }
                let mut further = self::names(&target);
                further.append(&mut names);
                names = further;
            }
            FileType::Directory if !names.is_empty() => (dir, dir_stat, at) = (entry, stat, inside),
            _ if !names.is_empty() => return Err(Errno::NOTDIR.into()),
            _ if is_open(&stat, purpose) => return Err(OpenToOthers(inside).into()),
            _ => return Ok(Walked { dir, name }),
        }
    }
}

fn names(path: &Path) -> VecDeque<OsString> {
    let name = |component| match component {
        Component::Normal(name) => Some(name),
        Component::ParentDir => Some(OsStr::new("..")),
        _ => None,
    };
    path.components()
        .filter_map(name)
        .map(OsStr::to_owned)
        .collect()
}

/// Whether it belongs to this user or to root.
fn is_own(stat: &Stat) -> bool {
    [0, geteuid().as_raw()].contains(&stat.st_uid)
}

/// Whether its mode lets others write it.
fn is_open(stat: &Stat, purpose: Purpose) -> bool {
    let (user, group) = (geteuid().as_raw(), getegid().as_raw());
    let private_group = purpose == Purpose::Data && user == group && stat.st_gid == group;
    stat.st_mode & OTHERS_WRITE != 0 || stat.st_mode & GROUP_WRITES != 0 && !private_group
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::fs::{PermissionsExt as _, chown, lchown, symlink},
    };

    use super::*;

    fn mode(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    /// The path that is open to others.
    fn refused(path: &Path, purpose: Purpose) -> Option<PathBuf> {
        let error = open(path, purpose).err()?;
        assert_eq!(
            check_for(path, purpose).unwrap_err().to_string(),
            error.to_string()
        );
        let open = OpenToOthers::of(&error);
        Some(open.unwrap_or_else(|| panic!("{error}")).0.clone())
    }

    #[test]
    fn who_else_can_write() {
        let parent = tempfile::tempdir().unwrap();
        let parent = fs::canonicalize(parent.path()).unwrap();
        let dir = parent.join("services");
        fs::create_dir_all(&dir).unwrap();
        let file = dir.join("x.cwasm");
        fs::write(&file, "x").unwrap();
        mode(&dir, 0o755);
        mode(&file, 0o644);
        assert_eq!(
            refused(&file, Purpose::Code),
            None,
            "though /tmp is everybody's"
        );
        for (path, bad, good) in [
            (&file, 0o664, 0o644),
            (&file, 0o646, 0o644),
            (&dir, 0o757, 0o755),
            (&dir, 0o1777, 0o755),
        ] {
            mode(path, bad);
            assert_eq!(
                refused(&file, Purpose::Code).as_ref(),
                Some(path),
                "{bad:o}"
            );
            let fine = bad == 0o1777 || bad == 0o664 && geteuid().as_raw() == getegid().as_raw();
            assert_eq!(refused(&file, Purpose::Data).is_none(), fine, "{bad:o}");
            mode(path, good);
        }
        // Only root can give a file away.
        if chown(&file, Some(12345), None).is_ok() {
            assert_eq!(refused(&file, Purpose::Code), Some(file.clone()));
            assert_eq!(refused(&file, Purpose::Data), Some(file.clone()));
        }
    }

    #[test]
    fn a_link_is_as_safe_as_the_folder_that_holds_it() {
        let parent = tempfile::tempdir().unwrap();
        let parent = fs::canonicalize(parent.path()).unwrap();
        let (own, others) = (parent.join("own"), parent.join("others"));
        fs::create_dir(&own).unwrap();
        fs::create_dir(&others).unwrap();
        mode(&own, 0o755);
        mode(&others, 0o755);
        let file = own.join("x");
        fs::write(&file, "machine code").unwrap();
        mode(&file, 0o644);
        let (link, relative, folder) = (
            others.join("link"),
            others.join("relative"),
            others.join("dir"),
        );
        symlink(&file, &link).unwrap();
        symlink("../own/../own/x", &relative).unwrap();
        symlink(&own, &folder).unwrap();
        let ways = [link.clone(), relative, folder.join("x")];
        for way in &ways {
            let text = io::read_to_string(open(way, Purpose::Code).unwrap()).unwrap();
            assert_eq!(text, "machine code", "{}", way.display());
        }
        mode(&others, 0o777);
        for way in &ways {
            assert_eq!(refused(way, Purpose::Code).as_ref(), Some(&others));
            assert_eq!(refused(way, Purpose::Data).as_ref(), Some(&others));
        }
        mode(&others, 0o1777);
        assert_eq!(refused(&link, Purpose::Code).as_ref(), Some(&others));
        assert_eq!(refused(&link, Purpose::Data), None);
        if lchown(&link, Some(12345), None).is_ok() {
            assert_eq!(refused(&link, Purpose::Data).as_ref(), Some(&link));
        }
    }

    #[test]
    fn what_is_no_file_is_refused_without_waiting_for_it() {
        let dir = tempfile::tempdir().unwrap();
        let looped = dir.path().join("loop");
        symlink(&looped, &looped).unwrap();
        assert!(check(&looped).is_err());
        assert!(check(dir.path()).is_ok() && check(Path::new("/")).is_ok());
        assert!(open(dir.path(), Purpose::Data).is_err());
        let missing = open(&dir.path().join("missing"), Purpose::Data).unwrap_err();
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
        let fifo = dir.path().join("fifo");
        rustix::fs::mknodat(CWD, &fifo, FileType::Fifo, Mode::RUSR, 0).unwrap();
        assert!(open(&fifo, Purpose::Data).is_err());
        fs::write(dir.path().join("file"), "").unwrap();
        assert!(check(&dir.path().join("file/below")).is_err());
    }
}
