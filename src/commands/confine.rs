//! Keeps the process from writing anywhere but into its own folders, and from
//! starting other programs than itself, where the kernel can (Landlock): what
//! breaks out of a sandbox finds little to change.

use std::{
    fs,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
};

use landlock::{
    ABI, AccessFs, Ruleset, RulesetAttr as _, RulesetCreatedAttr as _, RulesetError, RulesetStatus,
    path_beneath_rules,
};

use crate::{config::Config, sandbox::cache_dir};

/// The newest one that is used: with it, files can't be cut off either.
const WANTED: ABI = ABI::V3;

/// From where a program and its libraries are run, besides the program's own
/// folder.
const LIBRARIES: [&str; 5] = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/nix/store"];

/// Holds for this thread and those that it starts, so it comes before others.
pub(super) fn confine(config: &Config) {
    if !config.landlock {
        return;
    }
    let own = own_folders(config);
    for dir in &own {
        // Only a folder that is there can be allowed. One that can't be made
        // is complained about by who needs it.
        let _ = fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir);
    }
    match restrict(&own) {
        Ok(RulesetStatus::NotEnforced) => {
            tracing::debug!("this kernel has no Landlock, so it is not held to its own folders");
        }
        Ok(_) => {
            let own: Vec<_> = own.iter().map(|dir| dir.display().to_string()).collect();
            tracing::debug!("writes to {} and nowhere else", own.join(", "));
        }
        Err(error) => tracing::warn!("it is not held to its own folders: {error}"),
    }
}

/// Where it writes.
fn own_folders(config: &Config) -> Vec<PathBuf> {
    let parent = |file: &Path| {
        file.parent()
            .map(Path::to_path_buf)
            .filter(|dir| !dir.as_os_str().is_empty())
    };
    let mut own = vec![config.state_dir()];
    own.extend(parent(&config.store_file()));
    own.extend(parent(&config.admin.socket));
    own.extend(cache_dir(&config.sandbox.cache_dir));
    own.sort();
    own.dedup();
    own
}

fn restrict(own: &[PathBuf]) -> Result<RulesetStatus, RulesetError> {
    let program = std::env::current_exe().ok();
    let run = LIBRARIES
        .iter()
        .map(|dir| Path::new(*dir))
        .chain(program.as_deref());
    let status = Ruleset::default()
        .handle_access(AccessFs::from_write(WANTED) | AccessFs::Execute)?
        .create()?
        .add_rules(path_beneath_rules(run, AccessFs::Execute))?
        .add_rules(path_beneath_rules(own, AccessFs::from_write(WANTED)))?
        // What a process that compiles says on its standard output goes there.
        .add_rules(path_beneath_rules(["/dev/null"], AccessFs::WriteFile))?
        .restrict_self()?;
    Ok(status.ruleset)
}

#[cfg(test)]
mod tests {
    use std::{io, process::Command, thread};

    use super::*;

    #[test]
    fn a_thread_that_is_confined_writes_and_runs_nothing_else() {
        let (own, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::write(other.path().join("there"), "x").unwrap();
        let (own, other) = (own.path().to_owned(), other.path().to_owned());
        // It holds for this thread alone.
        let confined = thread::spawn(move || {
            if restrict(std::slice::from_ref(&own)).unwrap() == RulesetStatus::NotEnforced {
                println!("this kernel has no Landlock, so it was not tried");
                return;
            }
            let denied = |result: io::Result<()>| {
                result.unwrap_err().kind() == io::ErrorKind::PermissionDenied
            };
            fs::write(own.join("new"), "x").unwrap();
            fs::rename(own.join("new"), own.join("newer")).unwrap();
            assert!(denied(fs::write(other.join("new"), "x")));
            assert!(denied(fs::remove_file(other.join("there"))));
            assert_eq!(fs::read(other.join("there")).unwrap(), b"x");
            assert!(
                denied(Command::new("/bin/true").status().map(drop)),
                "another program"
            );
        });
        confined.join().unwrap();
    }
}
