//! What documents claim, compared with the program: links, commands, settings,
//! routes, fields, metrics, codes and lines of the log.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use clap::{Command, CommandFactory as _};
use mb_server::{
    commands::Arguments,
    config::{self, Flags, MemoryPlan},
    sandbox::{CALL_DEPTH, STACK, TABLE_ELEMENTS},
    wire::Code,
};
use serde_json::Value;

use crate::{setup, support::TestServer};

/// One document.
struct Document {
    /// From the root of the repository.
    name: String,
    path: PathBuf,
    text: String,
}

/// A block of code, with what stands behind its fence.
struct Block<'a> {
    language: &'a str,
    text: String,
}

impl Document {
    fn read(name: &str) -> Self {
        let path = root().join(name);
        let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{name}: {error}"));
        let name = name.to_owned();
        Self { name, path, text }
    }

    /// Its lines outside of blocks of code.
    fn prose(&self) -> impl Iterator<Item = &str> {
        let mut in_block = false;
        self.text.lines().filter(move |line| {
            let fence = line.starts_with("```");
            in_block ^= fence;
            !in_block && !fence
        })
    }

    fn blocks(&self) -> Vec<Block<'_>> {
        let mut blocks: Vec<Block> = Vec::new();
        let mut in_block = false;
        for line in self.text.lines() {
            if let Some(language) = line.strip_prefix("```") {
                in_block ^= true;
                if in_block {
                    let text = String::new();
                    blocks.push(Block { language, text });
                }
            } else if in_block && let Some(block) = blocks.last_mut() {
                block.text += line;
                block.text.push('\n');
            }
        }
        blocks
    }

    /// What stands in backquotes outside of blocks.
    fn spans(&self) -> Vec<&str> {
        self.prose().flat_map(spans).collect()
    }

    /// Its headings, as a link names them.
    fn anchors(&self) -> BTreeSet<String> {
        self.prose()
            .filter_map(|line| {
                line.trim_start_matches('#')
                    .strip_prefix(' ')
                    .filter(|_| line.starts_with('#'))
            })
            .map(|heading| {
                let kept = |c: &char| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_');
                let slug: String = heading.to_lowercase().chars().filter(kept).collect();
                slug.replace(' ', "-")
            })
            .collect()
    }

    /// The lines below a heading, to the next one of its level or above.
    fn section(&self, heading: &str) -> Vec<&str> {
        let level = heading.chars().take_while(|c| *c == '#').count();
        let ends = |line: &&str| {
            let hashes = line.chars().take_while(|c| *c == '#').count();
            hashes == 0 || hashes > level
        };
        let mut lines = self.text.lines().skip_while(|line| *line != heading);
        assert!(lines.next().is_some(), "{} has no {heading}", self.name);
        lines.take_while(ends).collect()
    }

    /// The names in the first cell of each row of a section's tables.
    fn rows(&self, heading: &str) -> BTreeSet<String> {
        let section = self.section(heading);
        let cells = section.iter().filter_map(|line| line.strip_prefix("| `"));
        cells
            .filter_map(|row| row.split(" | ").next())
            .flat_map(|cell| {
                spans(&format!("`{cell}"))
                    .into_iter()
                    .map(str::to_owned)
                    .collect::<Vec<_>>()
            })
            .collect()
    }
}

fn spans(line: &str) -> Vec<&str> {
    // A span in two backquotes has single ones in it.
    line.split("``")
        .step_by(2)
        .flat_map(|part| part.split('`').skip(1).step_by(2))
        .collect()
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// All documents of the project, but those that are templates of others.
fn documents() -> Vec<Document> {
    const PASSED_OVER: [&str; 6] = [
        "target",
        "node_modules",
        "templates",
        "heavy",
        "fixtures",
        ".git",
    ];
    fn collect(dir: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if path.is_dir() && !PASSED_OVER.contains(&&*name) {
                collect(&path, found);
            } else if name.ends_with(".md") {
                found.push(path);
            }
        }
    }
    let mut found = Vec::new();
    collect(root(), &mut found);
    let name = |path: &PathBuf| path.strip_prefix(root()).unwrap().display().to_string();
    let documents: Vec<_> = found
        .iter()
        .map(|path| Document::read(&name(path)))
        .collect();
    assert!(documents.len() > 15, "{}", documents.len());
    documents
}

