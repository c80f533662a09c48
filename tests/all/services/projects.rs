//! `mb-server dev`, and what callers get until there is a component. The
//! tools of a language are played by scripts, so that none has to be there.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc::{Receiver, channel},
    thread,
    time::{Duration, Instant},
};

use serde_json::json;

use crate::{
    BINARY,
    support::{Setup, component, wat},
};

/// For whatever a server does next.
const PATIENCE: Duration = Duration::from_secs(60);

/// A project in Python whose tool is played by a script: it takes the component
/// that the first line of `app.py` names, or fails where there is none.
struct Played {
    dir: PathBuf,
}

impl Played {
    fn new(parent: &Path, name: &str) -> Self {
        let dir = parent.join(name);
        let project = Self { dir };
        for (file, text) in [
            ("pyproject.toml", format!("[project]\nname = \"{name}\"\n")),
            ("requirements.txt", String::new()),
            (".venv/mb-server-requirements.txt", String::new()),
        ] {
            project.save(file, &text);
        }
        project.program(
            "python",
            r#"echo '{"native":[],"warnings":["app.py is played"]}'"#,
        );
        project.program(
            "componentize-py",
            r#"for out; do :; done; cp "$(sed 's/^# //;q' app.py)" "$out""#,
        );
        project
    }

    fn save(&self, file: &str, text: &str) {
        let file = self.dir.join(file);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, text).unwrap();
    }

    fn program(&self, name: &str, script: &str) {
        let name = format!(".venv/bin/{name}");
        self.save(&name, &format!("#!/bin/sh\n{script}\n"));
        let mode = fs::Permissions::from_mode(0o755);
        fs::set_permissions(self.dir.join(name), mode).unwrap();
    }

    fn takes(&self, component: &Path) {
        self.save("app.py", &format!("# {}\n", component.display()));
    }
}

/// `mb-server dev`, while it runs.
struct Dev {
    process: Child,
    lines: Receiver<String>,
    address: String,
}

impl Dev {
    fn start(project: &Played, more: &[&str]) -> Self {
        let mut process = Command::new(BINARY)
            .arg("dev")
            .arg(&project.dir)
            .args(["--port", "0"])
            .args(more)
            .env("XDG_CACHE_HOME", project.dir.parent().unwrap())
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (sender, lines) = channel();
        let said = BufReader::new(process.stderr.take().unwrap());
        thread::spawn(move || {
            for line in said.lines().map_while(Result::ok) {
                let _ = sender.send(line);
            }
        });
        let mut dev = Self {
            process,
            lines,
            address: String::new(),
        };
        let serving = dev.until("serving ");
        let address = serving.split(" on ").nth(1).unwrap();
        dev.address = address.split(',').next().unwrap().to_owned();
        dev
    }

    /// The next line that holds a text.
    fn until(&self, text: &str) -> String {
        let begun = Instant::now();
        let mut seen = Vec::new();
        while let Some(left) = PATIENCE.checked_sub(begun.elapsed()) {
            match self.lines.recv_timeout(left) {
                Ok(line) if line.contains(text) => return line,
                Ok(line) => seen.push(line),
                Err(_) => break,
            }
        }
        panic!("no {text:?} in {seen:#?}");
    }

    /// What `mb-server call` prints to its two outputs.
    fn call(&self, topic: &str, payload: &str) -> (String, String) {
        let output = Command::new(BINARY)
            .args(["call", topic, payload, "--server", &self.address])
            .output()
            .unwrap();
        (
            String::from_utf8_lossy(&output.stdout).into(),
            String::from_utf8_lossy(&output.stderr).into(),
        )
    }
}

