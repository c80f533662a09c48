//! Compiles in a process of its own, under limits of memory and time: the
//! compiler reads a file that the server can't trust, and a few kilobytes can
//! keep it busy for hours or take all memory.
//!
//! The protocol: `mb-server compile-worker` gets a [`CompileJob`] as its
//! arguments and the component on its standard input, and writes what
//! [`super::precompiled`] describes to its standard output. It exits with 0,
//! with 1 and the reason on its standard error, or is killed by a limit. It
//! opens no file.

use std::{
    io::{self, Read as _, Write as _},
    os::unix::process::CommandExt as _,
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::Instant,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    process::{Pid, PidfdFlags, Resource, Rlimit, pidfd_open, setrlimit},
};

use super::{
    compile::{Cpu, compile, compiling_engine},
    component::LoadError,
    engine::{CompileWorker, Sandbox, SandboxConfig},
};

/// Longest complaint of a worker, in bytes.
const MAX_COMPLAINT: u64 = 2000;

/// What a worker gets on its command line.
#[derive(Debug, Clone, clap::Args)]
pub struct CompileJob {
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
    /// Rewrite it, so that its instances can be reset
    #[arg(long)]
    reset: bool,
    /// Memory that may be taken, in bytes
    #[arg(long)]
    memory: u64,
    /// Processor time that may be taken, in seconds
    #[arg(long)]
    seconds: u64,
}

impl CompileJob {
    /// Does what the worker is started for.
    ///
    /// # Errors
    /// What the author of the component should read.
    pub fn run(&self) -> Result<(), String> {
        let limits = [
            (Resource::Core, 0),
            (Resource::Cpu, self.seconds),
            (Resource::Data, self.memory),
        ];
        for (resource, value) in limits {
            let limit = Rlimit {
                current: Some(value),
                maximum: Some(value),
            };
            setrlimit(resource, limit).map_err(|e| e.to_string())?;
        }
        let mut bytes = Vec::new();
        io::stdin()
            .read_to_end(&mut bytes)
            .map_err(|e| e.to_string())?;
        let config = SandboxConfig {
            largest_instance: self.largest_instance,
            stack: self.stack,
            ..SandboxConfig::for_compiling(self.quick)
        };
        let engine =
            compiling_engine(&config, self.on_demand, Cpu::This).map_err(|e| format!("{e:#}"))?;
        let file = compile(&engine, &bytes, self.reset).map_err(|e| e.to_string())?;
        let mut out = io::stdout().lock();
        let written = out.write_all(&file).and_then(|()| out.flush());
        written.map_err(|e| format!("its code can't be written: {e}"))
    }
}

impl CompileWorker {
    /// Compiles a component, as [`super::compile::compile`] does.
    pub(super) fn compile(
        &self,
        sandbox: &Sandbox,
        bytes: &[u8],
        reset: bool,
    ) -> Result<Vec<u8>, LoadError> {
        let failed =
            |error: io::Error| LoadError::Compile(format!("no process to compile it in: {error}"));
        let deadline = Instant::now() + self.timeout;
        let mut command = Command::new(&self.program);
        command.arg("compile-worker");
        command.args(["--stack", &sandbox.config.stack.to_string()]);
        command.args([
            "--largest-instance",
            &sandbox.config.largest_instance.to_string(),
        ]);
        command.args(["--memory", &self.memory.to_string()]);
        command.args(["--seconds", &(self.timeout.as_secs() + 1).to_string()]);
        command.args((!sandbox.pooled).then_some("--on-demand"));
        command.args(sandbox.config.compiler.quick.then_some("--quick"));
        command.args(reset.then_some("--reset"));
        // Ctrl-C is for the server, which ends in order.
        command.process_group(0);
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let child = Ended(command.spawn().map_err(failed)?);
        let (status, code, complaint) = child
            .feed_and_wait(bytes, self.memory as u64, deadline)
            .map_err(failed)?;
        match status {
            None => Err(LoadError::Compile(format!(
                "compiling took longer than sandbox.compile_timeout, {} ms",
                self.timeout.as_millis()
            ))),
            Some(status) if status.success() => Ok(code),
            Some(status) if status.code() == Some(1) => Err(LoadError::Worker(complaint)),
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
    /// How it ended, if it did in time; what it gave, up to a limit, and what
    /// it complained of.
    fn feed_and_wait(
        mut self,
        bytes: &[u8],
        limit: u64,
        deadline: Instant,
    ) -> io::Result<(Option<ExitStatus>, Vec<u8>, String)> {
        let mut stdin = self.0.stdin.take();
        let (stdout, stderr) = (self.0.stdout.take(), self.0.stderr.take());
        thread::scope(|scope| {
            // One that ends early does not read to the end: its business.
            scope.spawn(move || stdin.take().map(|mut stdin| stdin.write_all(bytes)));
            // Both end with the process.
            let output = scope.spawn(move || read(stdout, limit));
            let complaint = scope.spawn(move || read(stderr, MAX_COMPLAINT));
            let status = if self.ends_before(deadline)? {
                Some(self.0.wait()?)
            } else {
                self.0.kill()?;
                self.0.wait()?;
                None
            };
            let read = |thread: thread::ScopedJoinHandle<'_, io::Result<Vec<u8>>>| {
                thread
                    .join()
                    .unwrap_or_else(|_| Err(io::ErrorKind::Other.into()))
            };
            let (output, complaint) = (read(output)?, read(complaint)?);
            let complaint = String::from_utf8_lossy(&complaint).trim().to_owned();
            Ok((status, output, complaint))
        })
    }
}

/// Reads to the end, or to a limit; then whoever writes more is ended by the
/// pipe that nobody reads any longer.
fn read(from: Option<impl io::Read>, limit: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    if let Some(from) = from {
        from.take(limit).read_to_end(&mut bytes)?;
    }
    Ok(bytes)
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
