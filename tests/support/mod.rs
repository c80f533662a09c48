//! A real server and a raw client, for tests and for load: the client builds
//! its bytes by hand, so that a mistake in the project's own wire code is not
//! repeated on the other side.
#![allow(
    dead_code,
    missing_docs,
    reason = "shared by programs that each use a part"
)]

pub mod admin;
pub mod pki;
pub mod redis;
pub mod wat;

use std::{
    fs,
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc,
    time::Duration,
};

use serde_json::Value;

/// How long a test waits for what must come; long, because machines stall.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// The longest timeout of a request, in milliseconds: for a call that shall run
/// until it is stopped.
pub const HOUR: u64 = 3_600_000;

pub const BINARY: u32 = 2;
pub const MORE: u32 = 4;
pub const KEEPALIVE: [u8; 8] = [0, 0, 0, 0, 0, 0, 0, 1];

/// Where the committed components are, or those that `TEST_COMPONENTS` names:
/// a folder that `services/build --out` has filled.
pub fn component(group: &str, file: &str) -> PathBuf {
    let path = match (std::env::var_os("TEST_COMPONENTS"), group) {
        (Some(dir), group) => Path::new(&dir).join(group).join(file),
        (None, "services") => Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("services/dist")
            .join(file),
        (None, _) => Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/guests/dist")
            .join(file),
    };
    assert!(
        path.is_file(),
        "{} is missing; services/build makes it",
        path.display()
    );
    path
}

/// A server before its start.
pub struct Setup {
    binary: PathBuf,
    pub dir: tempfile::TempDir,
    settings: String,
    services: PathBuf,
    wrapper: Option<String>,
}

/// A running server; killed when dropped.
pub struct TestServer {
    pub child: Child,
    pub wire: SocketAddr,
    pub admin: SocketAddr,
    /// All listeners, in the order in which it names them.
    pub listeners: Vec<SocketAddr>,
    /// What it printed until it was ready.
    pub said: String,
    log: mpsc::Receiver<String>,
    _dir: tempfile::TempDir,
}

impl Setup {
    /// `echo`, `calc` and the hostile guest, defaults but for the ports.
    pub fn new(binary: impl Into<PathBuf>) -> Self {
        Self::empty(binary)
            .with("services", "echo.wasm")
            .with("services", "calc.wasm")
            .with("guests", "hostile.wasm")
    }

    /// No component at all.
    pub fn empty(binary: impl Into<PathBuf>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let services = dir.path().join("services");
        fs::create_dir(&services).unwrap();
        Self {
            binary: binary.into(),
            dir,
            settings: String::new(),
            services,
            wrapper: None,
        }
    }

    /// No component, in a folder that outlives the server.
    pub fn empty_in(binary: impl Into<PathBuf>, services: &Path) -> Self {
        fs::create_dir_all(services).unwrap();
        Self {
            services: services.to_owned(),
            ..Self::empty(binary)
        }
    }

    /// Deploys a component under its own name.
    pub fn with(self, group: &str, file: &str) -> Self {
        self.with_as(group, file, file)
    }

    /// Deploys a component under another name.
    pub fn with_as(self, group: &str, file: &str, name: &str) -> Self {
        fs::copy(component(group, file), self.services().join(name)).unwrap();
        self
    }

    /// Deploys any bytes.
    pub fn with_bytes(self, name: &str, bytes: &[u8]) -> Self {
        fs::write(self.services().join(name), bytes).unwrap();
        self
    }

    /// Adds lines of TOML. Tables come last.
    pub fn set(mut self, toml: &str) -> Self {
        self.settings += toml;
        self.settings.push('\n');
        self
    }

    /// Runs the server in a shell after a command such as `ulimit -v 1`.
    pub fn after(mut self, command: &str) -> Self {
        self.wrapper = Some(command.into());
        self
    }

    pub fn services(&self) -> PathBuf {
        self.services.clone()
    }

    /// The command that starts it.
    pub fn command(&self) -> Command {
        self.command_on(0)
    }

    /// The same on a port of one's own choice.
    pub fn command_on(&self, port: u16) -> Command {
        let file = self.dir.path().join("mb.toml");
        fs::write(&file, &self.settings).unwrap();
        let mut command = match &self.wrapper {
            None => Command::new(&self.binary),
            Some(before) => {
                let mut shell = Command::new("sh");
                shell
                    .arg("-c")
                    .arg(format!("{before}; exec \"$0\" \"$@\""))
                    .arg(&self.binary);
                shell
            }
        };
        command
            .args([
                "serve",
                "--port",
                &port.to_string(),
                "--admin-port",
                "0",
                "--config",
            ])
            .arg(file);
        command.arg("--services").arg(self.services());
        // One cache for all, so that each component is compiled once.
        command.env("MB_LOG_FORMAT", "text");
        // Verified at random, an instance is away when the next call comes, and
        // tests count instances.
        command.env("MB_VERIFY_RESETS", "0");
        command.env("XDG_STATE_HOME", self.dir.path().join("state"));
        command.env(
            "XDG_CACHE_HOME",
            self.binary.parent().unwrap().join("test-cache"),
        );
        command.stdin(Stdio::null());
        command
    }

