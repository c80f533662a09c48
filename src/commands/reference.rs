//! Generates the reference of settings and commands, and compares it with the
//! committed one: `UPDATE=1 cargo test --lib reference` writes it.

use std::{fmt::Write as _, fs, path::Path};

use clap::{Arg, Command, CommandFactory as _};

use super::{Arguments, live_settings::is_live};
use crate::config::{
    Admin, Config, Entry, Http, Tls,
    access::{Listener, PrincipalSettings},
    services::{Grants, ServiceSettings},
    store::Store,
};

/// Compares a page with the committed one, or writes it where `UPDATE` is set.
fn hold(file: &str, page: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
    if std::env::var_os("UPDATE").is_some() {
        fs::write(&path, page).unwrap();
    }
    let committed = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        committed == page,
        "{file} is not what the code says; write it with: UPDATE=1 cargo test --release --lib reference"
    );
}

/// What only readers of the sources can follow becomes plain text.
fn plain(text: &str) -> String {
    let text = text.replace("see [`MemoryPlan`]", "see [Memory](README.md#memory)");
    text.replace('|', "\\|")
}

/// The rows of a table; `prefix` stands before each name in the file.
fn rows(page: &mut String, prefix: &str, entries: &[Entry]) {
    page.push_str("| key | default | allowed | meaning |\n| --- | --- | --- | --- |\n");
    for Entry {
        name,
        default,
        bounds,
        text,
    } in entries
    {
        let key = format!("{prefix}{name}");
        let live = match is_live(&key) && !key.contains("NAME") {
            true => " Applies without a restart.",
            false => "",
        };
        let default = match default.as_str() {
            "" => String::new(),
            default => format!("`{default}`"),
        };
        let text = plain(text);
        let _ = writeln!(page, "| `{name}` | {default} | {bounds} | {text}{live} |");
    }
}

const SETTINGS: &str = "# Settings

This page is generated from the sources; `cargo test` holds it.

Later sources win: the defaults, the TOML file of `--config` or `MB_CONFIG`, environment variables, flags. A variable is `MB_` and the key in upper case, with two underscores between levels: `MB_PORT=8082`, `MB_ADMIN__PORT=9191`, `MB_HOST='[\"127.0.0.1\",\"::1\"]'`. An unknown key, a value of the wrong kind and a value out of its bounds are errors, and the server does not start. `mb-server check` prints the effective settings and where each comes from.

Durations are numbers of milliseconds or texts with a unit: `60000`, `\"60s\"`, `\"1m 30s\"`. Sizes are numbers of bytes or texts with a unit: `1048576`, `\"1MiB\"`, `\"64 kB\"`. An empty text means that a file or folder is not set.

