//! `mb-server dev`: a project that is built, served, and both again after
//! each change.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    io::{self, BufRead as _, IsTerminal as _},
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        mpsc::{self, RecvTimeoutError},
    },
    thread,
    time::{Duration, Instant},
};

use serde_json::json;

use super::{
    Exit, Result, failure,
    live_settings::Applied,
    printable,
    serve::{listen_for_signals, start_log, write_log_in_background},
    serving::{Serving, ServingPlan, compiler},
    usage,
};
use crate::{
    catalog::FileName,
    client::{self, Client},
    config::{self, Config, Flags, Loaded},
    dispatch::{Dispatcher, Handle, Outcome, Reply, Request},
    files::Stamp,
    locks::lock,
    log::Format,
    project::{Built, DEV_STATE, Kind, Project, SETTINGS, build},
    sandbox::CompilerConfig,
    transport::Inherited,
    wire::{Code, ErrorBody, Header, Payload, codes::BUILDING},
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
/// Time that callers should wait before they try again, in milliseconds, while
/// the project is being built; and when that failed.
const RETRY_WHEN_BUILDING_MS: u64 = 500;
const RETRY_WHEN_FAILED_MS: u64 = 10_000;
/// Written by a tool while it builds.
const WRITTEN_BY_TOOLS: [&str; 2] = ["package-lock.json", "Cargo.lock"];
/// Folders that hold no sources.
const NOT_SOURCES: [&str; 5] = ["dist", "node_modules", "target", "__pycache__", "venv"];

/// Build and serve a project, and again after each change
///
/// Shows what the tools say, what the service logs, and failed calls with
/// their backtraces. Enter repeats the last call, Ctrl-C ends. What the
/// service is granted stands in DIR/mb-server.toml, whose relative paths count
/// from DIR; a changed grant holds as soon as the file is saved.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// The project's folder
    #[arg(default_value = ".")]
    dir: PathBuf,
    /// Serve another component beside it, such as one that it calls
    #[arg(long, value_name = "FILE.wasm")]
    with: Vec<PathBuf>,
    /// Port; 0 takes a free one [default: 8081 if it is free]
    #[arg(long)]
    port: Option<u16>,
}

/// What wakes the loop.
enum Event {
    Changed(Changes),
    Repeat,
    End,
}

/// What was saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Changes {
    settings: bool,
    sources: bool,
}