    /// The same with a listener that outlives it, handed over as systemd does.
    pub fn command_with(mut self, listener: &TcpListener) -> (Self, Command) {
        self.wrapper = Some("export LISTEN_FDS=1 LISTEN_PID=$$; exec 3<&0 </dev/null".into());
        let mut command = self.command_on(listener.local_addr().unwrap().port());
        command.stdin(OwnedFd::from(listener.try_clone().unwrap()));
        (self, command)
    }

    pub fn start(self) -> TestServer {
        let mut command = self.command();
        self.start_with(&mut command)
    }

    pub fn start_with(self, command: &mut Command) -> TestServer {
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (sender, log) = mpsc::channel();
        let errors = BufReader::new(child.stderr.take().unwrap());
        // Goes on reading after the test has lost interest: a full pipe would
        // stop the server.
        std::thread::spawn(move || {
            errors
                .lines()
                .map_while(Result::ok)
                .for_each(|line| drop(sender.send(line)))
        });
        let mut said = String::new();
        let mut out = BufReader::new(child.stdout.take().unwrap());
        while !said.contains("ready in") {
            if out.read_line(&mut said).unwrap() == 0 {
                let status = child.wait().unwrap();
                panic!(
                    "the server ended with {status} before it was ready: {said}{}",
                    log.iter().collect::<String>()
                );
            }
        }
        let address = |start: &str| {
            let line = said
                .lines()
                .find_map(|line| line.trim_start().strip_prefix(start));
            line.unwrap().trim().trim_matches('/').parse().unwrap()
        };
        let named = said
            .lines()
            .filter_map(|line| line.trim_start().strip_prefix("listening"));
        let listeners: Vec<SocketAddr> = named
            .map(|rest| rest.split_whitespace().next().unwrap().parse().unwrap())
            .collect();
        TestServer {
            wire: listeners[0],
            listeners,
            admin: address("admin      http://"),
            child,
            said,
            log,
            _dir: self.dir,
        }
    }
}

impl TestServer {
    pub fn connect(&self) -> RawClient {
        RawClient::connect(self.wire)
    }

    /// Sends a signal by its number.
    pub fn signal(&self, signal: &str) {
        let status = Command::new("kill")
            .arg(format!("-{signal}"))
            .arg(self.child.id().to_string())
            .status();
        assert!(status.unwrap().success());
    }

    /// Memory that it has resident, in bytes.
    pub fn resident(&self) -> u64 {
        let text = fs::read_to_string(format!("/proc/{}/statm", self.child.id())).unwrap();
        let pages: u64 = text.split(' ').nth(1).unwrap().parse().unwrap();
        pages * 4096
    }

    /// Waits for the process to end.
    pub fn wait(&mut self) -> ExitStatus {
        self.child.wait().unwrap()
    }

    /// Waits for a line of the log that holds the text.
    pub fn wait_for_log(&self, text: &str) -> String {
        loop {
            match self.log.recv_timeout(PATIENCE) {
                Ok(line) if line.contains(text) => return line,
                Ok(_) => {}
                Err(error) => panic!("no log line with {text:?}: {error}"),
            }
        }
    }

    /// A page of the admin endpoint: status and body.
    pub fn get(&self, path: &str) -> (u16, String) {
        http(
            self.admin,
            &format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"),
        )
    }

    /// The file of its settings.
    pub fn settings_file(&self) -> PathBuf {
        self._dir.path().join("mb.toml")
    }

    /// The token of its admin endpoint.
    pub fn token(&self) -> String {
        fs::read_to_string(self._dir.path().join("state/mb-server/admin.token"))
            .unwrap()
            .trim()
            .to_owned()
    }

    /// A JSON page of the admin endpoint.
    pub fn json(&self, path: &str) -> Value {
        let (status, body) = self.get(path);
        assert_eq!(status, 200, "{path}: {body}");
        serde_json::from_str(&body).unwrap()
    }

