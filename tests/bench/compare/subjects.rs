//! What is compared: how each is started, spoken to and ended.

use std::{
    fs,
    net::{SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use mb_server::{
    load::{Frames, Http},
    wire::{Payload, Topic, Version},
};

use super::protocols::Any;

/// Programs of this run, ended when dropped.
pub struct Subject {
    pub name: &'static str,
    pub address: SocketAddr,
    children: Vec<Child>,
    how: How,
}

#[derive(Clone, Copy, PartialEq)]
enum How {
    Frames(&'static str),
    Redis,
    Nats,
    Http(&'static str),
}

impl Drop for Subject {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Subject {
    /// What is said to it over one connection.
    pub fn protocol(&self, payload: &str, depth: usize, connection: usize) -> Any {
        match self.how {
            How::Frames(topic) => {
                let topic = Topic::parse(topic).expect("a topic");
                Any::Frames(Frames::new(
                    topic,
                    Version::new(1, 0, 0),
                    Payload::Json(payload),
                    depth,
                ))
            }
            How::Redis => Any::redis(payload.as_bytes()),
            How::Nats => Any::Nats {
                payload: payload.as_bytes().to_vec(),
                connection,
                greeted: false,
            },
            How::Http(path) => Any::Http(Http::post("x", path, None, Payload::Json(payload))),
        }
    }

    pub fn answers_in_turn(&self) -> bool {
        matches!(self.how, How::Redis | How::Http(_))
    }

    pub fn pipelines(&self) -> bool {
        !matches!(self.how, How::Http(_))
    }

    /// Time of the processor that its processes have used, in microseconds.
    pub fn cpu_micros(&self) -> u64 {
        let ticks = |child: &Child| -> Option<u64> {
            let stat = fs::read_to_string(format!("/proc/{}/stat", child.id())).ok()?;
            let fields: Vec<_> = stat.rsplit(')').next()?.split_whitespace().collect();
            Some(fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?)
        };
        self.children.iter().filter_map(ticks).sum::<u64>() * 10_000
    }

    /// Memory that its processes hold, in KiB.
    pub fn resident_kib(&self) -> u64 {
        let resident = |child: &Child| -> Option<u64> {
            let status = fs::read_to_string(format!("/proc/{}/status", child.id())).ok()?;
            status.lines().find_map(|line| {
                line.strip_prefix("VmRSS:")?
                    .trim()
                    .strip_suffix(" kB")?
                    .trim()
                    .parse()
                    .ok()
            })
        };
        self.children.iter().filter_map(resident).sum()
    }
}

/// Starts programs, all on the same policy.
pub struct Starter {
    pub dir: PathBuf,
    /// Ours.
    pub server: PathBuf,
    /// Put before every program, as `taskset -c 0`.
    pub before: Vec<String>,
}

/// Either runs, or why not.
pub type Started = Result<Subject, String>;
/// Starts one.
pub type Start<'a> = Box<dyn Fn() -> Started + 'a>;

impl Starter {
    /// All that can be compared, by name.
    pub fn all(&self) -> Vec<(&'static str, Start<'_>)> {
        let ours = |name, service: &'static str, topic, settings: &'static str| {
            let how = How::Frames(topic);
            (
                name,
                Box::new(move || self.ours(name, service, how, settings)) as Start<'_>,
            )
        };
        let http = How::Http("/call/wrap.wrap");
        vec![
            ("echo", Box::new(|| self.stand_in("echo", "--serve-echo"))),
            (
                "native",
                Box::new(|| self.stand_in("native", "--serve-native")),
            ),
            ours("shared", "wrap", "wrap.wrap", "isolation = \"shared\""),
            ours("request", "wrap", "wrap.wrap", ""),
            ours("request-plain", "wrap_plain", "wrap-plain.wrap", ""),
            (
                "request-http",
                Box::new(move || self.ours("request-http", "wrap", http, "")),
            ),
            ("redis", Box::new(|| self.redis())),
            ("nats", Box::new(|| self.nats())),
            ("nginx", Box::new(|| self.nginx())),
            ("wasmtime", Box::new(|| self.wasmtime())),
        ]
    }

    fn run(&self, program: &Path, arguments: &[String]) -> Result<Child, String> {
        let mut words = self.before.clone();
        words.push(program.display().to_string());
        words.extend_from_slice(arguments);
        let log = fs::File::create(self.dir.join("log")).map_err(|error| error.to_string())?;
        Command::new(&words[0])
            .args(&words[1..])
            .current_dir(&self.dir)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .map_err(|error| format!("{}: {error}", words.join(" ")))
    }

    fn start(
        &self,
        name: &'static str,
        how: How,
        port: u16,
        programs: &[(PathBuf, Vec<String>)],
    ) -> Started {
        let mut subject = Subject {
            name,
            address: ([127, 0, 0, 1], port).into(),
            children: Vec::new(),
            how,
        };
        for (program, arguments) in programs {
            subject.children.push(self.run(program, arguments)?);
            let deadline = Instant::now() + Duration::from_secs(20);
            while TcpStream::connect(subject.address).is_err() {
                let ended = subject
                    .children
                    .iter_mut()
                    .any(|child| child.try_wait().is_ok_and(|ended| ended.is_some()));
                if ended || Instant::now() > deadline {
                    let log = fs::read_to_string(self.dir.join("log")).unwrap_or_default();
                    return Err(format!("{} does not listen: {log}", program.display()));
                }
                thread::sleep(Duration::from_millis(20));
            }
        }
        // A service behind a broker is there a moment after its broker.
        thread::sleep(Duration::from_millis(300));
        Ok(subject)
    }

    fn stand_in(&self, name: &'static str, role: &str) -> Started {
        let port = free_port();
        let own = std::env::current_exe().map_err(|error| error.to_string())?;
        self.start(
            name,
            How::Frames("wrap.wrap"),
            port,
            &[(own, vec!["compare".into(), role.into(), port.to_string()])],
        )
    }

    fn ours(&self, name: &'static str, service: &str, how: How, settings: &str) -> Started {
        if !self.server.exists() {
            return Err("cargo build --release builds mb-server".into());
        }
        let dir = self.dir.join(name);
        fs::create_dir_all(dir.join("services")).map_err(|error| error.to_string())?;
        let guest = guest(service)?;
        let named = match how {
            How::Frames(topic) => topic.split('.').next().unwrap_or_default(),
            _ => service,
        };
        fs::copy(guest, dir.join(format!("services/{named}.wasm")))
            .map_err(|error| error.to_string())?;
        let config = dir.join("mb.toml");
        fs::write(&config, format!("[services.{named}]\n{settings}\n"))
            .map_err(|error| error.to_string())?;
        let port = free_port();
        let arguments = [
            "serve",
            "--services",
            &dir.join("services").display().to_string(),
            "--config",
        ]
        .into_iter()
        .map(str::to_owned)
        .chain([
            config.display().to_string(),
            "--port".into(),
            port.to_string(),
        ])
        .chain(["--admin-port".into(), "0".into()])
        .collect();
        self.start(name, how, port, &[(self.server.clone(), arguments)])
    }

    fn redis(&self) -> Started {
        const LIBRARY: &str = "#!lua name=wrap\nredis.register_function('wrap', function(keys, args)\n  \
            local value = cjson.decode(args[1])\n  local state = 1\n  \
            for turn = 1, (value.spin or 0) do state = (state * 1664525 + 1013904223) % 4294967296 end\n  \
            return cjson.encode({ok = true, echo = value})\nend)\n";
        let port = free_port();
        let arguments = [
            "--port",
            &port.to_string(),
            "--bind",
            "127.0.0.1",
            "--save",
            "",
            "--appendonly",
            "no",
        ];
        let arguments = arguments.map(str::to_owned).to_vec();
        let subject = self.start(
            "redis",
            How::Redis,
            port,
            &[(find("redis-server", "redis-server")?, arguments)],
        )?;
        let mut client = Command::new(find("redis-cli", "redis-tools")?);
        let loaded = client
            .args(["-p", &port.to_string(), "FUNCTION", "LOAD", LIBRARY])
            .output();
        let loaded = loaded.map_err(|error| error.to_string())?;
        if String::from_utf8_lossy(&loaded.stdout).trim() == "wrap" {
            Ok(subject)
        } else {
            Err(String::from_utf8_lossy(&loaded.stdout).into_owned())
        }
    }

    fn nats(&self) -> Started {
        let port = free_port();
        let service =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/bench/compare/nats_service.mjs");
        let broker = ["-a", "127.0.0.1", "-p", &port.to_string()]
            .map(str::to_owned)
            .to_vec();
        let programs = [
            (find("nats-server", "nats-server")?, broker),
            (
                find("node", "nodejs")?,
                vec![service.display().to_string(), port.to_string()],
            ),
        ];
        self.start("nats", How::Nats, port, &programs)
    }

    fn nginx(&self) -> Started {
        let port = free_port();
        let config = format!(
            "daemon off; pid nginx.pid; worker_processes 1; error_log stderr crit; events {{ worker_connections 1024; }}\n\
             http {{ access_log off; keepalive_requests 1000000000;\n\
             server {{ listen 127.0.0.1:{port}; location / {{ return 200 '{{\"ok\":true,\"echo\":{{}}}}'; }} }} }}\n"
        );
        fs::write(self.dir.join("nginx.conf"), config).map_err(|error| error.to_string())?;
        let dir = self.dir.display().to_string();
        let arguments = ["-p", &dir, "-c", "nginx.conf", "-g", "master_process off;"]
            .map(str::to_owned)
            .to_vec();
        self.start(
            "nginx",
            How::Http("/"),
            port,
            &[(find("nginx", "nginx-light")?, arguments)],
        )
    }

    fn wasmtime(&self) -> Started {
        let program = match std::env::var_os("WASMTIME") {
            Some(path) => path.into(),
            None => find(
                "wasmtime",
                "wasmtime-cli of crates.io, or name it in WASMTIME",
            )?,
        };
        let module = fs::read(guest("wrap_http")?).map_err(|error| error.to_string())?;
        let component = wit_component::ComponentEncoder::default()
            .validate(true)
            .module(&module)
            .and_then(|mut encoder| encoder.encode())
            .map_err(|error| format!("{error:#}"))?;
        let file = self.dir.join("http.wasm");
        fs::write(&file, component).map_err(|error| error.to_string())?;
        let port = free_port();
        let arguments = [
            "serve",
            "--addr",
            &format!("127.0.0.1:{port}"),
            "-S",
            "cli",
            &file.display().to_string(),
        ];
        self.start(
            "wasmtime",
            How::Http("/"),
            port,
            &[(program, arguments.map(str::to_owned).to_vec())],
        )
    }
}

/// A component that is only measured.
fn guest(name: &str) -> Result<PathBuf, String> {
    let built = format!("tests/bench/guests/target/wasm32-unknown-unknown/release/{name}.wasm");
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(built);
    if file.exists() {
        Ok(file)
    } else {
        Err("tests/bench/guests/build builds its component".into())
    }
}

fn find(program: &str, package: &str) -> Result<PathBuf, String> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into()])
        .map(|dir| dir.join(program))
        .find(|file| file.is_file())
        .ok_or_else(|| format!("no {program} here; install {package}"))
}

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("it is bound").port()
}
