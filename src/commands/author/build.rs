//! `mb-server build`: from a project to one component.

use std::path::PathBuf;

use super::{Exit, Result, failure, usage};
use crate::project::{Kind, Project, ProjectError, build};

/// Build the component of a project with the tools of its language
///
/// Writes DIR/dist/NAME.wasm, and touches no other file there. Tools of npm and pip are installed into the
/// project, once. Exit codes: 0 built, 1 the tool reports what is wrong, 2
/// there is no project, or a tool is missing; the message says how to get it.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// The project's folder
    #[arg(default_value = ".")]
    dir: PathBuf,
}

pub(super) fn run(arguments: &Arguments) -> Result {
    let project = Project::find(&arguments.dir).map_err(usage)?;
    let built = build(&project, Kind::Release, &|line| {
        complain!("mb-server: {line}")
    })
    .map_err(refuse)?;
    let file = built.file.display();
    say!(
        "{file}: {} bytes, built in {:.1} s",
        built.size,
        built.took.as_secs_f64()
    );
    say!("look at it: mb-server inspect {file}");
    Ok(Exit::Success)
}

fn refuse(error: ProjectError) -> (Exit, String) {
    match error {
        ProjectError::Missing(_) => usage(error),
        ProjectError::Failed(_) => failure(error),
    }
}
