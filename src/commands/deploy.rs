//! `mb-server service deploy`: puts a component on one or several servers, on
//! all of them or on none.

use std::{
    borrow::Borrow,
    fs::File,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering::SeqCst},
    time::Duration,
};

use serde_json::{Value, json};

use super::{
    Exit, INTERRUPTED, Result,
    admin_http::{Endpoint, on_all, text},
    failure, printable,
    service::{Servers, done, failed, file_stem, show},
    usage,
    watch::{Problem, Seen, Watch},
};
use crate::{
    catalog::{FileName, MAX_SIZE, digest_of},
    config::Millis,
    files,
};

/// Put a component on servers: on all of them, or on none
///
/// Each server checks it first: it loads, is granted what it needs, and breaks
/// no caller of what is served unless its version says so. Once all servers
/// hold it, all serve it; where one fails, all go back. Needs `admin.deploy`
/// on each server, and its token for deploys. Exit codes: 0 deployed, 1
/// refused or undone, 2 usage, 3 a server could not be reached.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// The component, NAME.wasm or NAME@VERSION.wasm
    #[arg(value_name = "FILE.wasm")]
    file: PathBuf,
    /// Deploy it although it breaks callers
    #[arg(long)]
    force: bool,
    /// Have the servers check it, and change nothing
    #[arg(long)]
    dry_run: bool,
    /// Watch its calls for so long, and go back if they fail or are slow
    #[arg(long, value_name = "TIME", value_parser = parse_time, conflicts_with = "dry_run")]
    watch: Option<Duration>,
    /// Share of calls that the server may end during --watch: traps, limits, timeouts
    #[arg(long, value_name = "PERCENT", default_value = "1%", value_parser = parse_percent, requires = "watch")]
    max_errors: f64,
    #[command(flatten)]
    servers: Servers,
}

pub(super) fn run(arguments: &Arguments) -> Result {
    let Arguments {
        file,
        force,
        dry_run,
        watch,
        max_errors,
        servers,
    } = arguments;
    let bytes = read(file)?;
    let deploy = Deploy {
        servers: servers.to_deploy()?,
        file: file_stem(file),
        digest: digest_of(&bytes),
    };
    say!(
        "{}.wasm, {} bytes, {}",
        deploy.file,
        bytes.len(),
        deploy.digest
    );
    ctrlc::set_handler(interrupt).map_err(failure)?;
    let query = format!("?force={force}&check={dry_run}");
    let verdicts = deploy.hold(&bytes, &query, !dry_run)?;
    if *dry_run {
        say!("nothing was changed");
        return Ok(Exit::Success);
    }
    let watch = watch.map(|within| {
        let before = on_all(&deploy.servers, |server| page(server, &verdicts[0]));
        let before = before.iter().zip(&verdicts).map(|(page, verdict)| {
            Seen::of(page.as_ref().ok()?, verdict["before"]["version"].as_str()?)
        });
        Watch {
            within,
            max_errors: *max_errors,
            before: before.collect(),
        }
    });
    if is_interrupted() {
        deploy.drop_held(&deploy.servers);
        return Err(failure("nothing was changed: it was interrupted"));
    }
    deploy.switch()?;
    let Some(watch) = watch else {
        return Ok(Exit::Success);
    };
    let version = text(&verdicts[0]["version"]);
    let looked = watch.run(&version, || {
        if is_interrupted() {
            return Err(Problem::Changed("it was interrupted".into()));
        }
        let pages = on_all(&deploy.servers, |server| {
            let page = page(server, &verdicts[0])?;
            deploy.is_served(server, &page, &version)?;
            Ok(page)
        });
        Ok(pages)
    });
    match looked {
        Ok(kept) => {
            say!("{kept}");
            Ok(Exit::Success)
        }
        Err(Problem::Worse(reason)) => {
            say!("rolling back: {reason}");
            Err(deploy.go_back(&reason, |_| true))
        }
        Err(Problem::Changed(reason)) => Err(failure(format!(
            "{reason}, so it is not watched any longer; nothing was rolled back"
        ))),
    }
}

