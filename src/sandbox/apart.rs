//! Compiles what is new in a process of its own, under limits of memory and
//! time: the compiler reads a stranger's file, and a few kilobytes can keep it
//! busy for hours or take all memory. What it compiled is handed over through
//! the cache.

use std::{
    io::{self, Read as _, Write as _},
    os::unix::process::CommandExt as _,
    path::PathBuf,
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::Instant,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    process::{Pid, PidfdFlags, Resource, Rlimit, pidfd_open, setrlimit},
};
use wasmtime::component;

use super::{
    compile::{Cpu, open_cache},
    component::LoadError,
    engine::{CompileApart, CompilerConfig, Sandbox, SandboxConfig},
};

/// Longest complaint of a compiling process, in bytes.
const MAX_COMPLAINT: u64 = 2000;

/// What a compiling process is told on its command line; the component comes
/// on its standard input.
#[derive(Debug, Clone, clap::Args)]
pub struct Order {
    /// Folder of the compiled code
    #[arg(long)]
    cache_dir: PathBuf,
    /// Call stack of a component, in bytes
    #[arg(long)]
    stack: usize,
    /// Linear memory of the largest instance, in bytes
    #[arg(long)]
    largest_instance: usize,
    /// The server has no pool of instances
    #[arg(long)]
    on_demand: bool,
    /// Compile quickly, to code that runs slowly
    #[arg(long)]
    quick: bool,
    /// Memory that may be taken, in bytes
    #[arg(long)]
    memory: u64,
    /// Processor time that may be taken, in seconds
    #[arg(long)]
    seconds: u64,
}

impl Order {
    /// What the compiling process does.
    ///
    /// # Errors
    /// What the author of the component should read.
    pub fn carry_out(&self) -> Result<(), String> {
        let limit = |resource, value| {
            setrlimit(
                resource,
                Rlimit {
                    current: Some(value),
                    maximum: Some(value),
                },
            )
        };
        limit(Resource::Core, 0).map_err(|e| e.to_string())?;
        limit(Resource::Cpu, self.seconds).map_err(|e| e.to_string())?;
        limit(Resource::Data, self.memory).map_err(|e| e.to_string())?;
        let mut bytes = Vec::new();
        io::stdin()
            .read_to_end(&mut bytes)
            .map_err(|e| e.to_string())?;
        let compiler = CompilerConfig {
            cache_dir: Some(self.cache_dir.clone()),
            apart: None,
            quick: self.quick,
        };
        let config = SandboxConfig {
            largest_instance: self.largest_instance,
            stack: self.stack,
            ..SandboxConfig::for_compiling(Some(compiler))
        };
        let cache = open_cache(&config.compiler).map(|(cache, _)| cache);
        let engine = Sandbox::compiling_engine(&config, self.on_demand, Cpu::This, cache)
            .map_err(|e| format!("{e:#}"))?;
        component::Component::new(&engine, &bytes)
            .map(drop)
            .map_err(|e| format!("{e:#}"))
    }
}

impl CompileApart {
    pub(super) fn compile(
        &self,
        sandbox: &Sandbox,
        cache_dir: PathBuf,
        bytes: &[u8],
    ) -> Result<(), LoadError> {
        let failed =
            |error: io::Error| LoadError::Compile(format!("no process to compile it in: {error}"));
        let deadline = Instant::now() + self.timeout;
        let mut command = Command::new(&self.program);
        command
            .arg("compile-worker")
            .arg("--cache-dir")
            .arg(cache_dir);
        command.args(["--stack", &sandbox.config.stack.to_string()]);
        command.args([
            "--largest-instance",
            &sandbox.config.largest_instance.to_string(),
        ]);
        command.args(["--memory", &self.memory.to_string()]);
        command.args(["--seconds", &(self.timeout.as_secs() + 1).to_string()]);
        command.args((!sandbox.pooled).then_some("--on-demand"));
        command.args(sandbox.config.compiler.quick.then_some("--quick"));
        // Ctrl-C is for the server, which ends in order.
        command.process_group(0);
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let child = Ended(command.spawn().map_err(failed)?);
        let (status, complaint) = child.feed_and_wait(bytes, deadline).map_err(failed)?;
        match status {
            None => Err(LoadError::Compile(format!(
                "compiling took longer than sandbox.compile_timeout, {} ms",
                self.timeout.as_millis()
            ))),
            Some(status) if status.success() => Ok(()),
            Some(status) if status.code() == Some(1) => Err(LoadError::Compile(complaint)),
            Some(status) => Err(LoadError::Compile(format!(
                "the compiler ended with {status}; it may need more than sandbox.compile_memory, {} bytes",
                self.memory
            ))),
        }
    }
}

/// A process that does not outlive the wait for it.
struct Ended(Child);

impl Ended {
    /// How it ended, if it did in time, and what it complained of.
    fn feed_and_wait(
        mut self,
        bytes: &[u8],
        deadline: Instant,
    ) -> io::Result<(Option<ExitStatus>, String)> {
        let mut stdin = self.0.stdin.take();
        let complaints = self.0.stderr.take();
        thread::scope(|scope| {
            // One that ends early does not read to the end: its business.
            scope.spawn(move || stdin.take().map(|mut stdin| stdin.write_all(bytes)));
            let status = if self.ends_before(deadline)? {
                Some(self.0.wait()?)
            } else {
                self.0.kill()?;
                self.0.wait()?;
                None
            };
            let mut complaint = Vec::new();
            if let Some(complaints) = complaints {
                complaints.take(MAX_COMPLAINT).read_to_end(&mut complaint)?;
            }
            Ok((
                status,
                String::from_utf8_lossy(&complaint).trim().to_owned(),
            ))
        })
    }
}

impl Ended {
    /// Waits for the end of the process; says whether it came in time.
    fn ends_before(&self, deadline: Instant) -> io::Result<bool> {
        let end = pidfd_open(Pid::from_child(&self.0), PidfdFlags::empty())?;
        loop {
            let remaining = deadline.saturating_duration_since(Instant::now());
            let timeout = Timespec::try_from(remaining).map_err(io::Error::other)?;
            match poll(&mut [PollFd::new(&end, PollFlags::IN)], Some(&timeout)) {
                Ok(0) if remaining.is_zero() => return Ok(false),
                Ok(0) | Err(Errno::INTR) => {}
                Ok(_) => return Ok(true),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
