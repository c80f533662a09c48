//! `mb-server why`: what happened to one request.

use serde_json::Value;

use super::{
    Exit, Result,
    admin_http::{AdminTargets, Endpoint, on_all, text},
    call::parse_request_id,
    failure,
};

/// Say what happened to one request that failed or was slow
///
/// Asks the admin endpoint of a running server, or of each where --admin is
/// there several times. Of failed calls it keeps the newest 64 of each service
/// and code, 512 in all; the newest 256 that took more than 10 ms; and the
/// newest 1,000 lines of its log. Exit codes: 0 found, 1 not kept, 3 it was not
/// found, and a server could not be reached.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// The id that the caller gave the request
    #[arg(value_parser = parse_request_id)]
    request_id: String,
    #[command(flatten)]
    targets: AdminTargets,
}

pub(super) fn run(arguments: &Arguments) -> Result {
    let Arguments {
        request_id,
        targets,
    } = arguments;
    let servers = targets.endpoints()?;
    let recorded = on_all(&servers, |server| recorded(server, request_id));
    let (mut found, mut problem) = (false, None);
    for (server, recorded) in servers.iter().zip(recorded) {
        match recorded {
            Ok(None) => {}
            Ok(Some(record)) => {
                if servers.len() > 1 {
                    say!("server {}", server.address);
                }
                say!("{}", record.trim_end());
                found = true;
            }
            Err(error) => problem = Some(error),
        }
    }
    match problem {
        Some(problem) if !found => Err(problem),
        Some((_, error)) => {
            complain!("{error}");
            Ok(Exit::Success)
        }
        None if found => Ok(Exit::Success),
        None => Err(failure(format!(
            "nothing is recorded of {request_id}: it was answered within 10 ms, or newer calls displaced it, or the \
             server did not get it; with the log filter `debug` every call leaves a line"
        ))),
    }
}

/// What a server has recorded of a request, if anything.
fn recorded(server: &Endpoint, id: &str) -> Result<Option<String>> {
    let list = |mut page: Value, name: &str| match page.get_mut(name).map(Value::take) {
        Some(Value::Array(rows)) => rows,
        _ => Vec::new(),
    };
    let past = list(server.get(&format!("/calls/past?requestId={id}"))?, "calls");
    let mut running = list(server.get("/calls")?, "calls");
    running.retain(|call| call["requestId"] == id);
    let lines = list(server.get(&format!("/log?requestId={id}"))?, "lines");
    if past.is_empty() && running.is_empty() && lines.is_empty() {
        return Ok(None);
    }
    let (own, children): (Vec<_>, Vec<_>) = past.iter().partition(|call| call["requestId"] == id);
    let mut out = String::new();
    for call in &running {
        out += &format!("{id}  {}\n{}", text(&call["state"]), fields(call));
    }
    for call in own {
        out += &past_call(call);
    }
    for child in children {
        out += &format!("it caused\n{}", past_call(child));
    }
    if !lines.is_empty() {
        out += "log\n";
    }
    for line in &lines {
        let (time, level) = (text(&line["time"]), text(&line["level"]));
        out += &format!("  {time} {level:5} {}\n", text(&line["message"]));
    }
    Ok(Some(out))
}

fn past_call(call: &Value) -> String {
    let [id, outcome, service, version] =
        ["requestId", "outcome", "service", "version"].map(|key| text(&call[key]));
    format!("{id}  {outcome}  {service} {version}\n{}", fields(call))
}

/// A line for each field that has a value and is not in the first line, and
/// for each line of a list.
fn fields(call: &Value) -> String {
    let mut out = String::new();
    let known = ["requestId", "outcome", "service", "version", "state"];
    for (key, value) in call.as_object().into_iter().flatten() {
        if value.is_null() || known.contains(&&**key) {
            continue;
        }
        let (name, unit) = match (&**key, key.strip_suffix("Ms")) {
            (_, Some(name)) => (name, " ms"),
            ("peakMemory", None) => ("peakMemory", " bytes"),
            (name, None) => (name, ""),
        };
        for value in value.as_array().unwrap_or(&vec![value.clone()]) {
            out += &format!("  {name:16} {}{unit}\n", text(value));
        }
    }
    out
}