pub(super) fn run(arguments: &Arguments) -> Result {
    let project = Project::find(&arguments.dir).map_err(usage)?;
    let (end, signals) = listen_for_signals().map_err(failure)?;
    let (sender, events) = mpsc::channel();
    // Before the first build: what changes meanwhile is a change.
    let watched = Watched {
        dir: project.dir.clone(),
        with: arguments.with.clone(),
    };
    let seen = watched.look();
    let loaded = settings(&project, arguments.port)?;
    start_log(&loaded.config.log, Format::Text)?;
    write_log_in_background()?;
    prepare(&project.output(Kind::Dev), &arguments.with)?;
    // Good components of earlier runs would be served where a new one is not.
    let _ = std::fs::remove_dir_all(project.dir.join(DEV_STATE).join("components"));
    let state = Arc::new(State::new(&project));
    let serving = {
        let state = Arc::clone(&state);
        let (own, port) = (project.clone(), Some(loaded.config.port));
        let again = Box::new(move || settings(&own, port).map_err(|(_, error)| error));
        // First of all, so that no process inherits these.
        let inherited = Inherited::from_env().map_err(failure)?;
        let plan = ServingPlan {
            compiler: CompilerConfig {
                quick: true,
                ..compiler()
            },
            loaded,
            again,
            // A grant may come with any change.
            always_store: true,
            inherited,
            end,
        };
        Serving::start(plan, |dispatcher| Arc::new(Attended { dispatcher, state }))?
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
    for name in &arguments.with {
        complain!("beside it {}", name.display());
    }

    let wake = sender.clone();
    spawn(move || {
        if signals.recv().is_ok() {
            let _ = wake.send(Event::End);
        }
    })?;
    let wake = sender.clone();
    spawn(move || watch(&watched, seen, &wake))?;
    if io::stdin().is_terminal() {
        complain!("Enter repeats the last call, Ctrl-C ends");
    }
    spawn(move || {
        let mut line = String::new();
        while io::stdin()
            .lock()
            .read_line(&mut line)
            .is_ok_and(|read| read > 0)
            && sender.send(Event::Repeat).is_ok()
        {
            line.clear();
        }
    })?;
    attempt(&project, &state, &serving, address);
    while let Ok(event) = events.recv() {
        match event {
            Event::Changed(Changes { settings, sources }) => {
                if settings {
                    apply(&serving);
                }
                if sources {
                    attempt(&project, &state, &serving, address);
                } else {
                    show(&serving, address);
                }
            }
            Event::Repeat => repeat(&state, address),
            Event::End => break,
        }
    }
    serving.drain();
    Ok(Exit::Success)
}

fn spawn(work: impl FnOnce() + Send + 'static) -> Result<()> {
    let started = thread::Builder::new().spawn(work);
    started
        .map(drop)
        .map_err(|error| failure(format!("the system refuses a thread: {error}")))
}

/// Empties the folder of what an earlier run has left, and puts links to what
/// is served beside the project into it.
fn prepare(services: &Path, with: &[PathBuf]) -> Result<()> {
    std::fs::create_dir_all(services).map_err(failure)?;
    for entry in std::fs::read_dir(services).map_err(failure)? {
        let path = entry.map_err(failure)?.path();
        std::fs::remove_file(path).map_err(failure)?;
    }
    for file in with {
        let wrong =
            |error: &dyn std::fmt::Display| usage(format!("--with {}: {error}", file.display()));
        let target = file.canonicalize().map_err(|error| wrong(&error))?;
        let name = file.file_name().ok_or_else(|| wrong(&"no file"))?;
        let is_component = ["wasm", "cwasm"]
            .map(Some)
            .contains(&file.extension().and_then(OsStr::to_str));
        if !is_component || FileName::parse(file).is_err() {
            return Err(wrong(
                &"a component's file is called NAME.wasm or NAME@VERSION.wasm",
            ));
        }
        std::os::unix::fs::symlink(target, services.join(name)).map_err(|error| wrong(&error))?;
    }
    Ok(())
}

/// Builds, has the server take what came of it, and says how it went.
fn attempt(project: &Project, state: &State, serving: &Serving, address: SocketAddr) {
    match build(project, Kind::Dev, &|line| complain!("mb-server: {line}")) {
        Ok(Built { file, size, took }) => {
            complain!("built in {:.1} s, {} KiB", took.as_secs_f64(), size / 1024);
            if let Some(before) = state.built(&file) {
                // The project has another name now.
                let _ = std::fs::remove_file(before);
            }
            show(serving, address);
        }
        Err(error) => {
            complain!("not built: {error}");
            complain!(
                "{}; save a change to try again",
                if state.failed(&error.to_string()) {
                    "the last successful build stays in service"
                } else {
                    "calls are refused until it is"
                }
            );
        }
    }
}

/// Has the server take the changed settings, and says what came of it.
fn apply(serving: &Serving) {
    match serving.settings.reload() {
        Ok(applied) => {
            let Applied {
                applied, waiting, ..
            } = applied;
            for key in applied {
                complain!("{SETTINGS}: {key} holds now");
            }
            for key in waiting {
                complain!("{SETTINGS}: {key} holds from the next start of mb-server dev on");
            }
        }
        Err(error) => complain!("{SETTINGS}: {error}\nthe settings stay as they were"),
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
                let description = &service.description;
                let flag = if address.port() == 8081 {
                    String::new()
                } else {
                    format!(" --server {address}")
                };
                for action in &description.actions {
                    complain!(
                        "  mb-server call {}.{} '…'{flag}",
                        description.name,
                        action.name
                    );
                }
                complain!("ready: {} {}", description.name, description.version);
            }
        }
    }
}

/// Those of the project's own file, and what suits a developer.
fn settings(project: &Project, port: Option<u16>) -> Result<Loaded> {
    let file = project.dir.join(SETTINGS);
    let text = |path: PathBuf| path.display().to_string();
    let flags = |port: u16| {
        Flags::default()
            .with("services_dir", Some(text(project.output(Kind::Dev))))
            .with("state_dir", Some(text(project.dir.join(DEV_STATE))))
            .with("admin.port", Some(0_u16))
            .with(
                "log",
                Some("info,mb_server::service=trace,mb_server::commands=warn"),
            )
            .with("port", Some(port))
    };
    let free = || std::net::TcpListener::bind(("127.0.0.1", 8081)).is_ok();
    let port = port.unwrap_or_else(|| if free() { 8081 } else { 0 });
    let mut defaults = Config::default();
    for settings in defaults.services.values_mut() {
        settings.expose_traps = true;
    }
    let file = file.is_file().then_some(&*file);
    let mut loaded = config::load_over(defaults, file, flags(port)).map_err(usage)?;
    loaded.config.paths_from(&project.dir);
    Ok(loaded)
}

/// What a change of has something done.
struct Watched {
    dir: PathBuf,
    with: Vec<PathBuf>,
}

impl Watched {
    fn look(&self) -> Sources {
        let mut found = sources(&self.dir);
        for file in &self.with {
            if let Ok(stamp) = Stamp::of(file) {
                found.insert(file.clone(), stamp);
            }
        }
        found
    }