/// Those for people who use the program; the changelog speaks of the past.
fn for_users() -> Vec<Document> {
    let mut documents = documents();
    documents
        .retain(|document| !document.name.starts_with("tests/") && document.name != "CHANGELOG.md");
    documents
}

#[test]
fn links_lead_somewhere() {
    for document in documents() {
        for link in document.prose().flat_map(|line| line.split("](").skip(1)) {
            let target = link.split(')').next().unwrap();
            if target.contains("://") {
                continue;
            }
            let (file, anchor) = target.split_once('#').unwrap_or((target, ""));
            let path = match file {
                "" => document.path.clone(),
                file => document.path.parent().unwrap().join(file),
            };
            assert!(path.exists(), "{}: {target} is not there", document.name);
            if !anchor.is_empty() {
                let text = fs::read_to_string(&path).unwrap();
                let other = Document {
                    name: target.into(),
                    path,
                    text,
                };
                assert!(
                    other.anchors().contains(anchor),
                    "{}: {target} has no such heading",
                    document.name
                );
            }
        }
    }
}

#[test]
fn pages_that_are_read_first_are_short() {
    for (page, most) in [("README.md", 8 * 1024), ("src/ARCHITECTURE.md", 20 * 1024)] {
        let size = Document::read(page).text.len();
        assert!(
            size <= most,
            "{page} has {size} bytes, at most {most} are for its reader"
        );
    }
}

/// Words of a line of the shell, up to what begins another command.
fn words(line: &str) -> impl Iterator<Item = &str> {
    line.split_whitespace()
        .take_while(|word| !matches!(*word, "|" | "&" | "&&" | ";" | ">" | "#" | "2>log"))
        .filter(|word| !word.starts_with('\''))
}

fn check_command(place: &str, line: &str, root: &Command) {
    let mut words = words(line).peekable();
    let mut command = root;
    while let Some(word) = words.peek()
        && let Some(next) = command.find_subcommand(word)
    {
        command = next;
        words.next();
    }
    if command.get_name() == root.get_name() {
        let name = words.peek().copied().unwrap_or("--help");
        assert!(
            name.starts_with(['-', '/', '.']) || name == "COMMAND",
            "{place}: {line}: there is no command {name}"
        );
        return;
    }
    for flag in words.filter(|word| word.starts_with("--") && word.len() > 2) {
        let name = flag[2..].split(['=', ']']).next().unwrap();
        let known = name == "help"
            || command
                .get_arguments()
                .chain(root.get_arguments())
                .any(|arg| arg.get_long() == Some(name));
        assert!(
            known,
            "{place}: {line}: {} has no flag {flag}",
            command.get_name()
        );
    }
}

#[test]
fn commands_and_flags_exist() {
    let mut root = Arguments::command();
    root.build();
    let mut seen = 0;
    for document in documents()
        .iter()
        .filter(|document| document.name != "CHANGELOG.md")
    {
        let blocks = document.blocks();
        let lines = blocks
            .iter()
            .filter(|block| ["sh", "sh repository", "shell"].contains(&block.language));
        let lines = lines.flat_map(|block| block.text.lines());
        for line in lines.chain(document.spans()) {
            // Behind another command too, as in `cd x && mb-server build`.
            for (at, _) in line.match_indices("mb-server ") {
                if at == 0 || line[..at].ends_with([' ', '!', '/']) {
                    check_command(&document.name, &line[at + "mb-server ".len()..], &root);
                    seen += 1;
                }
            }
        }
    }
    assert!(seen > 50, "{seen}");
}

