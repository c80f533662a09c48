//! Compiles in a process of its own, under limits of memory and time and
//! without any right: the compiler reads a file that the server can't trust,
//! and a few kilobytes can crash it, keep it busy for hours or take all memory.
//!
//! The protocol: `mb-server compile-worker` gets a [`CompileJob`] as JSON
//! in its argument and the component on its standard input, and writes what
//! [`super::precompiled`] describes to its standard output. It exits with 0,
//! with 1 and the reason on its standard error, or is killed by a limit or a
//! defect. It opens no file ([`super::confinement`]); what it makes is kept by
//! the server, under a name that the server chooses.

use std::{
    io::{self, Read as _, Write as _},
    path::Path,
    sync::Arc,
    time::Duration,
};

use rustix::process::{Resource, Rlimit, nice, setrlimit};
use serde::{Deserialize, Serialize};

use super::{
    compile::{Ahead, Cpu, compile, compiling_engine},
    component::LoadError,
    confinement::confine,
    engine::{Sandbox, SandboxConfig},
    helper::{Helper, JobOutcome, JobResult},
};
/// The signal that ends what takes more processor time than it may.
const SIGXCPU: i32 = 24;

/// How much less urgent compiling is than serving: the least that there is.
const NICE: i32 = 19;

/// Stack of a worker's main thread, in bytes.
const MAIN_STACK: u64 = 8 * 1024 * 1024;

/// What a worker gets on its command line.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CompileJob {
    /// Linear memory of the largest instance, in bytes
    largest_instance: usize,
    /// The server has no pool of instances
    on_demand: bool,
    /// For every processor of this architecture, not only for this one
    any_cpu: bool,
    /// Compile quickly, to code that runs slowly
    quick: bool,
    /// Rewrite it, so that its instances can be reset
    reset: bool,
    /// Instances get their first memory copied, not mapped
    copy_memory: bool,
    /// Memory that may be taken, in bytes
    memory: u64,
    /// Processor time that may be taken, in seconds
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
            (Resource::Fsize, 0),
            // Of the main thread. The compiler recurses as deeply as a file is
            // nested.
            (Resource::Stack, MAIN_STACK),
        ];
        for (resource, value) in limits {
            let limit = Rlimit {
                current: Some(value),
                maximum: Some(value),
            };
            // Where there are no limits, the time is still bounded from outside.
            if let Err(error) = setrlimit(resource, limit) {
                eprintln!("compiles without a limit of {resource:?}: {error}");
            }
        }
        // Behind all that serves. What the process starts is so, too.
        if let Err(error) = nice(NICE) {
            eprintln!("compiles as urgently as the server serves: {error}");
        }
        confine()?;
        let mut bytes = Vec::new();
        io::stdin()
            .read_to_end(&mut bytes)
            .map_err(|e| e.to_string())?;
        let mut config = SandboxConfig::for_compiling(self.quick, self.copy_memory);
        config.largest_instance = self.largest_instance;
        let cpu = if self.any_cpu { Cpu::Any } else { Cpu::This };
        let engine =
            compiling_engine(&config, self.on_demand, cpu).map_err(|e| format!("{e:#}"))?;
        let file = compile(&engine, &bytes, self.reset).map_err(|e| e.to_string())?;
        let mut out = io::stdout().lock();
        let written = out.write_all(&file).and_then(|()| out.flush());
        written.map_err(|e| format!("its code can't be written: {e}"))
    }
}

/// How to compile in a process of its own.
#[derive(Debug, Clone)]
pub struct CompileWorker {
    /// Starts the processes, or why it can't.
    helper: Result<Arc<Helper>, String>,
    /// Memory that compiling one component may take, in bytes.
    memory: usize,
    /// How long it may take.
    timeout: Duration,
}

impl CompileWorker {
    /// Starts the helper process, which is this program or another one like it.
    /// Where that fails, each file that is to be compiled fails with the reason;
    /// nothing is compiled in this process.
    #[must_use]
    pub fn start(program: &Path, memory: usize, timeout: Duration) -> Self {
        Self {
            helper: Helper::start(program)
                .map(Arc::new)
                .map_err(|error| error.to_string()),
            memory,
            timeout,
        }
    }

    /// Compiles a component for this sandbox, as [`super::compile::compile`]
    /// does.
    pub(super) fn compile(
        &self,
        sandbox: &Sandbox,
        bytes: &[u8],
        reset: bool,
    ) -> Result<Vec<u8>, LoadError> {
        let config = &sandbox.config;
        self.work(
            CompileJob {
                largest_instance: config.largest_instance,
                on_demand: !sandbox.pooled,
                any_cpu: false,
                quick: config.compiler.quick,
                reset,
                copy_memory: config.compiler.copy_memory,
                memory: self.memory as u64,
                seconds: self.seconds(),
            },
            bytes,
        )
    }

    /// Compiles a component to a file that a server of this version loads.
    ///
    /// # Errors
    /// It does not compile.
    pub fn precompile(&self, bytes: &[u8], ahead: Ahead) -> Result<Vec<u8>, LoadError> {
        let config = SandboxConfig::for_compiling(false, false);
        self.work(
            CompileJob {
                largest_instance: config.largest_instance,
                on_demand: ahead.on_demand,
                any_cpu: ahead.cpu == Cpu::Any,
                quick: false,
                reset: true,
                copy_memory: false,
                memory: self.memory as u64,
                seconds: self.seconds(),
            },
            bytes,
        )
    }

    /// Processor time, of all threads together.
    fn seconds(&self) -> u64 {
        self.timeout.as_secs() + 1
    }

    fn work(&self, job: CompileJob, bytes: &[u8]) -> Result<Vec<u8>, LoadError> {
        let failed = |error: io::Error| match error.kind() {
            io::ErrorKind::NotConnected => LoadError::Compile(error.to_string()),
            _ => LoadError::NoProcess(error.to_string()),
        };
        let helper = self.helper.as_ref();
        let helper = helper.map_err(|error| LoadError::Compile(error.to_string()))?;
        let JobResult {
            outcome,
            output,
            complaint,
        } = helper
            .work(&job, bytes, self.memory as u64, self.timeout)
            .map_err(failed)?;
        let out_of_memory = format!("it may need more than {} bytes of memory", self.memory);
        Err(match outcome {
            JobOutcome::Exited(0) => {
                if !complaint.is_empty() {
                    tracing::warn!("the compiler: {complaint}");
                }
                return Ok(output);
            }
            JobOutcome::Exited(1) => LoadError::Worker(complaint),
            JobOutcome::NotStarted(error) => LoadError::NoProcess(error),
            JobOutcome::TimedOut | JobOutcome::Killed(SIGXCPU) => LoadError::Compile(format!(
                "compiling took longer than {} ms",
                self.timeout.as_millis()
            )),
            JobOutcome::Exited(code) => LoadError::Compile(format!(
                "the compiler failed on this file (exit code {code}): {complaint}"
            )),
            JobOutcome::Killed(signal) if complaint.contains("overflowed its stack") => {
                LoadError::Compile(format!(
                    "the compiler crashed on this file (signal {signal}): it is nested too deeply"
                ))
            }
            JobOutcome::Killed(signal) => LoadError::Compile(format!(
                "the compiler crashed on this file (signal {signal}); {out_of_memory}"
            )),
        })
    }
}