/// Somebody has pressed Ctrl-C.
static IS_INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// What is held would keep others waiting: the first Ctrl-C has it dropped, the
/// second ends the command at once.
fn interrupt() {
    if IS_INTERRUPTED.swap(true, SeqCst) {
        std::process::exit(INTERRUPTED);
    }
    complain!("mb-server: it ends once the servers have answered; Ctrl-C again ends it at once");
}

fn is_interrupted() -> bool {
    IS_INTERRUPTED.load(SeqCst)
}

/// A component on its way to several servers.
struct Deploy {
    servers: Vec<Endpoint>,
    /// Its file without its ending.
    file: String,
    digest: String,
}

impl Deploy {
    /// Has each server check and hold it. Returns what they found.
    fn hold(&self, bytes: &[u8], query: &str, holds: bool) -> Result<Vec<Value>> {
        let path = format!("/services/{}{query}", self.file);
        let answers = on_all(&self.servers, |server| {
            let answer = self.verdict(server.put(&path, bytes));
            show(server, &answer.as_ref().map(found).map_err(Clone::clone));
            answer
        });
        let Some(exit) = failed(&answers) else {
            return answers.into_iter().collect();
        };
        // Those that hold it drop it. The others may serve this file since an
        // earlier deploy, which stays.
        let took = self.servers.iter().zip(&answers);
        let holding: Vec<_> = took
            .filter_map(|(server, answer)| (holds && answer.is_ok()).then_some(server))
            .collect();
        self.drop_held(&holding);
        let refused = answers.iter().filter(|answer| answer.is_err()).count();
        let all = self.servers.len();
        let error = format!("nothing was changed: {refused} of {all} servers can't take it");
        Err((exit, error))
    }

    fn drop_held<S: Borrow<Endpoint> + Sync>(&self, holding: &[S]) {
        on_all(holding, |server| self.ask(server, true).ok());
    }

    fn verdict(&self, answer: Result<(u16, Value)>) -> Result<Value> {
        let (status, answer) = answer?;
        if status == 200 && answer["digest"] == *self.digest {
            return Ok(answer);
        }
        if status == 200 {
            return Err(failure("the file changed on the way"));
        }
        let mut error = match done(Ok((status, answer.clone()))) {
            Err((_, error)) => error,
            Ok(done) => done,
        };
        for line in list(&answer["breaks"]) {
            error += &format!("\n      {line}");
        }
        Err(failure(error))
    }

    /// Has all servers serve what they hold; all go back where one does not.
    fn switch(&self) -> Result<()> {
        let asked = on_all(&self.servers, |server| {
            let answer = self.ask(server, false);
            // Only this says that nothing has changed.
            let refused = matches!(answer, Ok((409, _)));
            let answer = done(answer);
            show(server, &answer);
            (refused, answer)
        });
        let (refused, answers): (Vec<_>, Vec<_>) = asked.into_iter().unzip();
        match failed(&answers) {
            None => Ok(()),
            Some(_) => Err(self.go_back("a server failed", |at| !refused[at])),
        }
    }

    /// Whether a server's page of the service shows this component.
    fn is_served(&self, server: &Endpoint, page: &Value, version: &str) -> Result<()> {
        let address = &server.address;
        let versions = page["versions"].as_array().into_iter().flatten();
        let rows: Vec<_> = versions.map(|version| &version["row"]).collect();
        if rows
            .iter()
            .any(|row| row["digest"] == *self.digest && row["version"] == *version)
        {
            return Ok(());
        }
        let file = format!("/{}.wasm", self.file);
        let own = rows.iter().find(|row| {
            row["file"]
                .as_str()
                .is_some_and(|path| path.ends_with(&file))
        });
        match own.map(|row| (row["source"].as_str(), &row["error"])) {
            // Nobody chose it: the file fails there.
            Some((Some("lastKnownGood") | None, error)) => {
                let error = format!("{address} does not serve it: {}", text(error));
                Err((Exit::Unreachable, error))
            }
            Some(_) => Err(failure(format!("{address} serves another file by now"))),
            None => {
                let error = format!("{address} does not serve it: {}", text(&page["error"]));
                Err((Exit::Unreachable, error))
            }
        }
    }