`systemctl reload`, SIGHUP and `POST /config/reload` read the settings again. Those of services and principals, and those marked below, apply without a restart; the others wait for the next start ([Change settings](README.md#change-settings)).
";

#[test]
fn the_reference_of_settings_is_generated() {
    let mut page = SETTINGS.to_owned();
    let mut table = |heading: &str, text: &str, prefix: &str, entries: &[Entry]| {
        let _ = write!(page, "\n## {heading}\n\n{text}\n\n");
        rows(&mut page, prefix, entries);
    };
    let mut server = Config::reference();
    let tables = [
        "admin",
        "store",
        "tls",
        "principals",
        "listeners",
        "services",
    ];
    server.retain(|entry| !tables.contains(&entry.name));
    table("The server", "At the top of the file.", "", &server);
    table(
        "[admin]",
        "The [admin endpoint](API.md).",
        "admin.",
        &Admin::reference(),
    );
    table(
        "[http]",
        "HTTP on the ports of the services.",
        "http.",
        &Http::reference(),
    );
    table(
        "[tls]",
        "TLS of the listener on `tls.port`, and of further listeners with `tls = true`. `cert` and `key` switch it on.",
        "tls.",
        &Tls::reference(),
    );
    table(
        "[[listeners]]",
        "Further listeners.",
        "listeners.",
        &Listener::reference(),
    );
    table(
        "[principals.NAME]",
        "What a principal may call. `[principals.default]` holds for principals without a table, `[principals.anonymous]` for peers without authentication.",
        "principals.NAME.",
        &PrincipalSettings::reference(),
    );
    table(
        "[store]",
        "Where [durable values](DEPLOYING.md#state-on-valkey-or-redis) are kept.",
        "store.",
        &Store::reference(),
    );
    let mut service = ServiceSettings::reference();
    service.retain(|entry| entry.name != "grants");
    table(
        "[services.NAME]",
        "Settings of one service. What is left out comes from `[services.default]`, and else from the defaults here.",
        "services.NAME.",
        &service,
    );
    table(
        "[services.NAME.grants]",
        "What a service may use beside processor, memory, clocks and random numbers ([Grants](README.md#grants)).",
        "services.NAME.grants.",
        &Grants::reference(),
    );
    hold("admin/SETTINGS.md", &page);
}

const COMMANDS: &str = "# Commands

This page is generated from the program's own help; `cargo test` holds it. `mb-server help COMMAND` prints the same.
";

#[test]
fn the_reference_of_commands_is_generated() {
    let mut root = Arguments::command();
    root.build();
    let mut page = COMMANDS.to_owned();
    page.push_str("\n| command | does |\n| --- | --- |\n");
    for command in shown(&root) {
        let name = command.get_name();
        let about = command
            .get_about()
            .map(ToString::to_string)
            .unwrap_or_default();
        let _ = writeln!(page, "| [`{name}`](#mb-server-{name}) | {about} |");
    }
    for command in shown(&root) {
        describe(&mut page, "mb-server", command);
    }
    hold("admin/CLI.md", &page);
}

fn shown(command: &Command) -> impl Iterator<Item = &Command> {
    command
        .get_subcommands()
        .filter(|command| !command.is_hide_set() && command.get_name() != "help")
}

fn describe(page: &mut String, parent: &str, command: &Command) {
    let name = format!("{parent} {}", command.get_name());
    let level = if parent.contains(' ') { "###" } else { "##" };
    let about = command.get_long_about().or(command.get_about());
    let about = about.map(ToString::to_string).unwrap_or_default();
    let _ = write!(page, "\n{level} {name}\n\n{}\n", plain(&about));
    let subcommands = command.has_subcommands();
    if !subcommands {
        let usage = command.clone().render_usage().to_string();
        let usage = usage.trim_start_matches("Usage: ");
        let _ = write!(page, "\n```text\n{usage}\n```\n");
    }
    let inherited = |arg: &&Arg| subcommands || !arg.is_global_set();
    let mut arguments = command
        .get_arguments()
        .filter(|arg| !arg.is_hide_set() && arg.get_id() != "help")
        .filter(inherited)
        .peekable();
    if arguments.peek().is_some() {
        page.push_str("\n| argument | meaning |\n| --- | --- |\n");
    }
    for arg in arguments {
        let _ = writeln!(page, "| {} | {} |", spelled(arg), meaning(arg));
    }
    if let Some(examples) = command.get_after_help() {
        let examples = examples.to_string();
        let lines = examples.lines().filter_map(|line| line.strip_prefix("  "));
        let lines: Vec<_> = lines.collect();
        let _ = write!(page, "\n```text\n{}\n```\n", lines.join("\n"));
    }
    for command in shown(command) {
        describe(page, &name, command);
    }
}

fn spelled(arg: &Arg) -> String {
    let names = arg.get_value_names().unwrap_or_default();
    let value = names
        .iter()
        .map(|name| format!("{name}"))
        .collect::<Vec<_>>()
        .join(" ");
    let value = if arg.get_action().takes_values() {
        value
    } else {
        String::new()
    };
    let flags = [
        arg.get_short().map(|short| format!("-{short}")),
        arg.get_long().map(|long| format!("--{long}")),
    ];
    let flags: Vec<_> = flags.into_iter().flatten().collect();
    let text = format!("{} {value}", flags.join(", "));
    format!("`{}`", plain(text.trim()))
}

fn meaning(arg: &Arg) -> String {
    let help = arg.get_long_help().or(arg.get_help());
    let help = help.map(ToString::to_string).unwrap_or_default();
    let mut text = plain(&help.split_whitespace().collect::<Vec<_>>().join(" "));
    let values = arg.get_possible_values();
    if !values.is_empty() && arg.get_action().takes_values() {
        let names: Vec<_> = values
            .iter()
            .map(|value| format!("`{}`", value.get_name()))
            .collect();
        let _ = write!(text, ": {}", names.join(", "));
    }
    let defaults: Vec<_> = arg
        .get_default_values()
        .iter()
        .map(|value| value.to_string_lossy())
        .collect();
    if !defaults.is_empty() && arg.get_action().takes_values() {
        let _ = write!(text, " [default: {}]", defaults.join(" "));
    }
    if let Some(variable) = arg.get_env() {
        let _ = write!(text, " [variable: `{}`]", variable.to_string_lossy());
    }
    text
}