#[test]
fn examples_of_settings_are_taken() {
    for document in for_users() {
        for block in document
            .blocks()
            .iter()
            .filter(|block| block.language == "toml")
        {
            let mut file = tempfile::NamedTempFile::new().unwrap();
            std::io::Write::write_all(&mut file, block.text.as_bytes()).unwrap();
            let loaded = config::load(Some(file.path()), Flags::default());
            assert!(
                loaded.is_ok(),
                "{}: {}\n{}",
                document.name,
                loaded.unwrap_err(),
                block.text
            );
        }
    }
}

/// Names of settings by table, as the generated reference has them.
fn settings() -> BTreeMap<String, BTreeSet<String>> {
    let page = Document::read("admin/SETTINGS.md");
    let headings = page.text.lines().filter(|line| line.starts_with("## "));
    headings
        .map(|heading| {
            (
                heading[3..].trim_matches(['[', ']']).to_owned(),
                page.rows(heading),
            )
        })
        .collect()
}

#[test]
fn settings_that_are_named_exist() {
    // Files of these names, and keys that are values.
    const OTHERS: [&str; 4] = ["admin.token", "admin.sock", "key", "currency"];
    let tables = settings();
    assert!(
        tables["The server"].contains("memory") && tables["services.NAME"].contains("isolation")
    );
    let anywhere =
        |name: &str| tables.values().any(|names| names.contains(name)) || tables.contains_key(name);
    for document in for_users() {
        for span in document
            .spans()
            .into_iter()
            .filter(|span| !OTHERS.contains(span))
        {
            let word = |text: &str| text.bytes().all(|b| b.is_ascii_lowercase() || b == b'_');
            let (key, has_value) = match span.split_once(" = ") {
                Some((key, _)) => (key, true),
                None => (span, false),
            };
            let known = match key.rsplit_once('.') {
                Some((table, name)) if ["admin", "tls", "http"].contains(&table) && word(name) => {
                    tables[table].contains(name)
                }
                Some(("grants", name)) if word(name) => {
                    tables["services.NAME.grants"].contains(name)
                }
                None if has_value && word(key) && !OTHERS.contains(&key) => anywhere(key),
                _ => match key
                    .strip_prefix("MB_")
                    .map(|name| name.split('=').next().unwrap())
                {
                    Some("" | "CONFIG") | None => true,
                    // The random tests of mb-reset.
                    Some(name) if name.starts_with("RESET_") => true,
                    Some(name) => is_variable_of(&tables, name),
                },
            };
            assert!(known, "{}: there is no setting {span}", document.name);
        }
    }
}

/// Whether `MB_` and this name is the environment variable of a setting.
fn is_variable_of(tables: &BTreeMap<String, BTreeSet<String>>, name: &str) -> bool {
    let key = name.to_lowercase().replace("__", ".");
    let (table, name) = key.split_once('.').unwrap_or(("The server", &key));
    tables.get(table).is_some_and(|names| names.contains(name))
}

#[test]
fn settings_in_files_to_deploy_exist() {
    let tables = settings();
    let mut folders = vec![root().join("admin/deploy")];
    let mut found = 0;
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let text = fs::read_to_string(&path).unwrap();
            let word = |c: char| !c.is_ascii_alphanumeric() && c != '_';
            for name in text.split(word).filter_map(|word| word.strip_prefix("MB_")) {
                found += 1;
                let known = name == "CONFIG" || is_variable_of(&tables, name);
                assert!(known, "{}: there is no setting MB_{name}", path.display());
            }
        }
    }
    assert!(found > 3, "{found}");
}