    /// Has these servers serve what they served before. Returns how the command
    /// ends.
    fn go_back(&self, reason: &str, concerned: impl Fn(usize) -> bool) -> (Exit, String) {
        let servers: Vec<_> = self
            .servers
            .iter()
            .enumerate()
            .filter_map(|(at, server)| concerned(at).then_some(server))
            .collect();
        let answers = on_all(&servers, |server| {
            let answer = done(self.ask(server, true));
            show(server, &answer);
            answer
        });
        let left = answers.iter().filter(|answer| answer.is_err()).count();
        match failed(&answers) {
            None => failure(format!("{reason}; all serve what they served before")),
            Some(exit) => {
                let all = self.servers.len();
                let error = format!(
                    "{reason}; {left} of {all} servers could not be rolled back: mb-server status shows which serve what"
                );
                (exit, error)
            }
        }
    }

    fn ask(&self, server: &Endpoint, undo: bool) -> Result<(u16, Value)> {
        let body = json!({"digest": self.digest, "undo": undo}).to_string();
        server.post(&format!("/services/{}/deploy", self.file), &body)
    }
}

/// The page of the service.
fn page(server: &Endpoint, verdict: &Value) -> Result<Value> {
    server.get(&format!("/services/{}", text(&verdict["name"])))
}

/// What a server says of a component that it holds.
fn found(verdict: &Value) -> String {
    let name = format!("{} {}", text(&verdict["name"]), text(&verdict["version"]));
    let before = &verdict["before"];
    let mut line = if before.is_null() {
        format!("can take {name}, which is new")
    } else if before["digest"] == verdict["digest"] {
        format!("serves this {name} already")
    } else {
        format!(
            "can take {name} in the place of {}",
            text(&before["version"])
        )
    };
    for (word, lines) in [
        ("breaks", &verdict["breaks"]),
        ("warning", &verdict["warnings"]),
    ] {
        for found in list(lines) {
            line += &format!("\n      {word}: {found}");
        }
    }
    line
}

fn list(lines: &Value) -> impl Iterator<Item = String> + '_ {
    lines.as_array().into_iter().flatten().map(text)
}

/// Reads the component.
fn read(file: &Path) -> Result<Vec<u8>> {
    let name = printable(&file.display().to_string());
    let refused = |error: &dyn std::fmt::Display| usage(format!("{name}: {error}"));
    FileName::parse(file).map_err(|error| refused(&error))?;
    if file.extension().is_none_or(|ending| ending != "wasm") {
        return Err(refused(
            &"only .wasm files are deployed: machine code is copied by who may change what the server runs",
        ));
    }
    File::open(file)
        .and_then(|opened| files::read_bounded(opened, MAX_SIZE))
        .map_err(|error| refused(&error))
}

/// `30s`, `2m` or a number of milliseconds.
fn parse_time(text: &str) -> Result<Duration, String> {
    let value: Millis = serde_json::from_value(text.into()).map_err(|_| "a time is such as 30s")?;
    let allowed = Duration::from_secs(1)..=Duration::from_secs(24 * 3600);
    if allowed.contains(&value.0) {
        Ok(value.0)
    } else {
        Err("a time from 1s to 24h".into())
    }
}

/// `1%` or `1`.
fn parse_percent(text: &str) -> Result<f64, String> {
    let number = text.strip_suffix('%').unwrap_or(text).parse::<f64>();
    let share = number.ok().filter(|number| (0.0..=100.0).contains(number));
    share
        .map(|percent| percent / 100.0)
        .ok_or_else(|| "a number of per cent from 0 to 100, such as 1%".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_and_shares() {
        assert_eq!(parse_time("30s"), Ok(Duration::from_secs(30)));
        assert!(parse_time("0").is_err() && parse_time("25h").is_err() && parse_time("x").is_err());
        assert_eq!(parse_percent("1%"), Ok(0.01));
        assert_eq!(parse_percent("0.5"), Ok(0.005));
        for wrong in ["-1", "101%", "NaN", "", "1%%"] {
            assert!(parse_percent(wrong).is_err(), "{wrong}");
        }
    }
}
