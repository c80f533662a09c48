//! `mb-server why`: what happened to one request.

use serde_json::Value;

use super::{
    Exit, Result,
    admin_http::{AdminTarget, text},
    failure, usage,
};
use crate::wire::header::is_request_id;

/// Say what happened to one request that failed or was slow
///
/// Asks the admin endpoint of a running server. Of failed calls it keeps
/// the newest 64 of each service and code, 512 in all; the newest 256 that
/// took more than 10 ms; and the newest 1,000 lines of its log. Exit codes: 0 found, 1 not kept, 3 the server
/// could not be reached.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// The id that the caller gave the request
    request_id: String,
    #[command(flatten)]
    target: AdminTarget,
}

pub(super) fn run(arguments: &Arguments) -> Result {
    let Arguments { request_id, target } = arguments;
    if !is_request_id(request_id) {
        return Err(usage(format!(
            "{request_id:?} is no request id: 1 to 64 letters, digits, dots, dashes, underscores"
        )));
    }
    let endpoint = target.endpoint()?;
    let past = endpoint.get(&format!("/calls/past?requestId={request_id}"))?;
    let running = endpoint.get("/calls")?;
    let log = endpoint.get(&format!("/log?requestId={request_id}"))?;
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let (own, children): (Vec<_>, Vec<_>) = list(&past["calls"])
        .into_iter()
        .partition(|call| call["requestId"] == **request_id);
    let now: Vec<_> = list(&running["calls"])
        .into_iter()
        .filter(|call| call["requestId"] == **request_id)
        .collect();
    let lines = list(&log["lines"]);
    for call in &now {
        let (topic, state) = (text(&call["topic"]), text(&call["state"]));
        say!(
            "{request_id} is {state} now: {topic}, for {} ms, of which it ran {} and waited {} for a processor, {} ms left; number {} of /calls",
            text(&call["ageMs"]),
            text(&call["ranMs"]),
            text(&call["cpuWaitedMs"]),
            text(&call["remainingMs"]),
            text(&call["id"])
        );
    }
    for call in &own {
        print_call(call);
    }
    for child in &children {
        say!("\nit caused");
        print_call(child);
    }
    if !lines.is_empty() {
        say!("\nlog");
    }
    for line in &lines {
        say!(
            "  {} {:5} {}",
            text(&line["time"]),
            text(&line["level"]),
            text(&line["message"])
        );
    }
    if now.is_empty() && own.is_empty() && children.is_empty() && lines.is_empty() {
        return Err(failure(format!(
            "nothing is recorded of {request_id}: it was answered within 10 ms, or newer calls displaced it, or the \
             server did not get it; with the log filter `debug` every call leaves a line"
        )));
    }
    Ok(Exit::Success)
}

fn print_call(call: &Value) {
    let who = match &call["principal"] {
        Value::Null => "an unauthenticated peer".to_owned(),
        principal => text(principal),
    };
    say!("{}  {}", text(&call["requestId"]), text(&call["outcome"]));
    say!(
        "  asked      {}.{} by {who}, over connection {}",
        text(&call["service"]),
        text(&call["action"]),
        text(&call["connection"])
    );
    if !call["version"].is_null() {
        say!(
            "  served by  {} {}",
            text(&call["service"]),
            text(&call["version"])
        );
    }
    say!("  ended      {}", text(&call["ended"]));
    say!(
        "  took       {} ms, of which {} ms until there was an instance",
        text(&call["elapsedMs"]),
        text(&call["waitedMs"])
    );
    if !call["ranMs"].is_null() {
        say!(
            "  ran        {} ms, and waited {} ms for a processor",
            text(&call["ranMs"]),
            text(&call["cpuWaitedMs"])
        );
    }
    say!("  memory     {} bytes at most", text(&call["peakMemory"]));
    for (title, key) in [("because", "message"), ("details", "details")] {
        if !call[key].is_null() {
            say!("  {title:9}  {}", text(&call[key]));
        }
    }
    for title in ["stderr", "backtrace"] {
        let lines = call[title].as_array().into_iter().flatten();
        for (index, line) in lines.enumerate() {
            let title = if index == 0 { title } else { "" };
            say!("  {title:9}  {}", text(line));
        }
    }
}