#[test]
fn the_division_of_memory_is_the_documented_one() {
    let page = Document::read("admin/README.md");
    let settings = |toml: &str| {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        std::io::Write::write_all(&mut file, toml.as_bytes()).unwrap();
        config::load(Some(file.path()), Flags::default())
            .unwrap()
            .config
    };
    let plan = MemoryPlan::of(&settings(""));
    for line in &plan.lines()[1..5] {
        let start = line.split([':']).next().unwrap();
        let start = start.split(" by services").next().unwrap();
        let start = start.split(" the operator").next().unwrap();
        assert!(page.text.contains(&format!("`{start}")), "{start}");
    }
    let tls = settings("[tls]\ncert = \"a\"\nkey = \"b\"");
    let kib = MemoryPlan::of(&tls).per_connection / 1024;
    assert!(page.text.contains(&format!("{kib} KiB with TLS")), "{kib}");
    let reference = Document::read("admin/SETTINGS.md");
    assert!(
        reference.text.contains(&format!("{kib} KiB with TLS")),
        "{kib}"
    );
}

#[test]
fn limits_of_services_are_the_defaults() {
    let reference = Document::read("admin/SETTINGS.md");
    // The settings of services come last, so theirs are found first.
    let row = |name: &str| {
        let start = format!("| `{name}` | ");
        let mut lines = reference.text.lines().rev();
        let row = lines.find_map(|line| line.strip_prefix(&start))?;
        let default = row.strip_prefix('`')?.split('`').next()?;
        Some(default.trim_matches('"').to_owned())
    };
    let plain = |text: &str| text.replace([' ', ','], "");
    let page = Document::read("services/LIMITS.md");
    let mut seen = 0;
    for line in page
        .section("## Limits")
        .iter()
        .filter(|line| line.starts_with("| "))
    {
        let cells: Vec<_> = line.trim_matches(['|', ' ']).split(" | ").collect();
        for name in cells.get(2).map_or(Vec::new(), |cell| spans(cell)) {
            let name = name.rsplit('.').next().unwrap();
            // Only sizes and numbers, and none that stands for no limit.
            let numbers = |default: &String| {
                !default.trim_matches(['0', '.']).is_empty()
                    && default != "1h"
                    && default.starts_with(|c: char| c.is_ascii_digit())
            };
            if let Some(default) = row(name).filter(numbers) {
                assert!(
                    plain(cells[1]).contains(&plain(&default)),
                    "{name} is {default}: {line}"
                );
                seen += 1;
            }
        }
    }
    assert!(seen >= 4, "{seen}");
    let fixed = [
        ("call stack of the machine", format!("{} KiB", STACK / 1024)),
        ("nested calls of services", CALL_DEPTH.to_string()),
        ("elements of all tables", TABLE_ELEMENTS.to_string()),
    ];
    for (what, limit) in fixed {
        let start = format!("| {what} | ");
        let mut lines = page.text.lines();
        let row = lines.find_map(|line| line.strip_prefix(&start));
        let stated = row.and_then(|row| row.split(" | ").next()).map(plain);
        assert_eq!(stated, Some(plain(&limit)), "{what}");
    }
}

