//! The file of tokens. It holds a digest of each, never the token: whoever
//! reads the file can't use it. A token is 256 bits of chance, so a plain
//! digest is as good as a slow one.

use std::{
    collections::HashMap,
    fs, io,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant, SystemTime},
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::{
    config::{Right, access::MAX_PRINCIPAL_SIZE},
    files,
    trusted::{self, Purpose},
};

/// Tokens in a file.
const MAX_TOKENS: usize = 10_000;
/// Largest file that is read, in bytes.
const MAX_FILE: u64 = 16 * 1024 * 1024;
/// Bytes of chance in a token.
const SIZE: usize = 32;
/// What a token begins with, so that people and scanners know it for one.
const PREFIX: &str = "mbt_";

/// A line of the file.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// Names it, for the operator.
    pub id: String,
    /// SHA-256 of the token, hexadecimal.
    pub sha256: String,
    /// For whom it stands.
    pub principal: String,
    /// When it was made, RFC 3339.
    pub created: String,
    /// When it ends, RFC 3339; none for never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires: Option<String>,
    /// What may be called with it; none for what the principal may.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rights: Option<Vec<Right>>,
}

#[derive(Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    tokens: Vec<Entry>,
}

/// One token, as the server knows it.
#[derive(Debug)]
pub struct Token {
    /// For whom it stands.
    pub principal: String,
    /// What may be called with it.
    pub rights: Option<Arc<[Right]>>,
    expires: Option<SystemTime>,
    /// The same on the clock that nobody can turn back; none if far away.
    expires_at: Option<Instant>,
    revoked: AtomicBool,
}

/// All tokens by their digest.
#[derive(Debug, Default)]
pub struct Tokens(HashMap<[u8; 32], Arc<Token>>);

/// Why a file of tokens can't be used.
#[derive(Debug, thiserror::Error)]
#[error("tokens {}: {problem}", .file.display())]
pub struct TokensError {
    file: PathBuf,
    problem: String,
}

impl Tokens {
    /// Reads a file; one that is not there holds none.
    ///
    /// # Errors
    /// If it can't be read or understood.
    pub fn load(file: &Path) -> Result<Self, TokensError> {
        let error = |problem: String| TokensError {
            file: file.to_owned(),
            problem,
        };
        let mut tokens = HashMap::new();
        for entry in read(file, trusted::open(file, Purpose::Data))?.tokens {
            let digest = parse_digest(&entry.sha256)
                .ok_or_else(|| error(format!("{}: no SHA-256", entry.id)))?;
            let expires = entry
                .expires
                .as_deref()
                .map(humantime::parse_rfc3339)
                .transpose();
            let expires =
                expires.map_err(|wrong| error(format!("{}: expires: {wrong}", entry.id)))?;
            if !(1..=MAX_PRINCIPAL_SIZE).contains(&entry.principal.len()) {
                return Err(error(format!(
                    "{}: principal: 1 to {MAX_PRINCIPAL_SIZE} bytes",
                    entry.id
                )));
            }
            let left = |at: SystemTime| {
                at.duration_since(SystemTime::now())
                    .unwrap_or(Duration::ZERO)
            };
            let token = Token {
                principal: entry.principal,
                rights: entry.rights.map(Into::into),
                expires,
                expires_at: expires.and_then(|at| Instant::now().checked_add(left(at))),
                revoked: AtomicBool::new(false),
            };
            tokens.insert(digest, Arc::new(token));
        }
        Ok(Self(tokens))
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The token that was shown. The table is asked for a digest of it, so
    /// how long that takes tells nothing that could be guessed on with.
    #[must_use]
    pub fn find(&self, token: &str) -> Option<&Arc<Token>> {
        self.0.get(&<[u8; 32]>::from(Sha256::digest(token)))
    }

    /// Takes the place of older ones: those that have not changed are kept,
    /// because open connections hold them; the others end.
    #[must_use]
    pub(super) fn replacing(mut self, old: &Self) -> Self {
        for (digest, token) in &old.0 {
            match self.0.get_mut(digest) {
                Some(new)
                    if new.principal == token.principal
                        && new.rights == token.rights
                        && new.expires == token.expires =>
                {
                    *new = Arc::clone(token);
                }
                _ => token.revoked.store(true, Relaxed),
            }
        }
        self
    }
}

impl Token {
    pub(super) fn holds(&self, now: SystemTime) -> bool {
        self.expires.is_none_or(|expires| now < expires) && !self.revoked.load(Relaxed)
    }

