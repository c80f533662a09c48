//! `mb-server dev`: a project that is built, served, and both again after
//! each change.

use std::{
    collections::BTreeMap,
    io::{self, BufRead as _, IsTerminal as _},
    net::SocketAddr,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{self, RecvTimeoutError},
    },
    thread,
    time::{Duration, Instant},
};

use super::{
    Exit, Result, failure, printable,
    serve::{listen_for_signals, start_log, write_log_in_background},
    serving::{Plan, Serving, compile_worker},
    usage,
};
use crate::{
    client::{self, Client},
    config::{self, Flags, Loaded},
    dispatch::{Dispatcher, Handle, Reply, Request},
    log::Format,
    project::{Built, DEV_STATE, Kind, OUTPUT, Project, SETTINGS, build},
    transport::Inherited,
    wire::{Header, Payload},
};

/// How often the sources are looked at. Two looks that find the same after a
/// change begin a build.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Files that are looked at, at most.
const MAX_FILES: usize = 10_000;
/// Of a call that is repeated, at most so many bytes are kept.
const MAX_KEPT_CALL: usize = 1024 * 1024;
/// How long a repeated call may take that said nothing of it.
const REPEAT_TIMEOUT: Duration = Duration::from_secs(60);
/// Written by a tool while it builds.
const WRITTEN_BY_TOOLS: [&str; 2] = ["package-lock.json", "Cargo.lock"];
/// Folders that hold no sources.
const NOT_SOURCES: [&str; 5] = ["dist", "node_modules", "target", "__pycache__", "venv"];

/// Build and serve a project, and again after each change
///
/// Shows what the tools say, what the service logs, and failed calls with
/// their backtraces. Enter repeats the last call, Ctrl-C ends. What the
/// service is granted stands in DIR/mb-server.toml.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// The project's folder
    #[arg(default_value = ".")]
    dir: PathBuf,
    /// Port; 0 takes a free one [default: 8081 if it is free]
    #[arg(long)]
    port: Option<u16>,
}

/// What wakes the loop.
enum Event {
    Changed,
    Repeat,
    End,
}

pub(super) fn run(arguments: &Arguments) -> Result {
    let project = Project::find(&arguments.dir).map_err(usage)?;
    let (end, signals) = listen_for_signals().map_err(failure)?;
    let (sender, events) = mpsc::channel();
    // Before the first build: what changes meanwhile is a change.
    let seen = sources(&project.dir);
    let built = attempt(&project);
    std::fs::create_dir_all(project.output()).map_err(failure)?;
    let loaded = settings(&project.dir, arguments.port)?;
    start_log(&loaded.config.log, Format::Text)?;
    write_log_in_background()?;
    let last = Arc::new(Last::default());
    let serving = {
        let last = Arc::clone(&last);
        let (dir, port) = (project.dir.clone(), Some(loaded.config.port));
        let again = Box::new(move || settings(&dir, port).map_err(|(_, error)| error));
        // First of all, so that no process inherits these.
        let inherited = Inherited::from_env().map_err(failure)?;
        let plan = Plan {
            worker: compile_worker(&loaded.config),
            loaded,
            again,
            quick: true,
            inherited,
            end,
        };
        Serving::start(plan, |dispatcher| {
            Arc::new(Remembering { dispatcher, last })
        })?
    };
    let Some((address, _)) = serving.addresses().first().copied() else {
        return Err(failure(
            "mb-server.toml leaves no listener without TLS: dev needs one",
        ));
    };
    complain!(
        "serving {} on {address}, admin {}",
        project.dir.display(),
        serving.admin.join(" ")
    );
    if built {
        show(&serving, address);
    }

    let wake = sender.clone();
    thread::spawn(move || signals.recv().is_ok() && wake.send(Event::End).is_ok());
    let (wake, dir) = (sender.clone(), project.dir.clone());
    thread::spawn(move || watch(&dir, seen, &wake));
    if io::stdin().is_terminal() {
        complain!("Enter repeats the last call, Ctrl-C ends");
    }
    thread::spawn(move || {
        let mut line = String::new();
        while io::stdin()
            .lock()
            .read_line(&mut line)
            .is_ok_and(|read| read > 0)
            && sender.send(Event::Repeat).is_ok()
        {
            line.clear();
        }
    });
    while let Ok(event) = events.recv() {
        match event {
            Event::Changed => {
                if attempt(&project) {
                    show(&serving, address);
                }
            }
            Event::Repeat => repeat(&last, address),
            Event::End => break,
        }
    }
    serving.drain();
    Ok(Exit::Success)
}

/// Builds, and says how it went.
fn attempt(project: &Project) -> bool {
    match build(project, Kind::Dev, &|line| complain!("mb-server: {line}")) {
        Ok(Built {
            file: _,
            size,
            took,
        }) => {
            complain!("built in {:.1} s, {} KiB", took.as_secs_f64(), size / 1024);
            true
        }
        Err(error) => {
            complain!(
                "not built: {error}\nthe last good build goes on; save a change to try again"
            );
            false
        }
    }
}