/// A server that has everything to show.
fn busy() -> TestServer {
    let server = setup()
        .with_as("services", "granted/counter.wasm", "counter.wasm")
        .set("[services.counter.grants]\nkeyvalue = true")
        .start();
    let mut client = server.connect();
    client.ask("nobody.asks", "{}");
    client.ask("calc.add", r#"{"a":1,"b":2}"#);
    server
}

#[test]
fn routes_are_those_of_the_endpoint() {
    let server = busy();
    let page = Document::read("admin/API.md");
    let mut there = BTreeSet::from(["GET /".to_owned()]);
    for (path, methods) in server.json("/openapi.json")["paths"].as_object().unwrap() {
        there.extend(
            methods
                .as_object()
                .unwrap()
                .keys()
                .map(|method| format!("{} {path}", method.to_uppercase())),
        );
    }
    let section = page.section("## Routes");
    let rows = section
        .iter()
        .filter_map(|line| line.strip_prefix("| ")?.split(" | ").next());
    let documented: BTreeSet<_> = rows
        .filter(|cell| cell.contains('`'))
        .map(|cell| cell.replace('`', ""))
        .collect();
    assert_eq!(documented, there);
    // And wherever else one is named, but for those of the other port.
    for document in for_users() {
        let answered = ["src/http/", "src/websocket/"]
            .iter()
            .any(|dir| document.name.starts_with(dir));
        for span in document.spans() {
            let method = ["GET ", "POST ", "PUT ", "DELETE "]
                .iter()
                .any(|method| span.starts_with(method));
            let of_services = [
                " /call/",
                " /mcp",
                " /openapi.json",
                " /publish/",
                " /services",
                " /healthz",
                " /readyz",
                " /ws",
            ]
            .iter()
            .any(|path| span.contains(path));
            if answered || of_services && span.contains("SERVICE") {
                assert!(
                    !method || of_services,
                    "{}: there is no route {span}",
                    document.name
                );
            } else if method && span.contains(" /") {
                let named = span.split('?').next().unwrap();
                let named = named.replace("NAME", "{name}").replace("ID", "{id}");
                assert!(
                    there.contains(&named),
                    "{}: there is no route {span}",
                    document.name
                );
            }
        }
    }
}

/// The names of the fields of a JSON object.
fn fields(value: &Value) -> BTreeSet<String> {
    value
        .as_object()
        .unwrap_or_else(|| panic!("{value}"))
        .keys()
        .cloned()
        .collect()
}

#[test]
fn fields_are_those_of_the_endpoint() {
    let server = busy();
    let page = Document::read("admin/API.md");
    let _open = server.connect();
    server.until("a connection is listed", |server| {
        server.json("/connections")["connections"]
            .as_array()
            .is_some_and(|rows| !rows.is_empty())
    });
    for (route, list) in [
        ("/connections", "connections"),
        ("/calls/past", "calls"),
        ("/services", "services"),
    ] {
        let shown = server.json(route);
        let documented = page.rows(&format!("## {route}"));
        let mut there = fields(&shown[list][0]);
        // Who asked, and when, need no words.
        for plain in [
            "requestId",
            "parentRequestId",
            "connection",
            "principal",
            "ended",
        ] {
            if !documented.contains(plain) && route == "/calls/past" {
                there.remove(plain);
            }
        }
        assert_eq!(documented, there, "{route}");
    }
    let ready = server.json("/readyz");
    let mut documented: BTreeSet<_> = page.rows("## /readyz");
    documented.insert("status".into());
    let mut there = fields(&ready);
    there.extend(
        fields(&ready["store"])
            .into_iter()
            .map(|name| format!("store.{name}")),
    );
    assert_eq!(documented, there);
}

#[test]
fn metrics_are_those_of_the_endpoint() {
    let server = busy();
    let text = server.get("/metrics").1;
    let types = text
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next());
    let there: BTreeSet<_> = types.map(str::to_owned).collect();
    let page = Document::read("admin/API.md");
    let documented = page.rows("## /metrics").into_iter();
    let documented: BTreeSet<_> = documented
        .map(|name| name.split('{').next().unwrap().to_owned())
        .collect();
    assert_eq!(documented, there);
    for document in for_users() {
        for span in document
            .spans()
            .into_iter()
            .filter(|span| span.starts_with("mb_"))
        {
            let name = span.split(['{', ':', '.', '/']).next().unwrap();
            let of_the_sdk = name == "mb_service" || name == "mb_server";
            assert!(
                of_the_sdk || there.contains(name),
                "{}: there is no metric {span}",
                document.name
            );
        }
    }
}

#[test]
fn codes_are_those_of_the_protocol() {
    let page = Document::read("src/wire/PROTOCOL.md");
    let documented = page.rows("### The codes");
    let there: BTreeSet<_> = Code::ALL
        .iter()
        .map(|code| code.as_str().to_owned())
        .collect();
    assert_eq!(documented, there);
}

