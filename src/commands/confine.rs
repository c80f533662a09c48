//! Keeps the process from writing anywhere but into its own folders
//! (Landlock), and from starting programs (seccomp), where the kernel can: what
//! breaks out of a sandbox finds little to change. Processes that compile are
//! started by a helper that was started before (`sandbox::helper`).

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use landlock::{
    ABI, AccessFs, Ruleset, RulesetAttr as _, RulesetCreatedAttr as _, RulesetError, RulesetStatus,
    path_beneath_rules,
};

use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, apply_filter};

use crate::{config::Config, files, sandbox::cache_dir};

/// The newest one that is used: with it, files can't be cut off either.
const WANTED: ABI = ABI::V3;

/// System calls that start a program, or reach into another process that could.
const STARTS_PROGRAMS: [i64; 5] = [
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
];

/// The same for programs with small pointers (x32), which kernels with that
/// interface take under these numbers from any program.
#[cfg(target_arch = "x86_64")]
const STARTS_PROGRAMS_X32: [i64; 5] = {
    const X32: i64 = 0x4000_0000;
    [X32 + 520, X32 + 545, X32 + 521, X32 + 539, X32 + 540]
};
#[cfg(not(target_arch = "x86_64"))]
const STARTS_PROGRAMS_X32: [i64; 0] = [];

/// Holds for this thread and those that it starts, so it comes before others.
pub(super) fn confine(config: &Config) {
    let own = own_folders(config);
    for dir in &own {
        // Only a folder that is there can be allowed. One that can't be made
        // is complained about by who needs it.
        let _ = files::private_dir(dir);
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
    match start_no_program() {
        Ok(()) => tracing::debug!("can start no program"),
        Err(error) => tracing::warn!("it can still start programs: {error}"),
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
    if cfg!(feature = "compiler") {
        own.push(cache_dir());
    }
    // One that is not there is an error of the start, and not created.
    let services = Some(config.services_dir.clone());
    own.extend(services.filter(|dir| config.admin.deploy && dir.is_dir()));
    own.sort();
    own.dedup();
    own
}

fn restrict(own: &[PathBuf]) -> Result<RulesetStatus, RulesetError> {
    let status = Ruleset::default()
        .handle_access(AccessFs::from_write(WANTED))?
        .create()?
        .add_rules(path_beneath_rules(own, AccessFs::from_write(WANTED)))?
        .add_rules(path_beneath_rules(["/dev/null"], AccessFs::WriteFile))?
        .restrict_self()?;
    Ok(status.ruleset)
}

fn start_no_program() -> Result<(), Box<dyn std::error::Error>> {
    let calls = STARTS_PROGRAMS.into_iter().chain(STARTS_PROGRAMS_X32);
    let filter = SeccompFilter::new(
        calls
            .map(|call| (call, Vec::new()))
            .collect::<BTreeMap<_, _>>(),
        SeccompAction::Allow,
        SeccompAction::Errno(libc::EPERM as u32),
        std::env::consts::ARCH.try_into()?,
    )?;
    apply_filter(&BpfProgram::try_from(filter)?)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{fs, io, process::Command, thread};

    use super::*;
    use crate::config::Admin;

    #[test]
    fn the_services_folder_is_its_own_only_to_deploy() {
        let dir = tempfile::tempdir().unwrap();
        let is_own = |deploy| {
            let config = Config {
                services_dir: dir.path().into(),
                admin: Admin {
                    deploy,
                    ..Admin::default()
                },
                ..Config::default()
            };
            own_folders(&config).contains(&config.services_dir)
        };
        assert!(is_own(true) && !is_own(false));
    }

    #[test]
    fn a_thread_that_is_confined_writes_nothing_else() {
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
        });
        confined.join().unwrap();
    }

    #[test]
    fn a_thread_that_is_confined_starts_no_program() {
        let confined = thread::spawn(|| {
            start_no_program().unwrap();
            // `ld.so PROGRAM` runs a program as its argument.
            let loaders = ["/lib64/ld-linux-x86-64.so.2", "/proc/self/exe", "/bin/true"];
            for program in loaders {
                let started = Command::new(program).arg("/bin/true").status();
                let kind = started.unwrap_err().kind();
                assert!(
                    [io::ErrorKind::PermissionDenied, io::ErrorKind::NotFound].contains(&kind),
                    "{program}: {kind}"
                );
            }
            // What it needs is there.
            assert!(
                thread::spawn(|| fs::read("/proc/self/stat").is_ok())
                    .join()
                    .unwrap()
            );
        });
        confined.join().unwrap();
    }
}
