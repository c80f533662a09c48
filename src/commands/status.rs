//! `mb-server status`: what a running server does, on one screen.

use std::{thread, time::Duration};

use serde_json::Value;

use super::{
    Exit, Result,
    admin_http::{AdminTarget, Endpoint, text},
};

/// Between two looks.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// Rows of each list.
const ROWS: usize = 20;

/// Show what a running server does, on one screen
///
/// Asks its admin endpoint. Exit codes: 0 it is ready, 1 it drains, 3 it could
/// not be reached.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Look again every two seconds, until Ctrl-C
    #[arg(long, short)]
    watch: bool,
    #[command(flatten)]
    target: AdminTarget,
}

pub(super) fn run(arguments: &Arguments) -> Result {
    let endpoint = arguments.target.endpoint()?;
    loop {
        let (screen, ready) = screen(&endpoint)?;
        if !arguments.watch {
            say!("{}", screen.trim_end());
            return Ok(if ready { Exit::Success } else { Exit::Failure });
        }
        // Clears the screen, as `watch` does.
        say!("\x1b[H\x1b[2J{}", screen.trim_end());
        thread::sleep(LOOK_EVERY);
    }
}

fn screen(endpoint: &Endpoint) -> std::result::Result<(String, bool), (Exit, String)> {
    let ready = endpoint.get("/readyz")?;
    let version = endpoint.get("/version")?;
    let connections = endpoint.get("/connections")?;
    let services = endpoint.get("/services")?;
    let calls = endpoint.get("/calls")?;
    let past = endpoint.get("/calls/past?limit=5")?;
    let state = text(&ready["status"]);
    let open = rows(&connections["connections"]);
    let busy = open.iter().filter(|row| row["state"] == "calling").count();
    let mut out = format!(
        "mb-server {}  {state}  {} connections, {busy} of them in a call\n\n",
        text(&version["version"]),
        open.len()
    );
    for certificate in rows(&ready["invalidCertificates"]) {
        let (file, error) = (text(&certificate["file"]), text(&certificate["error"]));
        out += &format!("the certificate {file} {error}\n\n");
    }
    for stale in rows(&ready["staleFiles"]) {
        let (files, error) = (text(&stale["files"]), text(&stale["error"]));
        out += &format!("{files} could not be read again: {error}\n\n");
    }
    out += &format!(
        "{:30} {:10} {:>10} {:>9} {:>8} {:>10} {:>10} {:>10}\n",
        "service", "state", "calls", "failures", "errors", "p50 ms", "p99 ms", "cpu s"
    );
    for row in rows(&services["services"]).iter().take(ROWS) {
        let name = format!("{} {}", text(&row["name"]), text(&row["version"]));
        let latency = &row["latency"];
        out += &format!(
            "{name:30} {:10} {:>10} {:>9} {:>8} {:>10} {:>10} {:>10}\n",
            text(&row["state"]),
            text(&row["calls"]),
            text(&row["failures"]),
            text(&row["errors"]),
            text(&latency["p50Ms"]),
            text(&latency["p99Ms"]),
            format!("{:.1}", row["cpuSeconds"].as_f64().unwrap_or_default()),
        );
        if !row["error"].is_null() {
            out += &format!("    {}\n", text(&row["error"]));
        }
        if !row["rolledBackFrom"].is_null() {
            out += &format!(
                "    rolled back; the file in the folder is not served until it changes, or until mb-server rollback {} --undo\n",
                text(&row["name"])
            );
        }
    }
    if !ready["store"]["error"].is_null() {
        out += &format!(
            "\nstore {}: {}\n",
            text(&ready["store"]["status"]),
            text(&ready["store"]["error"])
        );
    }
    let running = rows(&calls["calls"]);
    out += &format!("\nlong calls: {}\n", running.len());
    for call in running.iter().take(ROWS) {
        out += &format!(
            "  {:>6}  {:30} {:24} {:8} {:>8} ms, ran {} ms, {} ms left\n",
            text(&call["id"]),
            text(&call["topic"]),
            text(&call["requestId"]),
            text(&call["state"]),
            text(&call["ageMs"]),
            text(&call["ranMs"]),
            text(&call["remainingMs"]),
        );
    }
    let failed = rows(&past["calls"]);
    if !failed.is_empty() {
        out += "\nfailed or slow, newest first; mb-server why REQUEST shows more\n";
    }
    for call in failed {
        let topic = format!("{}.{}", text(&call["service"]), text(&call["action"]));
        let (id, outcome) = (text(&call["requestId"]), text(&call["outcome"]));
        out += &format!(
            "  {}  {topic:30} {id:24} {outcome:16} {} ms\n",
            text(&call["ended"]),
            text(&call["elapsedMs"])
        );
    }
    Ok((out, state == "ready"))
}

fn rows(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}