    /// A counter of `/metrics`, by its whole name with labels.
    pub fn metric(&self, name: &str) -> u64 {
        let (_, text) = self.get("/metrics");
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("{name} is not in {text}"))
            .parse()
            .unwrap()
    }

    /// The same, where one that has never counted is not listed.
    pub fn count(&self, name: &str) -> u64 {
        let (_, text) = self.get("/metrics");
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.map_or(0, |count| count.parse().unwrap())
    }

    /// Calls of services so far.
    pub fn calls(&self) -> u64 {
        self.json("/services")["services"]
            .as_array()
            .unwrap()
            .iter()
            .map(|row| row["calls"].as_u64().unwrap())
            .sum()
    }

    /// Asks again until it is so.
    pub fn until(&self, what: &str, holds: impl Fn(&Self) -> bool) {
        let begun = std::time::Instant::now();
        while !holds(self) {
            assert!(begun.elapsed() < PATIENCE, "still not: {what}");
            // The server needs the processors more than its client.
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for TestServer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The most memory that a process has had resident, in bytes.
pub fn most_resident(process: u32) -> usize {
    let text = fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.unwrap().trim().trim_end_matches(" kB");
    1024 * kib.parse::<usize>().unwrap()
}

/// A program that a test starts is not on this machine: the test passes it
/// over, but not where all of them are to be there.
pub fn absent(program: &str, error: &std::io::Error) {
    assert!(
        std::env::var_os("TEST_REQUIRES_TOOLS").is_none(),
        "{program}: {error}"
    );
    println!("{program} is not here, so it was not tried: {error}");
}

/// One raw HTTP exchange: status and body.
pub fn http(address: SocketAddr, request: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    let status = head
        .split(' ')
        .nth(1)
        .and_then(|status| status.parse().ok());
    (
        status.unwrap_or_else(|| panic!("no HTTP answer: {answer:?}")),
        body.to_owned(),
    )
}

/// A frame to the byte.
pub fn frame(flags: u32, body: &[u8]) -> Vec<u8> {
    [
        &u32::try_from(body.len()).unwrap().to_be_bytes(),
        &flags.to_be_bytes(),
        body,
    ]
    .concat()
}

/// What arrived: header line and payload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    pub flags: u32,
    pub line: String,
    pub payload: Vec<u8>,
}

impl Message {
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.payload).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.payload).into_owned()
    }

    /// The code of an ERROR.
    pub fn code(&self) -> String {
        assert!(self.line.starts_with("ERROR:"), "{self:?}");
        self.json()["code"].as_str().unwrap().to_owned()
    }
}

/// What one read gives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Received {
    KeepAlive,
    Message(Message),
    /// The server has ended the stream, in order.
    End,
}

/// Bytes in, bytes out.
pub struct RawClient {
    pub stream: TcpStream,
}

impl RawClient {
    pub fn connect(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_nodelay(true).unwrap();
        Self { stream }
    }

    pub fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    /// Sends a request of version 1.0.0, with time enough on any machine.
    pub fn request(&mut self, topic: &str, id: &str, payload: &str) {
        self.request_within(topic, id, HOUR, payload);
    }

    /// Sends a request with its timeout.
    pub fn request_within(&mut self, topic: &str, id: &str, timeout_ms: u64, payload: &str) {
        self.send(&frame(
            0,
            format!("REQUEST:{topic}:1.0.0:{id}::{timeout_ms}\n{payload}").as_bytes(),
        ));
    }

    /// Asks and takes the answer.
    pub fn ask(&mut self, topic: &str, payload: &str) -> Message {
        self.request(topic, "ask", payload);
        self.message()
    }

    pub fn receive(&mut self) -> Received {
        let mut header = [0; 8];
        let first = loop {
            // A machine that stops and goes on interrupts what has a timeout.
            match self.stream.read(&mut header[..1]) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                first => break first.unwrap(),
            }
        };
        if first == 0 {
            return Received::End;
        }
        self.stream.read_exact(&mut header[1..]).unwrap();
        if header == KEEPALIVE {
            return Received::KeepAlive;
        }
        let [length, flags] =
            [&header[..4], &header[4..]].map(|half| u32::from_be_bytes(half.try_into().unwrap()));
        let mut body = vec![0; length as usize];
        self.stream.read_exact(&mut body).unwrap();
        let end = body
            .iter()
            .position(|&b| b == b'\n')
            .expect("a header line");
        let line = String::from_utf8(body[..end].to_vec()).unwrap();
        Received::Message(Message {
            flags,
            line,
            payload: body[end + 1..].to_vec(),
        })
    }

    /// The next thing must be a message.
    pub fn message(&mut self) -> Message {
        match self.receive() {
            Received::Message(message) => message,
            other => panic!("expected a message, got {other:?}"),
        }
    }

    /// The server must have ended the stream, without a reset.
    pub fn expect_end(&mut self) {
        assert_eq!(self.receive(), Received::End);
    }
}