/// Has the server take the new component, and says what it makes of it.
fn show(serving: &Serving, address: SocketAddr) {
    match serving.catalog.reload() {
        Err(error) => complain!("not served: {error}"),
        Ok(_) => {
            let catalog = serving.catalog.current();
            for failed in catalog.failures() {
                complain!("not served: {}", printable(&failed.error));
            }
            for (_, error) in catalog.outdated() {
                complain!("not served, the one from before is: {}", printable(error));
            }
            for service in catalog.services() {
                let said = &service.description;
                let flag = if address.port() == 8081 {
                    String::new()
                } else {
                    format!(" --server {address}")
                };
                for action in &said.actions {
                    complain!("  mb-server call {}.{} '…'{flag}", said.name, action.name);
                }
                complain!("ready: {} {}", said.name, said.version);
            }
        }
    }
}

/// Those of the project's own file, and what suits a developer.
fn settings(dir: &Path, port: Option<u16>) -> std::result::Result<Loaded, (Exit, String)> {
    let file = dir.join(SETTINGS);
    let state = dir.join(DEV_STATE);
    let text = |path: PathBuf| path.display().to_string();
    let flags = |port: u16| {
        Flags::default()
            .with("services_dir", Some(text(dir.join(OUTPUT))))
            .with("state_dir", Some(text(state.clone())))
            .with("admin.port", Some(0_u16))
            .with(
                "log",
                Some("info,mb_server::service=trace,mb_server::commands=warn"),
            )
            .with("port", Some(port))
    };
    let free = || std::net::TcpListener::bind(("127.0.0.1", 8081)).is_ok();
    let port = port.unwrap_or_else(|| if free() { 8081 } else { 0 });
    let mut loaded = config::load(file.is_file().then_some(&*file), flags(port)).map_err(usage)?;
    for overlay in loaded.config.services.values_mut() {
        overlay.expose_traps.get_or_insert(true);
    }
    Ok(loaded)
}

/// Says when the sources have changed and come to rest.
fn watch(dir: &Path, mut built: Sources, wake: &mpsc::Sender<Event>) {
    let (_never, pause) = mpsc::channel::<()>();
    let mut before = built.clone();
    while pause.recv_timeout(LOOK_EVERY) == Err(RecvTimeoutError::Timeout) {
        let now = sources(dir);
        if now != built && now == before {
            built = now.clone();
            if wake.send(Event::Changed).is_err() {
                return;
            }
        }
        before = now;
    }
}

/// Files by name, with size and the time of their last change, which no tool
/// sets back.
type Sources = BTreeMap<PathBuf, (u64, i64, i64)>;

fn sources(dir: &Path) -> Sources {
    let mut found = Sources::new();
    let mut dirs = vec![dir.to_path_buf()];
    while let Some(dir) = dirs.pop() {
        let Ok(entries) = std::fs::read_dir(dir) else {
            continue;
        };
        for entry in entries.flatten().take(MAX_FILES - found.len()) {
            let name = entry.file_name().to_string_lossy().into_owned();
            let Ok(metadata) = entry.metadata() else {
                continue;
            };
            // Hidden ones are editors' and tools' own, Cargo's settings apart.
            let hidden = name.starts_with('.') && name != ".cargo";
            if metadata.is_dir() && !hidden && !NOT_SOURCES.contains(&&*name) {
                dirs.push(entry.path());
            } else if metadata.is_file() && !hidden && !WRITTEN_BY_TOOLS.contains(&&*name) {
                found.insert(
                    entry.path(),
                    (metadata.len(), metadata.ctime(), metadata.ctime_nsec()),
                );
            }
        }
    }
    found
}

/// The last call of a client.
#[derive(Default)]
struct Last(Mutex<Option<(Vec<u8>, bool)>>);

/// Keeps the last call and passes it on.
struct Remembering {
    dispatcher: Dispatcher,
    last: Arc<Last>,
}

impl Handle for Remembering {
    fn handle<'a>(&self, request: Request<'a>) -> Reply<'a> {
        let own = request.body.starts_with(b"REQUEST:system.");
        if !own && request.body.len() <= MAX_KEPT_CALL {
            *self.last.0.lock().unwrap_or_else(PoisonError::into_inner) =
                Some((request.body.to_vec(), request.binary));
        }
        self.dispatcher.handle(request)
    }
}

/// Makes the last call once more, as a client.
fn repeat(last: &Last, address: SocketAddr) {
    let Some((body, binary)) = last
        .0
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .clone()
    else {
        complain!("nothing was called yet");
        return;
    };
    let Ok((header, payload)) = Header::parse(&body) else {
        return;
    };
    let begun = Instant::now();
    match ask(address, &header, payload, binary) {
        Ok(answer) => {
            complain!(
                "{} in {:.2} ms: {}",
                header.topic.as_str(),
                begun.elapsed().as_secs_f64() * 1e3,
                printable(&answer)
            );
        }
        Err(error) => complain!("{}: {}", header.topic.as_str(), printable(&error)),
    }
}

fn ask(
    address: SocketAddr,
    header: &Header<'_>,
    payload: &[u8],
    binary: bool,
) -> std::result::Result<String, String> {
    let client = Client::builder(address.to_string())
        .connect()
        .map_err(|error| error.to_string())?;
    let text = std::str::from_utf8(payload).unwrap_or_default();
    let payload = if binary {
        Payload::Binary(payload)
    } else {
        Payload::Json(text)
    };
    let mut request = client::Request::new(header.topic, payload);
    request.version = header.version;
    request.timeout = header.timeout.unwrap_or(REPEAT_TIMEOUT);
    match client.call(&request).map_err(|error| error.to_string())? {
        client::Answer::Json(text) => Ok(text),
        client::Answer::Binary(bytes) => Ok(format!("{} bytes", bytes.len())),
    }
}
