//! `mb-server status`: what a running server does, on one screen; of several
//! servers, whether they serve the same.

use std::{
    collections::{BTreeMap, BTreeSet},
    thread,
    time::Duration,
};

use serde_json::Value;

use super::{
    Exit, Result,
    admin_http::{AdminTargets, Endpoint, on_all, text},
    output,
};

/// Between two looks.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// Rows of each list.
const ROWS: usize = 20;
/// Characters of a digest that tell files apart: `sha256:` and twelve.
const SHORT_DIGEST: usize = 19;

/// Show what a running server does, on one screen; or where several differ
///
/// Asks its admin endpoint. With several --admin it shows a line for each, and
/// the services that are not the same on all. Exit codes: 0 ready, and all
/// serve the same; 1 draining, or they differ; 3 one could not be reached.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Look again every two seconds, until Ctrl-C
    #[arg(long, short)]
    watch: bool,
    #[command(flatten)]
    targets: AdminTargets,
}

pub(super) fn run(arguments: &Arguments) -> Result {
    let servers = arguments.targets.endpoints()?;
    loop {
        let (screen, exit) = match &*servers {
            [server] => {
                let (screen, ready) = screen(server)?;
                (screen, if ready { Exit::Success } else { Exit::Failure })
            }
            servers => overview(servers),
        };
        if !arguments.watch {
            say!("{}", screen.trim_end());
            return Ok(exit);
        }
        // Clears the screen, as `watch` does.
        say!("\x1b[H\x1b[2J{}", screen.trim_end());
        if output::is_over() {
            return Ok(exit);
        }
        thread::sleep(LOOK_EVERY);
    }
}

/// A line for each server, and what is not the same on all.
fn overview(servers: &[Endpoint]) -> (String, Exit) {
    let (mut out, mut exit) = (String::new(), Exit::Success);
    // By name and version what each server has under it.
    let mut services = BTreeMap::<_, BTreeMap<&str, String>>::new();
    let mut reached = Vec::new();
    for (server, looked) in servers.iter().zip(on_all(servers, look)) {
        let address = &*server.address;
        let line = match looked {
            Err((code, error)) => {
                exit = exit.max(code);
                error
            }
            Ok((ready, line, rows)) => {
                if !ready {
                    exit = exit.max(Exit::Failure);
                }
                for (name, served) in rows {
                    services.entry(name).or_default().insert(address, served);
                }
                reached.push(address);
                line
            }
        };
        out += &format!("{address:24} {line}\n");
    }
    services.retain(|_, on| {
        let served: BTreeSet<_> = on.values().collect();
        on.len() < reached.len() || served.len() > 1
    });
    if services.is_empty() {
        out += "\nall that were reached serve the same\n";
        return (out, exit);
    }
    out += "\nthey differ:\n";
    for (name, on) in &services {
        for address in &reached {
            let served = on.get(address).map_or("not there", String::as_str);
            out += &format!("  {name:24} {address:24} {served}\n");
        }
    }
    (out, exit.max(Exit::Failure))
}

/// What a server has under the name and version of each service.
type Served = BTreeMap<String, String>;

/// Whether a server is ready, a line about it, and what it serves.
fn look(server: &Endpoint) -> Result<(bool, String, Served)> {
    let ready = server.get("/readyz")?;
    let version = server.get("/version")?;
    let services = server.get("/services")?;
    let services = rows(&services["services"]);
    let calls: u64 = services
        .iter()
        .filter_map(|row| row["calls"].as_u64())
        .sum();
    let (state, version) = (text(&ready["status"]), text(&version["version"]));
    let line = format!(
        "{state:9} mb-server {version}  {} services  {calls} calls",
        services.len()
    );
    let row = |row: &Value| {
        let digest = text(&row["digest"]);
        let short = digest.get(..SHORT_DIGEST).unwrap_or(&digest).to_owned();
        let served = match (&*text(&row["state"]), &row["error"]) {
            ("loaded", Value::Null) => short,
            ("loaded", error) => format!("{short}, because its file fails: {}", text(error)),
            ("disabled", _) => format!("{short}, disabled"),
            (_, error) => format!("failed: {}", text(error)),
        };
        (named(row), served)
    };
    Ok((state == "ready", line, services.iter().map(row).collect()))
}

/// Name and version of a service.
fn named(row: &Value) -> String {
    format!("{} {}", text(&row["name"]), text(&row["version"]))
}

fn screen(endpoint: &Endpoint) -> Result<(String, bool)> {
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
        let name = named(row);
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
                "    rolled back; the file in the folder is not served until it changes, or until mb-server service rollback {} --undo\n",
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