    pub(super) fn is_invalid(&self, now: Instant) -> bool {
        self.revoked.load(Relaxed) || self.expires_at.is_some_and(|at| now >= at)
    }
}

/// Makes a token and puts it into the file; returns its id and itself.
///
/// # Errors
/// If the file can't be read or written, or holds as many as it may.
pub fn create(
    file: &Path,
    principal: &str,
    expires: Option<SystemTime>,
    rights: Option<Vec<Right>>,
) -> Result<(String, String), TokensError> {
    let error = |problem: String| TokensError {
        file: file.to_owned(),
        problem,
    };
    let sound = (1..=MAX_PRINCIPAL_SIZE).contains(&principal.len())
        && principal.bytes().all(|b| b.is_ascii_graphic());
    if !sound {
        return Err(error(format!(
            "{principal:?} is no name of a principal: 1 to {MAX_PRINCIPAL_SIZE} printable ASCII characters without spaces"
        )));
    }
    let mut chance = [0; SIZE];
    getrandom::fill(&mut chance).map_err(|e| error(e.to_string()))?;
    let token = format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(chance));
    let sha256 = format!("{:x}", Sha256::digest(&token));
    let id = sha256[..12].to_owned();
    let text = |time: SystemTime| humantime::format_rfc3339_seconds(time).to_string();
    change(file, |tokens| {
        if tokens.len() >= MAX_TOKENS {
            return Err(format!("holds {MAX_TOKENS} tokens already; revoke some"));
        }
        tokens.push(Entry {
            id: id.clone(),
            sha256,
            principal: principal.into(),
            created: text(SystemTime::now()),
            expires: expires.map(text),
            rights,
        });
        Ok(())
    })?;
    Ok((id, token))
}

/// Takes a token out of the file.
///
/// # Errors
/// If there is none of that id, or the file can't be read or written.
pub fn revoke(file: &Path, id: &str) -> Result<Entry, TokensError> {
    let mut revoked = None;
    change(file, |tokens| {
        let at = tokens.iter().position(|entry| entry.id == id);
        revoked = at.map(|at| tokens.remove(at));
        revoked
            .as_ref()
            .map(drop)
            .ok_or_else(|| format!("no token {id}; `mb-server token list` names them"))
    })?;
    revoked.ok_or_else(|| TokensError {
        file: file.to_owned(),
        problem: "nothing changed".into(),
    })
}

/// What the file holds.
///
/// # Errors
/// If it can't be read or understood.
pub fn list(file: &Path) -> Result<Vec<Entry>, TokensError> {
    // Root may look at those of the server's user.
    read(file, fs::File::open(file)).map(|file| file.tokens)
}

fn read(file: &Path, opened: io::Result<fs::File>) -> Result<File, TokensError> {
    let error = |problem: String| TokensError {
        file: file.to_owned(),
        problem,
    };
    let text = match opened.and_then(|opened| files::read_text(opened, MAX_FILE)) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(File::default()),
        text => text.map_err(|e| error(e.to_string()))?,
    };
    let parsed: File = serde_json::from_str(&text).map_err(|e| error(e.to_string()))?;
    if parsed.tokens.len() > MAX_TOKENS {
        return Err(error(format!(
            "holds {} tokens, allowed are {MAX_TOKENS}",
            parsed.tokens.len()
        )));
    }
    Ok(parsed)
}