    /// What of it has changed.
    fn changes(&self, before: &Sources, after: &Sources) -> Changes {
        let settings = self.dir.join(SETTINGS);
        let without = |sources: &Sources| -> Sources {
            let mut sources = sources.clone();
            sources.retain(|file, _| *file != settings && !self.with.contains(file));
            sources
        };
        Changes {
            settings: before.get(&settings) != after.get(&settings),
            sources: without(before) != without(after),
        }
    }
}

/// Says when the sources have changed and come to rest.
fn watch(watched: &Watched, mut built: Sources, wake: &mpsc::Sender<Event>) {
    let (_never, pause) = mpsc::channel::<()>();
    let mut before = built.clone();
    while pause.recv_timeout(LOOK_EVERY) == Err(RecvTimeoutError::Timeout) {
        let now = watched.look();
        if now != built && now == before {
            let changes = watched.changes(&built, &now);
            built = now.clone();
            if wake.send(Event::Changed(changes)).is_err() {
                return;
            }
        }
        before = now;
    }
}

/// Files by name.
type Sources = BTreeMap<PathBuf, Stamp>;

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
            } else if metadata.is_file()
                && !hidden
                && !WRITTEN_BY_TOOLS.contains(&&*name)
                && let Ok(stamp) = Stamp::of(&entry.path())
            {
                found.insert(entry.path(), stamp);
            }
        }
    }
    found
}

/// What stands between clients and the project's service.
struct State {
    /// The service; none where the project's manifest does not name it.
    name: Option<String>,
    stage: Mutex<Stage>,
    /// The last call of a client: its body, and whether it is binary.
    last: Mutex<Option<(Vec<u8>, bool)>>,
}

/// How far the project is.
enum Stage {
    /// Being built for the first time.
    Building,
    /// No build has come to an end yet; why.
    Failed(String),
    /// The last successful build.
    Built(PathBuf),
}

impl State {
    fn new(project: &Project) -> Self {
        Self {
            name: project.name().ok(),
            stage: Mutex::new(Stage::Building),
            last: Mutex::default(),
        }
    }

    /// Notes a good build; returns the file of the one before if that is
    /// another.
    fn built(&self, file: &Path) -> Option<PathBuf> {
        match std::mem::replace(&mut *lock(&self.stage), Stage::Built(file.into())) {
            Stage::Built(before) if before != file => Some(before),
            _ => None,
        }
    }

    /// Notes that a build failed; whether there is one from before.
    fn failed(&self, error: &str) -> bool {
        let mut stage = lock(&self.stage);
        if let Stage::Built(_) = &*stage {
            return true;
        }
        *stage = Stage::Failed(error.lines().next().unwrap_or_default().to_owned());
        false
    }

    /// Why a service can't be called, while that is the project's doing.
    fn refusal(&self, service: &str) -> Option<ErrorBody<'static>> {
        if self.name.as_ref().is_some_and(|name| name != service) {
            return None;
        }
        let (message, details) = match &*lock(&self.stage) {
            Stage::Built(_) => return None,
            Stage::Building => (
                format!("service {service} is being built by mb-server dev"),
                json!({"retryAfterMs": RETRY_WHEN_BUILDING_MS, "state": BUILDING}),
            ),
            Stage::Failed(error) => (
                format!(
                    "service {service} could not be built, and what is wrong stands where mb-server dev runs: {error}"
                ),
                json!({"retryAfterMs": RETRY_WHEN_FAILED_MS}),
            ),
        };
        Some(ErrorBody::server(Code::ServiceUnavailable, message).with_details(&details))
    }
}

/// Keeps the last call, and answers what the project can't yet.
struct Attended {
    dispatcher: Dispatcher,
    state: Arc<State>,
}

impl Handle for Attended {
    fn handle<'a>(&self, request: Request<'a>) -> Reply<'a> {
        let own = request.body.starts_with(b"REQUEST:system.");
        if !own && request.body.len() <= MAX_KEPT_CALL {
            *lock(&self.state.last) = Some((request.body.to_vec(), request.binary));
        }
        if let Ok((header, _)) = Header::parse(request.body)
            && !own
            && header.request_id.is_some()
            && let Some(body) = self.state.refusal(header.topic.service())
        {
            let outcome = Outcome::Error(Some(Code::ServiceUnavailable), body);
            return Reply::new(Some(header), outcome);
        }
        self.dispatcher.handle(request)
    }
}

/// Makes the last call once more, as a client.
fn repeat(state: &State, address: SocketAddr) {
    let Some((body, binary)) = lock(&state.last).clone() else {
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
) -> Result<String, String> {
    let client = Client::builder(address.to_string())
        .connect()
        .map_err(|error| error.of_connection(&address.to_string()))?;
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
