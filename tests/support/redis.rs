//! Engines for durable values: `redis-server`, alone or as a cluster of three
//! primaries, each in a folder of its own and ended when dropped.

use std::{
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    net::{TcpListener, TcpStream},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use super::{PATIENCE, absent};

/// One process.
pub struct Redis {
    child: Child,
    dir: tempfile::TempDir,
    pub port: u16,
    options: Vec<String>,
}

impl Redis {
    /// Starts one that keeps what it acknowledges (`appendfsync always`); none
    /// where the program is not here. `{port}` in an option is its port.
    pub fn start(options: &[&str]) -> Option<Self> {
        let durable = ["--appendonly", "yes", "--appendfsync", "always"];
        let options: Vec<_> = durable.iter().chain(options).map(|&s| s.into()).collect();
        // Another process may take the port before it does.
        for _ in 0..20 {
            let (dir, port) = (tempfile::tempdir().unwrap(), free_port());
            match launch("redis-server", dir.path(), port, &options) {
                Ok(Some(child)) => {
                    return Some(Self {
                        child,
                        dir,
                        port,
                        options,
                    });
                }
                Ok(None) => {}
                Err(error) => {
                    absent("redis-server", &error);
                    return None;
                }
            }
        }
        panic!("redis-server does not start");
    }

    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    /// Ends it as a crash does.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Starts it again, with what it has on the disk.
    pub fn start_again(&mut self) {
        let begun = Instant::now();
        loop {
            match launch("redis-server", self.dir.path(), self.port, &self.options).unwrap() {
                Some(child) => break self.child = child,
                None => assert!(begun.elapsed() < PATIENCE, "its port is taken"),
            }
        }
    }

    /// Sends it a signal by its name.
    pub fn signal(&self, signal: &str) {
        let id = self.child.id().to_string();
        let status = Command::new("kill")
            .arg(format!("-{signal}"))
            .arg(id)
            .status();
        assert!(status.unwrap().success());
    }

    /// What it answers: a line, or a text.
    pub fn ask(&self, command: &[&str]) -> String {
        ask(self.port, command).unwrap()
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Three primaries that share the slots.
pub fn cluster() -> Option<Vec<Redis>> {
    let mut buses = Vec::new();
    let nodes: Option<Vec<_>> = (0..3)
        .map(|_| {
            let bus = free_port().to_string();
            let node = Redis::start(&["--cluster-enabled", "yes", "--cluster-port", &bus]);
            buses.push(bus);
            node
        })
        .collect();
    let nodes = nodes?;
    for (at, (slots, node)) in ["0 5460", "5461 10922", "10923 16383"]
        .iter()
        .zip(&nodes)
        .enumerate()
    {
        let (first, last) = slots.split_once(' ').unwrap();
        node.ask(&["CLUSTER", "SET-CONFIG-EPOCH", &(at + 1).to_string()]);
        assert_eq!(node.ask(&["CLUSTER", "ADDSLOTSRANGE", first, last]), "+OK");
        let (port, bus) = (node.port.to_string(), &buses[at]);
        let met = nodes[0].ask(&["CLUSTER", "MEET", "127.0.0.1", &port, bus]);
        assert_eq!(met, "+OK");
    }
    let begun = Instant::now();
    let knows_all = |node: &Redis| {
        let info = node.ask(&["CLUSTER", "INFO"]);
        info.contains("cluster_state:ok") && info.contains("cluster_known_nodes:3")
    };
    while !nodes.iter().all(knows_all) {
        assert!(begun.elapsed() < PATIENCE, "no cluster yet");
        thread::sleep(Duration::from_millis(5));
    }
    Some(nodes)
}

/// Starts a program of the family and waits until it takes connections; none
/// where it ends before.
pub fn launch(
    program: &str,
    dir: &std::path::Path,
    port: u16,
    options: &[String],
) -> io::Result<Option<Child>> {
    let mut child = Command::new(program)
        .args([
            "--port",
            &port.to_string(),
            "--bind",
            "127.0.0.1",
            "--save",
            "",
            "--dir",
        ])
        .arg(dir)
        .args(
            options
                .iter()
                .map(|option| option.replace("{port}", &port.to_string())),
        )
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let ready =
        lines.any(|line| line.is_ok_and(|line| line.contains("eady to accept connections")));
    if !ready {
        child.wait()?;
        return Ok(None);
    }
    // Goes on reading: a full pipe would stop it.
    thread::spawn(move || lines.for_each(drop));
    Ok(Some(child))
}

pub fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

/// Asks whatever listens on a port.
pub fn ask(port: u16, command: &[&str]) -> io::Result<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut bytes = format!("*{}\r\n", command.len());
    for part in command {
        bytes += &format!("${}\r\n{part}\r\n", part.len());
    }
    stream.write_all(bytes.as_bytes())?;
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let line = line.trim_end();
    match line.strip_prefix('$').and_then(|size| size.parse().ok()) {
        None => Ok(line.into()),
        Some(size) => {
            let mut text = vec![0; size];
            reader.read_exact(&mut text)?;
            Ok(String::from_utf8_lossy(&text).into())
        }
    }
}
