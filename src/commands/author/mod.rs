//! The subcommands for authors of services, and what else takes the compiler: a
//! build without it has none of them.

mod bench;
mod build;
mod cert;
mod compile;
mod dev;
mod inspect;
mod load_streams;
mod new;
mod wit;

// What the subcommands here use of the others.
use super::{
    Exit, Result, call, connect, failure, live_settings, printable, serve, serving, usage,
};
use crate::sandbox::{CompileJob, help};

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    New(new::Arguments),
    Build(build::Arguments),
    Dev(dev::Arguments),
    Wit(wit::Arguments),
    Compile(compile::Arguments),
    Inspect(inspect::Arguments),
    Bench(Box<bench::Arguments>),
    Cert(cert::Arguments),
    /// Compile a component from standard input to standard output; the server
    /// calls this
    #[command(hide = true)]
    CompileWorker {
        /// What to do, as JSON
        job: String,
    },
    /// Start the processes that compile, on requests over standard input; the
    /// server calls this
    #[command(hide = true)]
    CompileHelper,
}

impl Command {
    pub(super) fn run(self) -> Result {
        match self {
            Self::New(arguments) => new::run(&arguments),
            Self::Build(arguments) => build::run(&arguments),
            Self::Dev(arguments) => dev::run(&arguments),
            Self::Wit(arguments) => wit::run(&arguments),
            Self::Compile(arguments) => compile::run(&arguments),
            Self::Inspect(arguments) => inspect::run(&arguments),
            Self::Bench(arguments) => bench::run(&arguments),
            Self::Cert(arguments) => cert::run(&arguments),
            Self::CompileWorker { job } => compile(&job),
            Self::CompileHelper => help().map(|()| Exit::Success).map_err(failure),
        }
    }
}

fn compile(job: &str) -> Result {
    let job: CompileJob = serde_json::from_str(job).map_err(usage)?;
    // The reason alone: the server puts the rest around it.
    Ok(match job.run() {
        Ok(()) => Exit::Success,
        Err(error) => {
            complain!("{error}");
            Exit::Failure
        }
    })
}
