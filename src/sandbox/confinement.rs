//! What the process that compiles an untrusted file may still do: read its
//! input, write its output, take memory, start threads. It opens nothing,
//! reaches nobody, starts no program.

use std::{collections::BTreeMap, fs};

use landlock::{
    ABI, Access as _, AccessFs, AccessNet, Ruleset, RulesetAttr as _, RulesetError, RulesetStatus,
    Scope,
};
use rustix::process::{Signal, set_parent_process_death_signal};
use seccompiler::{
    BpfProgram, SeccompAction,
    SeccompCmpArgLen::{Dword, Qword},
    SeccompCmpOp::{Eq, MaskedEq},
    SeccompCondition, SeccompFilter, SeccompRule, apply_filter,
};

/// The system's measure for whom to end first where memory runs out.
const FIRST_TO_GO: &str = "1000";

/// System calls of an allocator, of threads and of their end.
const ALLOWED: [i64; 25] = [
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_clone3,
    libc::SYS_close,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_madvise,
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
    libc::SYS_sigaltstack,
];

/// Gives up all else, for good. It holds for this thread and those that it
/// starts, so it comes before others.
///
/// # Errors
/// The kernel has neither Landlock nor seccomp.
pub(super) fn confine() -> Result<(), String> {
    // It ends with the helper that waits for it.
    let _ = set_parent_process_death_signal(Some(Signal::KILL));
    // The limits hold also where the system refuses this.
    let _ = fs::write("/proc/self/oom_score_adj", FIRST_TO_GO);
    let landlock = open_nothing();
    let seccomp = call_nothing_else();
    match (landlock, seccomp) {
        (_, Ok(())) => Ok(()),
        (Ok(status), Err(_)) if status != RulesetStatus::NotEnforced => Ok(()),
        (_, Err(error)) => Err(format!(
            "it is not compiled, because this kernel can't keep the compiler from files and the network, neither by \
             Landlock nor by seccomp ({error}): compile it elsewhere with mb-server compile"
        )),
    }
}

/// No file, no connection, no signal to others. What the kernel does not know
/// yet is left out.
fn open_nothing() -> Result<RulesetStatus, RulesetError> {
    let status = Ruleset::default()
        .handle_access(AccessFs::from_all(ABI::V6))?
        .handle_access(AccessNet::from_all(ABI::V6))?
        .scope(Scope::from_all(ABI::V6))?
        .create()?
        .restrict_self()?;
    Ok(status.ruleset)
}

fn call_nothing_else() -> Result<(), Box<dyn std::error::Error>> {
    let arch = std::env::consts::ARCH.try_into()?;
    // A filter can't see the flags of this one. As where the kernel does not
    // know it, libraries take `clone` then.
    let unknown = SeccompFilter::new(
        BTreeMap::from([(libc::SYS_clone3, Vec::new())]),
        SeccompAction::Allow,
        SeccompAction::Errno(libc::ENOSYS as u32),
        arch,
    )?;
    let argument = |value| -> Result<SeccompRule, seccompiler::BackendError> {
        SeccompRule::new(vec![SeccompCondition::new(0, Dword, Eq, value)?])
    };
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        ALLOWED.iter().map(|call| (*call, Vec::new())).collect();
    // Whatever else this process inherited stays out of reach.
    rules.insert(libc::SYS_read, vec![argument(0)?]);
    for write in [libc::SYS_write, libc::SYS_writev] {
        rules.insert(write, vec![argument(1)?, argument(2)?]);
    }
    // Threads and no processes, which could outlive this one.
    let thread = libc::CLONE_THREAD as u64;
    let starts_thread = SeccompCondition::new(0, Qword, MaskedEq(thread), thread)?;
    rules.insert(
        libc::SYS_clone,
        vec![SeccompRule::new(vec![starts_thread])?],
    );
    // How a process ends itself.
    let own = u64::from(std::process::id());
    rules.insert(libc::SYS_tgkill, vec![argument(own)?]);
    let filter = SeccompFilter::new(
        rules,
        SeccompAction::Errno(libc::EPERM as u32),
        SeccompAction::Allow,
        arch,
    )?;
    apply_filter(&BpfProgram::try_from(unknown)?)?;
    apply_filter(&BpfProgram::try_from(filter)?)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        io::Write as _,
        net::{TcpStream, UdpSocket},
        process::Command,
        thread,
    };

    use super::*;

    /// Each wall alone, since some kernels have only one of them.
    #[test]
    fn a_confined_thread_reaches_nothing() {
        let other = tempfile::tempfile().unwrap();
        let confined = thread::spawn(move || {
            call_nothing_else().unwrap();
            assert!(File::open("/proc/self/stat").is_err(), "a file");
            assert!(File::create("/tmp/x").is_err(), "a new file");
            assert!(TcpStream::connect("127.0.0.1:1").is_err_and(|e| is_denied(&e)));
            assert!(UdpSocket::bind("127.0.0.1:0").is_err_and(|e| is_denied(&e)));
            assert!(Command::new("/bin/true").status().is_err(), "a program");
            assert!((&other).write_all(b"x").is_err(), "what it inherited");
            // What a compiler needs.
            let bytes = thread::spawn(|| vec![1_u8; 10 << 20]).join().unwrap();
            assert_eq!(bytes.len(), 10 << 20);
        });
        confined.join().unwrap();
        let confined = thread::spawn(|| {
            if open_nothing().unwrap() == RulesetStatus::NotEnforced {
                println!("this kernel has no Landlock, so it was not tried");
                return;
            }
            assert!(File::open("/proc/self/stat").is_err(), "a file");
            assert!(Command::new("/bin/true").status().is_err(), "a program");
        });
        confined.join().unwrap();
    }

    fn is_denied(error: &std::io::Error) -> bool {
        error.kind() == std::io::ErrorKind::PermissionDenied
    }
}