#[test]
fn codes_close_as_the_protocol_says() {
    let page = Document::read("src/wire/PROTOCOL.md");
    let mut seen = 0;
    for line in page.section("### The codes") {
        let cells: Vec<_> = line.trim_matches('|').split('|').map(str::trim).collect();
        let [name, .., connection] = &cells[..] else {
            continue;
        };
        let name = name.trim_matches('`');
        let Some(code) = Code::ALL.iter().find(|code| code.as_str() == name) else {
            continue;
        };
        let closes = match *connection {
            "closes" => (true, true),
            "closes if it names no request" => (true, false),
            "stays open" => (false, false),
            other => panic!("{name}: {other}"),
        };
        assert_eq!((code.closes(false), code.closes(true)), closes, "{name}");
        seen += 1;
    }
    assert_eq!(seen, Code::ALL.len());
}

#[test]
fn statuses_are_those_of_http() {
    let page = Document::read("src/http/HTTP.md");
    let mut named = BTreeSet::new();
    for line in page.section("## Responses") {
        let mut cells = line.trim_matches('|').split('|').map(str::trim);
        let Some(Ok(status)) = cells.next().map(str::parse::<u16>) else {
            continue;
        };
        for code in spans(cells.next().unwrap_or_default()) {
            if let Some(code) = Code::ALL.iter().find(|known| known.as_str() == code) {
                assert_eq!(mb_server::http::status_of(Some(*code)), status, "{code:?}");
                named.insert(code.as_str());
            }
        }
    }
    // Nobody is left to read the response that it has been silent for too long.
    named.insert("IDLE_TIMEOUT");
    assert_eq!(named.len(), Code::ALL.len(), "{named:?}");
    assert_eq!(mb_server::http::status_of(None), 422);
}

/// All sources of the server in one text, with literals that go over several
/// lines in one.
fn sources() -> String {
    fn collect(dir: &Path, text: &mut String) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                collect(&path, text);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                *text += &fs::read_to_string(path).unwrap();
            }
        }
    }
    let mut text = String::new();
    collect(&root().join("src"), &mut text);
    let mut parts = text.split("\\\n");
    let first = parts.next().unwrap().to_owned();
    parts.fold(first, |text, part| text + part.trim_start())
}

#[test]
fn lines_of_the_log_in_the_runbook_are_written_somewhere() {
    let page = Document::read("admin/RUNBOOK.md");
    let sources = sources();
    let mut seen = 0;
    let symptoms = page.section("## Symptoms");
    for row in symptoms.iter().filter(|line| line.starts_with("| ")) {
        // Words in backquotes that are neither commands nor settings.
        let quoted = spans(row).into_iter().filter(|span| {
            span.contains(' ')
                && !span.contains(" = ")
                && !["mb-server", "ulimit", "POST"]
                    .iter()
                    .any(|word| span.starts_with(word))
        });
        for line in quoted {
            for part in line
                .split('…')
                .map(str::trim)
                .filter(|part| !part.is_empty())
            {
                assert!(sources.contains(part), "nothing writes {part:?}");
                seen += 1;
            }
        }
    }
    assert!(seen > 15, "{seen}");
}

#[test]
fn the_sdks_have_what_is_documented_of_them() {
    let read = |dir: &str| {
        let mut text = String::new();
        for entry in fs::read_dir(root().join(dir)).unwrap() {
            let path = entry.unwrap().path();
            if path.is_file() {
                text += &fs::read_to_string(path).unwrap();
            }
        }
        text
    };
    let sdks = [
        read("services/sdk/src"),
        read("services/sdk-js"),
        read("services/templates/python"),
    ];
    let page = Document::read("services/CAPABILITIES.md");
    let is_table = |line: &&str| line.starts_with("| ") && line.matches(" | ").count() == 3;
    let mut seen = 0;
    for row in page.prose().filter(is_table) {
        for (cell, sdk) in row.split(" | ").skip(1).zip(&sdks) {
            for span in spans(cell) {
                let name = span.split('(').next().unwrap();
                let name = name.rsplit(['.', ':']).next().unwrap();
                let known = [format!("{name}("), format!("{name} =")]
                    .iter()
                    .any(|form| sdk.contains(form))
                    || sdk.contains(&format!("fn {name}"));
                assert!(known, "{span} is not in its SDK");
                seen += 1;
            }
        }
    }
    assert!(seen > 50, "{seen}");
}