/// Changes the file as a whole: others see it before or after, never halfway.
fn change(
    file: &Path,
    change: impl FnOnce(&mut Vec<Entry>) -> Result<(), String>,
) -> Result<(), TokensError> {
    let error = |problem: String| TokensError {
        file: file.to_owned(),
        problem,
    };
    let io_error = |e: io::Error| error(e.to_string());
    let dir = file
        .parent()
        .filter(|dir| !dir.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    files::private_dir(dir).map_err(io_error)?;
    trusted::check(dir).map_err(io_error)?;
    // Two commands at a time would each forget what the other has done.
    let mut lock = fs::OpenOptions::new();
    lock.create(true).truncate(false).write(true).mode(0o600);
    let lock = lock.open(file.with_extension("lock")).map_err(io_error)?;
    flock(&lock, FlockOperation::LockExclusive).map_err(|e| error(e.to_string()))?;
    let mut content = read(file, trusted::open(file, Purpose::Data))?;
    change(&mut content.tokens).map_err(error)?;
    let mut text = serde_json::to_string_pretty(&content).map_err(|e| error(e.to_string()))?;
    text.push('\n');
    files::replace(file, files::PRIVATE, text.as_bytes()).map_err(io_error)
}

fn parse_digest(text: &str) -> Option<[u8; 32]> {
    let bytes: Option<Vec<u8>> = (0..32)
        .map(|i| u8::from_str_radix(text.get(2 * i..2 * i + 2)?, 16).ok())
        .collect();
    bytes?.try_into().ok().filter(|_| text.len() == 64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn tokens_are_private_found_and_revoked() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("state/tokens.json");
        assert!(Tokens::load(&file).unwrap().is_empty());
        let soon = SystemTime::now() + Duration::from_secs(3600);
        let (id, token) = create(&file, "ann", Some(soon), None).unwrap();
        let (_, other) = create(&file, "bob", Some(SystemTime::UNIX_EPOCH), None).unwrap();
        assert_eq!(
            fs::metadata(&file).unwrap().permissions().mode() & 0o777,
            0o600
        );
        let text = fs::read_to_string(&file).unwrap();
        assert!(!text.contains(&token[PREFIX.len()..]), "only its digest");
        let tokens = Tokens::load(&file).unwrap();
        let now = SystemTime::now();
        let ann = tokens.find(&token).unwrap();
        assert!(
            ann.principal == "ann"
                && ann.holds(now)
                && !ann.holds(soon)
                && !ann.is_invalid(Instant::now())
        );
        assert!(!tokens.find(&other).unwrap().holds(now), "it has expired");
        assert!(tokens.find(&token[..40]).is_none() && tokens.find("").is_none());
        assert_eq!(revoke(&file, &id).unwrap().principal, "ann");
        assert!(
            revoke(&file, &id)
                .unwrap_err()
                .to_string()
                .contains("no token")
        );
        let fewer = Tokens::load(&file).unwrap().replacing(&tokens);
        assert!(ann.is_invalid(Instant::now()) && fewer.find(&token).is_none());
        assert!(
            Arc::ptr_eq(tokens.find(&other).unwrap(), fewer.find(&other).unwrap()),
            "connections hold it"
        );
    }

    #[test]
    fn a_file_that_others_can_write_gives_no_token() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("tokens.json");
        create(&file, "ann", None, None).unwrap();
        let refused = |path: &Path, mode| {
            let was = fs::metadata(path).unwrap().permissions();
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
            let read = Tokens::load(&file).unwrap_err().to_string();
            fs::set_permissions(path, was).unwrap();
            assert!(read.contains("others") && read.contains("chmod"), "{read}");
        };
        refused(&file, 0o606);
        refused(dir.path(), 0o707);
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o707)).unwrap();
        assert!(create(&file, "bob", None, None).is_err(), "nor takes one");
    }

    #[test]
    fn wrong_files_are_refused_with_their_name() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("tokens.json");
        for wrong in ["", "{", "{\"tokens\":[{}]}", "{\"tokens\":[],\"more\":1}"] {
            fs::write(&file, wrong).unwrap();
            assert!(
                Tokens::load(&file)
                    .unwrap_err()
                    .to_string()
                    .contains("tokens.json"),
                "{wrong}"
            );
        }
        assert!(create(&dir.path().join("x"), "a b", None, None).is_err());
    }
}