impl Drop for Dev {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

const SUM: (&str, &str) = ("calc.add", r#"{"a":2,"b":40}"#);

#[test]
fn dev_does_not_pass_off_an_old_build_for_one_that_failed() {
    let parent = tempfile::tempdir().unwrap();
    let project = Played::new(parent.path(), "calc");
    let old = component("services", "calc.wasm");
    for file in ["dist/calc.wasm", "dist/other.wasm"] {
        fs::create_dir_all(project.dir.join("dist")).unwrap();
        fs::copy(&old, project.dir.join(file)).unwrap();
    }
    project.takes(Path::new("/nowhere.wasm"));
    let dev = Dev::start(&project, &[]);
    dev.until("calls are refused until it is");
    let (_, error) = dev.call(SUM.0, SUM.1);
    assert!(
        error.contains("SERVICE_UNAVAILABLE: service calc could not be built")
            && error.contains("componentize-py failed"),
        "{error}"
    );
    project.takes(&old);
    dev.until("ready: calc");
    assert_eq!(dev.call(SUM.0, SUM.1).0, "{\"sum\":42}\n");
    project.takes(Path::new("/nowhere.wasm"));
    dev.until("the last successful build stays in service");
    assert_eq!(dev.call(SUM.0, SUM.1).0, "{\"sum\":42}\n");
    for file in ["dist/calc.wasm", "dist/other.wasm"] {
        assert!(project.dir.join(file).is_file(), "{file}");
    }
}

#[test]
fn a_call_waits_for_the_first_build_and_says_so() {
    let parent = tempfile::tempdir().unwrap();
    let project = Played::new(parent.path(), "calc");
    project.takes(&component("services", "calc.wasm"));
    // It takes until the call has said that it waits.
    let go_on = parent.path().join("go-on");
    project.program(
        "python",
        &format!(
            r#"until [ -e '{}' ]; do sleep 0.1; done; echo '{{"native":[],"warnings":["app.py:1 is played"]}}'"#,
            go_on.display()
        ),
    );
    let dev = Dev::start(&project, &[]);
    let mut call = Command::new(BINARY)
        .args(["call", SUM.0, SUM.1, "--server", &dev.address])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = String::new();
    let mut errors = BufReader::new(call.stderr.take().unwrap());
    errors.read_line(&mut said).unwrap();
    fs::write(go_on, "").unwrap();
    assert!(
        said.contains("service calc is being built by mb-server dev; waiting for it"),
        "{said}"
    );
    let done = call.wait_with_output().unwrap();
    assert_eq!(String::from_utf8_lossy(&done.stdout), "{\"sum\":42}\n");
    dev.until("warning: app.py:1 is played");
}

#[test]
fn dev_follows_the_settings_and_serves_others_beside() {
    let parent = tempfile::tempdir().unwrap();
    let project = Played::new(parent.path(), "counter");
    project.takes(&component("services", "granted/counter.wasm"));
    let echo = component("services", "echo.wasm").display().to_string();
    let dev = Dev::start(&project, &["--with", &echo]);
    dev.until("keyvalue = true under [services.counter.grants]");
    assert_eq!(dev.call("echo.say", "[1]").0, "[1]\n");
    project.save(
        "mb-server.toml",
        "[services.counter.grants]\nkeyvalue = true\n",
    );
    dev.until("grants.keyvalue holds now");
    dev.until("ready: counter");
    let add = ("counter.add", r#"{"name":"a","by":2}"#);
    assert_eq!(dev.call(add.0, add.1).0, "{\"value\":2}\n");
    // A secret beside the settings, whatever folder dev was started in.
    project.save("key.txt", "secret");
    project.save(
        "mb-server.toml",
        "[services.counter.grants]\nkeyvalue = true\nsecrets = { key = \"key.txt\" }\n",
    );
    dev.until("grants.secrets.key holds now");
    dev.until("ready: counter");
    project.save("mb-server.toml", "");
    dev.until("not served");
    // It is logged when it is decided, and holds a moment later.
    let begun = Instant::now();
    loop {
        let (_, error) = dev.call(add.0, add.1);
        if error.contains("SERVICE_UNAVAILABLE") {
            break;
        }
        assert!(begun.elapsed() < PATIENCE, "{error}");
    }
    project.save("mb-server.toml", "nonsense");
    dev.until("the settings stay as they were");
}

#[test]
fn with_wants_a_component() {
    let parent = tempfile::tempdir().unwrap();
    let project = Played::new(parent.path(), "calc");
    for (file, part) in [
        ("nowhere.wasm", "No such file"),
        ("/dev/null", "is called NAME.wasm"),
    ] {
        let output = Command::new(BINARY)
            .arg("dev")
            .arg(&project.dir)
            .args(["--port", "0", "--with", file])
            .output()
            .unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{error}");
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn a_service_that_is_being_compiled_is_not_absent() {
    let document = r#"{"name":"large","version":"1.0.0","actions":[{"name":"run"}]}"#;
    let code: String = (0..6000)
        .map(|_| {
            let steps =
                "(local.set 0 (i32.mul (i32.add (local.get 0) (i32.const 7)) (local.get 0)))"
                    .repeat(20);
            format!("(func (param i32) (result i32) {steps} (local.get 0))")
        })
        .collect();
    let large = wat::guest_that_says(document, &code, "");
    let setup = Setup::empty(BINARY);
    let services = setup.services();
    let server = setup.start();
    let mut client = server.connect();
    assert_eq!(client.ask("large.run", "null").code(), "NO_ROUTE_FOUND");
    fs::write(services.join(".large"), large).unwrap();
    fs::rename(services.join(".large"), services.join("large.wasm")).unwrap();
    let (mut reported, begun) = (0, Instant::now());
    loop {
        let answer = client.ask("large.run", "null");
        match answer.text() {
            text if text == "null" => break,
            text if text.contains("NO_ROUTE_FOUND") => {
                assert_eq!(reported, 0, "absent again before it was served");
            }
            _ => {
                let answer = answer.json();
                assert_eq!(answer["code"], "SERVICE_UNAVAILABLE", "{answer}");
                assert_eq!(answer["message"], "service large is being compiled");
                assert_eq!(
                    answer["details"],
                    json!({"retryAfterMs": 500, "state": "compiling"})
                );
                assert_eq!(client.ask("larger.run", "null").code(), "NO_ROUTE_FOUND");
                reported += 1;
            }
        }
        assert!(begun.elapsed() < PATIENCE, "not served");
        thread::sleep(Duration::from_millis(20));
    }
    assert!(reported > 0, "compiled too quickly to be seen");
}
