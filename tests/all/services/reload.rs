//! Components that come, change, break and go while the server serves.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    thread,
    time::Duration,
};

use mb_server::sandbox::{Ahead, CompileWorker, Cpu};
use serde_json::{Value, json};

use crate::{
    BINARY,
    support::{HOUR, Setup, TestServer, component, http, wat},
};

/// The folder that a running server follows.
struct Folder {
    server: TestServer,
    services: PathBuf,
    token: String,
}

fn start(setup: Setup) -> Folder {
    start_with(setup.set("reload_interval = 50"))
}

fn start_with(setup: Setup) -> Folder {
    let (services, state) = (setup.services(), setup.dir.path().join("state/mb-server"));
    let server = setup.start();
    let token = fs::read_to_string(state.join("admin.token"))
        .unwrap()
        .trim()
        .to_owned();
    Folder {
        server,
        services,
        token,
    }
}

impl Folder {
    fn copy(&self, group: &str, file: &str, name: &str) {
        // As a careful operator does: whole or not at all.
        let part = self.services.join(".part");
        fs::copy(component(group, file), &part).unwrap();
        fs::rename(part, self.services.join(name)).unwrap();
    }

    /// Copies one version of `versions` after another in its place.
    fn upgrade(&self, versions: &[&str]) {
        for version in versions {
            let file = format!("versions@{version}.wasm");
            self.copy("guests", &file, "versions.wasm");
            self.until_row("versions is the new one", |row| row["version"] == *version);
        }
    }

    fn remove(&self, name: &str) {
        fs::remove_file(self.services.join(format!("{name}.wasm"))).unwrap();
        self.server
            .until("it is gone", |_| self.row(name).is_none());
    }

    fn row(&self, name: &str) -> Option<Value> {
        let rows = self.server.json("/services");
        rows["services"]
            .as_array()
            .unwrap()
            .iter()
            .find(|row| row["name"] == name)
            .cloned()
    }

    fn until_row(&self, what: &str, holds: impl Fn(&Value) -> bool) -> Value {
        let name = what.split(' ').next().unwrap();
        self.server
            .until(what, |_| self.row(name).is_some_and(|row| holds(&row)));
        self.row(name).unwrap()
    }

    fn post(&self, path: &str, body: &str) -> (u16, Value) {
        post(
            &self.server,
            path,
            body,
            &format!("Authorization: Bearer {}\r\n", self.token),
        )
    }

    fn asks(&self, topic: &str) -> String {
        self.server.connect().ask(topic, "null").text()
    }
}

fn post(server: &TestServer, path: &str, body: &str, headers: &str) -> (u16, Value) {
    let length = body.len();
    let (status, body) = http(
        server.admin,
        &format!(
            "POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {length}\r\n{headers}\r\n{body}"
        ),
    );
    (status, serde_json::from_str(&body).unwrap_or_default())
}

#[test]
fn files_come_change_and_go() {
    let folder = start(Setup::empty(BINARY).with("services", "calc.wasm"));
    assert_eq!(
        folder.server.connect().ask("echo.say", "1").code(),
        "NO_ROUTE_FOUND"
    );
    folder.copy("services", "echo.wasm", "echo.wasm");
    folder.until_row("echo is there", |row| row["state"] == "loaded");
    assert_eq!(folder.asks("echo.say"), "null");
    folder.copy("guests", "versions@1.0.0.wasm", "versions.wasm");
    folder.until_row("versions is 1.0.0", |row| row["version"] == "1.0.0");
    assert_eq!(folder.asks("versions.which"), "{\"version\":\"1.0.0\"}");
    folder.copy("guests", "versions@1.2.0.wasm", "versions.wasm");
    folder.until_row("versions is 1.2.0", |row| row["version"] == "1.2.0");
    assert_eq!(folder.asks("versions.which"), "{\"version\":\"1.2.0\"}");
    fs::remove_file(folder.services.join("echo.wasm")).unwrap();
    folder
        .server
        .until("echo is gone", |_| folder.row("echo").is_none());
    assert_eq!(
        folder.server.connect().ask("echo.say", "1").code(),
        "NO_ROUTE_FOUND"
    );
    assert_eq!(folder.row("calc").unwrap()["state"], "loaded");
}

#[test]
fn a_folder_that_is_not_there_for_a_moment_removes_nothing() {
    let folder = start(
        Setup::empty(BINARY)
            .with("services", "calc.wasm")
            .with("services", "echo.wasm"),
    );
    let last_error = || folder.server.json("/readyz")["servicesFolderError"].clone();
    assert_eq!(last_error(), Value::Null);
    let away = folder.services.with_extension("away");
    // A mount point without its file system is empty.
    fs::rename(&folder.services, &away).unwrap();
    fs::create_dir(&folder.services).unwrap();
    let empty = "all its files are gone at once";
    folder.server.until("it is doubted", |_| {
        last_error()
            .as_str()
            .is_some_and(|said| said.contains(empty))
    });
    assert_eq!(folder.asks("echo.say"), "null");
    let (status, answer) = folder.post("/services/reload", "");
    assert_eq!((status, folder.asks("echo.say")), (500, "null".into()));
    assert!(answer["error"].as_str().unwrap().contains(empty));
    // Settings of a service would have it reloaded.
    let file = folder.server.settings_file();
    let settings = fs::read_to_string(&file).unwrap();
    fs::write(&file, settings + "\n[services.echo]\nconcurrency = 3\n").unwrap();
    let (status, answer) = folder.post("/config/reload", "");
    assert_eq!(status, 409, "{answer}");
    assert_eq!(folder.asks("echo.say"), "null");
    let line = folder.server.wait_for_log(empty);
    assert!(line.contains("WARN"), "{line}");
    // A network file system that has gone may not even have the folder.
    fs::remove_dir(&folder.services).unwrap();
    folder.server.until("it is missed", |_| {
        let said = last_error();
        said.as_str()
            .is_some_and(|said| said.contains("can't be read"))
    });
    assert_eq!(folder.asks("echo.say"), "null");
    fs::rename(&away, &folder.services).unwrap();
    folder
        .server
        .until("it is back", |_| last_error() == Value::Null);
    assert_eq!(folder.asks("echo.say"), "null");
    let calls = |name| folder.row(name).unwrap()["calls"].as_u64().unwrap();
    assert!(calls("echo") >= 5, "its counts go on");
}

#[test]
fn a_file_that_can_not_be_looked_at_is_served_as_it_was() {
    let folder = start(
        Setup::empty(BINARY)
            .with("services", "calc.wasm")
            .with("services", "echo.wasm"),
    );
    let file = folder.services.join("echo.wasm");
    let link = folder.services.join(".link");
    // ELOOP, in the place of the errors of a disk.
    std::os::unix::fs::symlink("echo.wasm", &link).unwrap();
    fs::rename(&link, &file).unwrap();
    let row = folder.until_row("echo has an error", |row| row["error"].is_string());
    assert_eq!(
        (&row["state"], &row["source"]),
        (&json!("loaded"), &json!("file"))
    );
    assert_eq!(folder.asks("echo.say"), "null");
    let failed = folder.server.json("/readyz")["failedServices"].clone();
    assert_eq!(failed[0]["name"], "echo", "{failed}");
    folder.copy("services", "echo.wasm", "echo.wasm");
    folder.until_row("echo is as it was", |row| row["error"].is_null());
    // A link to what is not there is no file.
    std::os::unix::fs::symlink("nothing", &link).unwrap();
    fs::rename(&link, &file).unwrap();
    folder
        .server
        .until("echo is gone", |_| folder.row("echo").is_none());
}

#[test]
fn calls_in_flight_end_on_the_component_they_began_with() {
    let folder = start(Setup::new(BINARY));
    let mut slow = folder.server.connect();
    slow.request_within("hostile.sleep-spin", "1", HOUR, "{\"ms\":4000}");
    folder.server.until("it runs", |server| {
        server.json("/connections")["connections"][0]["inFlight"] == 1
    });
    fs::remove_file(folder.services.join("hostile.wasm")).unwrap();
    folder
        .server
        .until("hostile is gone", |_| folder.row("hostile").is_none());
    assert!(slow.message().line.starts_with("RESPONSE"));
    assert_eq!(slow.ask("hostile.ok", "").code(), "NO_ROUTE_FOUND");
}

#[test]
fn a_broken_file_keeps_the_old_one_serving_and_a_partial_one_is_waited_for() {
    let folder = start(Setup::new(BINARY));
    let path = folder.services.join("echo.wasm");
    let whole = fs::read(&path).unwrap();
    write(&path, b"garbage");
    let row = folder.until_row("echo is broken", |row| row["error"].is_string());
    assert_eq!(
        (&row["state"], &row["source"]),
        (&json!("loaded"), &json!("file"))
    );
    assert!(
        row["error"].as_str().unwrap().contains("not WebAssembly"),
        "{row}"
    );
    assert!(
        folder
            .server
            .json("/readyz")
            .to_string()
            .contains("not WebAssembly")
    );
    assert_eq!(folder.asks("echo.say"), "null");
    // Half of a file says nothing yet; the other half makes it whole.
    write(&path, &whole[..whole.len() / 2]);
    folder.copy("services", "calc.wasm", "calc2.wasm");
    folder.until_row("calc2 is looked at", |row| row["error"].is_string());
    assert!(
        folder.row("echo").unwrap()["error"]
            .as_str()
            .unwrap()
            .contains("not WebAssembly"),
        "not about the half"
    );
    fs::write(&path, &whole).unwrap();
    folder.until_row("echo is mended", |row| row["error"].is_null());
    assert_eq!(
        folder.row("echo").unwrap()["calls"],
        1,
        "its counters go on"
    );
}

#[test]
fn a_start_with_a_broken_file_serves_the_last_known_good_one() {
    let state = tempfile::tempdir().unwrap();
    let set = format!("state_dir = {:?}", state.path());
    let folder = state.path().join("services");
    let first = Setup::empty_in(BINARY, &folder)
        .with("services", "echo.wasm")
        .set(&set)
        .start();
    assert_eq!(first.connect().ask("echo.say", "1").text(), "1");
    drop(first);
    let again = Setup::empty_in(BINARY, &folder)
        .with_bytes("echo.wasm", b"garbage")
        .set(&set)
        .start();
    assert!(
        again
            .said
            .contains("a good one from before is served instead"),
        "{}",
        again.said
    );
    assert_eq!(again.connect().ask("echo.say", "1").text(), "1");
    let rows = again.json("/services");
    let row = rows["services"]
        .as_array()
        .unwrap()
        .iter()
        .find(|row| row["name"] == "echo")
        .unwrap();
    assert_eq!(
        (&row["state"], &row["source"]),
        (&json!("loaded"), &json!("lastKnownGood"))
    );
}

#[test]
fn the_operator_goes_back_and_the_next_file_lifts_it() {
    let state = tempfile::tempdir().unwrap();
    let set = format!("state_dir = {:?}\nreload_interval = 50", state.path());
    let services = state.path().join("services");
    let setup = Setup::empty_in(BINARY, &services)
        .with_as("guests", "versions@1.0.0.wasm", "versions.wasm")
        .set(&set);
    let folder = Folder {
        server: setup.start(),
        services: services.clone(),
        token: String::new(),
    };
    folder.copy("guests", "versions@1.2.0.wasm", "versions.wasm");
    folder.until_row("versions is 1.2.0", |row| row["version"] == "1.2.0");
    let config = state.path().join("mb.toml");
    fs::write(&config, format!("state_dir = {:?}", state.path())).unwrap();
    let rollback = |folder: &Folder, name: &str| {
        let mut command = std::process::Command::new(BINARY);
        command
            .args([
                "service",
                "rollback",
                name,
                "--admin",
                &folder.server.admin.to_string(),
                "--config",
            ])
            .arg(&config);
        let output = command.output().unwrap();
        (
            output.status.code().unwrap(),
            String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned(),
        )
    };
    let (code, text) = rollback(&folder, "nobody");
    assert!(
        code == 1 && text.contains("no service nobody"),
        "{code} {text}"
    );
    let (code, text) = rollback(&folder, "versions");
    assert!(
        code == 0 && text.contains("versions 1.0.0 is served"),
        "{code} {text}"
    );
    assert_eq!(folder.asks("versions.which"), "{\"version\":\"1.0.0\"}");
    assert_eq!(folder.row("versions").unwrap()["source"], "rolledBack");
    let (code, text) = rollback(&folder, "versions");
    assert!(
        code == 1 && text.contains("no earlier file of versions is kept"),
        "{code} {text}"
    );
    drop(folder);

    let setup = Setup::empty_in(BINARY, &services).set(&set);
    let folder = Folder {
        server: setup.start(),
        services,
        token: String::new(),
    };
    assert_eq!(
        folder.asks("versions.which"),
        "{\"version\":\"1.0.0\"}",
        "over a restart"
    );
    folder.copy("guests", "versions@2.0.0.wasm", "versions.wasm");
    folder.until_row("versions is 2.0.0", |row| {
        row["version"] == "2.0.0" && row["source"] == "file"
    });
}

#[test]
fn a_rollback_is_shown_and_undone() {
    let folder =
        start(Setup::empty(BINARY).with_as("guests", "versions@1.0.0.wasm", "versions.wasm"));
    let undo = |folder: &Folder| folder.post("/services/versions/rollback", "{\"undo\":true}");
    let (status, answer) = undo(&folder);
    assert!(
        status == 409 && answer.to_string().contains("was not rolled back"),
        "{answer}"
    );
    folder.copy("guests", "versions@1.2.0.wasm", "versions.wasm");
    let row = folder.until_row("versions is 1.2.0", |row| row["version"] == "1.2.0");
    let digest = row["digest"].clone();
    assert!(row["rolledBackFrom"].is_null());
    assert_eq!(folder.post("/services/versions/rollback", "").0, 200);
    let row = folder.row("versions").unwrap();
    assert_eq!(
        (&row["version"], &row["rolledBackFrom"]),
        (&json!("1.0.0"), &digest)
    );
    // The same file copied there again is not served, and the report says so.
    fs::remove_file(folder.services.join("versions.wasm")).unwrap();
    folder
        .server
        .until("it is gone", |_| folder.row("versions").is_none());
    folder.copy("guests", "versions@1.2.0.wasm", "versions.wasm");
    folder.until_row("versions is back", |row| {
        row["version"] == "1.0.0" && row["rolledBackFrom"] == digest
    });
    let (status, answer) = undo(&folder);
    assert!(
        status == 200 && answer["done"].as_str().unwrap().contains("1.2.0 is served"),
        "{answer}"
    );
    let row = folder.row("versions").unwrap();
    assert_eq!(
        (&row["version"], &row["source"], &row["rolledBackFrom"]),
        (&json!("1.2.0"), &json!("file"), &Value::Null)
    );
    assert_eq!(folder.asks("versions.which"), "{\"version\":\"1.2.0\"}");
}

#[test]
fn a_rollback_after_another_that_fails_is_reported_as_failed() {
    let folder =
        start(Setup::empty(BINARY).with_as("guests", "versions@1.0.0.wasm", "versions.wasm"));
    folder.upgrade(&["1.2.0", "2.0.0"]);
    assert_eq!(folder.post("/services/versions/rollback", "").0, 200);
    // Of the files that are kept, the first one is damaged.
    fs::write(kept(&folder, "versions@1.0.0.wasm"), "damaged").unwrap();
    let (status, answer) = folder.post("/services/versions/rollback", "");
    assert!(
        status == 409 && answer.to_string().contains("was changed"),
        "{answer}"
    );
    // The rollback before it holds.
    assert_eq!(folder.post("/services/reload", "").0, 200);
    assert_eq!(folder.asks("versions.which"), "{\"version\":\"1.2.0\"}");
    assert!(folder.row("versions").unwrap()["rolledBackFrom"].is_string());
    let (status, answer) = folder.post("/services/versions/rollback", "{\"undo\":true}");
    assert_eq!(status, 200, "{answer}");
    assert_eq!(folder.row("versions").unwrap()["version"], "2.0.0");
}

#[test]
fn what_the_operator_went_back_from_is_not_served_where_the_other_fails_for_a_moment() {
    let setup = Setup::empty(BINARY).with("services", "echo.wasm");
    let folder = start(setup.with_as("guests", "versions@1.0.0.wasm", "versions.wasm"));
    folder.upgrade(&["1.2.0", "2.0.0"]);
    assert_eq!(folder.post("/services/versions/rollback", "").0, 200);
    let earlier = Hidden::new(kept(&folder, "versions@1.0.0.wasm"));
    let hidden = Hidden::new(kept(&folder, "versions@1.2.0.wasm"));
    folder.remove("versions");
    folder.copy("guests", "versions@2.0.0.wasm", "versions.wasm");
    let row = folder.until_row("versions fails", |row| row["state"] == "failed");
    let error = row["error"].as_str().unwrap();
    assert!(
        error.contains("the earlier file") && error.contains("--undo"),
        "{error}"
    );
    // Nor does a further rollback serve it, and it is tried again after that.
    let (status, answer) = folder.post("/services/versions/rollback", "");
    assert!(
        status == 409 && answer.to_string().contains("the earlier file"),
        "{answer}"
    );
    hidden.restore();
    earlier.restore();
    let row = folder.until_row("versions is served", |row| row["version"].is_string());
    assert_eq!(
        (&row["version"], &row["source"]),
        (&json!("1.2.0"), &json!("rolledBack"))
    );
}

#[test]
fn a_last_known_good_file_that_fails_for_a_moment_is_served_later() {
    let setup = Setup::empty(BINARY).with("services", "echo.wasm");
    let folder = start(setup.with_as("guests", "versions@1.0.0.wasm", "versions.wasm"));
    let hidden = Hidden::new(kept(&folder, "versions@1.0.0.wasm"));
    folder.remove("versions");
    fs::write(folder.services.join("versions.wasm"), "broken").unwrap();
    folder.until_row("versions fails", |row| row["state"] == "failed");
    hidden.restore();
    folder.until_row("versions is served", |row| {
        row["source"] == "lastKnownGood" && row["version"] == "1.0.0"
    });
    assert_eq!(folder.asks("versions.which"), "{\"version\":\"1.0.0\"}");
}

#[test]
fn a_damaged_last_known_good_file_is_passed_over_for_an_earlier_one() {
    let setup = Setup::empty(BINARY).with("services", "echo.wasm");
    let folder = start(setup.with_as("guests", "versions@1.0.0.wasm", "versions.wasm"));
    folder.upgrade(&["1.2.0", "2.0.0"]);
    fs::write(kept(&folder, "versions@1.2.0.wasm"), "damaged").unwrap();
    let (status, answer) = folder.post("/services/versions/rollback", "");
    assert_eq!(status, 200, "{answer}");
    assert_eq!(folder.row("versions").unwrap()["version"], "1.0.0");
    folder.post("/services/versions/rollback", "{\"undo\":true}");
    fs::write(kept(&folder, "versions@2.0.0.wasm"), "damaged").unwrap();
    folder.remove("versions");
    fs::write(folder.services.join("versions.wasm"), "broken").unwrap();
    folder.until_row("versions is served", |row| {
        row["source"] == "lastKnownGood" && row["version"] == "1.0.0"
    });
}

#[test]
fn what_could_not_be_kept_is_kept_once_it_is_copied_again() {
    let folder =
        start(Setup::empty(BINARY).with_as("guests", "versions@1.0.0.wasm", "versions.wasm"));
    let file = kept(&folder, "versions@1.0.0.wasm");
    fs::remove_file(&file).unwrap();
    folder.copy("guests", "versions@1.0.0.wasm", "versions.wasm");
    folder.server.until("it is kept", |_| file.exists());
}

/// A file that can't be read for a moment.
struct Hidden {
    file: PathBuf,
    aside: PathBuf,
}

impl Hidden {
    fn new(file: PathBuf) -> Self {
        let aside = file.with_extension("aside");
        fs::rename(&file, &aside).unwrap();
        // A link to itself.
        std::os::unix::fs::symlink(&file, &file).unwrap();
        Self { file, aside }
    }

    fn restore(self) {
        fs::rename(self.aside, self.file).unwrap();
    }
}

/// The last-known-good file with the content of this guest.
fn kept(folder: &Folder, guest: &str) -> PathBuf {
    let content = fs::read(component("guests", guest)).unwrap();
    let mut dirs = vec![folder.server.settings_file().with_file_name("state")];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                dirs.push(path);
            } else if fs::read(&path).unwrap() == content {
                return path;
            }
        }
    }
    panic!("{guest} is not kept");
}

#[test]
fn a_file_of_the_same_size_time_and_inode_is_seen_to_have_changed() {
    // By a POST, where nobody watches, and by the watcher.
    for interval in ["0", "50"] {
        let setup = Setup::empty(BINARY).with("services", "calc.wasm");
        let path = setup.services().join("calc.wasm");
        let time = std::time::SystemTime::UNIX_EPOCH;
        let put = |bytes: &[u8]| {
            fs::write(&path, bytes).unwrap();
            let file = fs::File::options().append(true).open(&path).unwrap();
            file.set_modified(time).unwrap();
        };
        let before = fs::read(&path).unwrap();
        put(&before);
        let state = setup.dir.path().join("state/mb-server");
        let server = setup.set(&format!("reload_interval = {interval}")).start();
        let token = fs::read_to_string(state.join("admin.token")).unwrap();
        let folder = Folder {
            server,
            services: path.parent().unwrap().into(),
            token: token.trim().into(),
        };
        let mut after = before.clone();
        let text = b"b must not be zero";
        let at = after.windows(text.len()).position(|bytes| bytes == text);
        after[at.unwrap() + 2..][..4].copy_from_slice(b"MUST");
        put(&after);
        if interval == "0" {
            let (_, changed) = folder.post("/services/reload", "");
            assert!(changed.to_string().contains("calc 1.0.0"), "{changed}");
            assert_eq!(
                folder.post("/services/reload", ""),
                (200, json!({"changes": []}))
            );
        }
        folder.server.until("the new one answers", |server| {
            let answer = server.connect().ask("calc.divide", "{\"a\":1,\"b\":0}");
            answer.text().contains("b MUST not")
        });
    }
}

#[test]
fn changing_takes_the_token_and_reading_does_not() {
    // Nobody else looks at the folder.
    let folder = start_with(Setup::new(BINARY).set("reload_interval = 0"));
    let bearer = |token: &str| format!("Authorization: Bearer {token}\r\n");
    for path in [
        "/services/reload",
        "/services/echo/rollback",
        "/services/echo/disable",
        "/services/echo/enable",
    ] {
        for headers in [
            String::new(),
            bearer("wrong"),
            bearer(&folder.token[1..]),
            "Authorization: x\r\n".into(),
        ] {
            assert_eq!(
                post(&folder.server, path, "", &headers).0,
                401,
                "{path} {headers}"
            );
        }
        let foreign = format!(
            "POST {path} HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\nContent-Length: 0\r\n{}\r\n",
            bearer(&folder.token)
        );
        assert_eq!(http(folder.server.admin, &foreign).0, 403);
    }
    assert_eq!(folder.post("/healthz", "").0, 405);
    assert_eq!(
        folder.post("/services/echo/disable", "{\"wrong\":1}").0,
        400
    );
    assert_eq!(
        folder
            .post("/services/echo/disable", &" ".repeat(1_100_000))
            .0,
        413
    );
    assert_eq!(folder.post("/services/nobody/disable", "").0, 409);
    assert_eq!(
        folder.post("/services/reload", ""),
        (200, json!({"changes": []}))
    );
    folder.copy("services", "calc.wasm", "other.wasm");
    let (status, changed) = folder.post("/services/reload", "");
    assert!(
        status == 200 && changed.to_string().contains("other.wasm"),
        "{changed}"
    );
}

#[test]
fn services_are_switched_off_and_on() {
    let setup = Setup::new(BINARY)
        .with("guests", "versions@1.0.0.wasm")
        .with("guests", "versions@1.2.0.wasm")
        .with("guests", "versions@2.0.0.wasm")
        .set("[services.versions]\ndisabled = [\"2.0.0\"]");
    let services = setup.services();
    let state = setup.dir.path().join("state/mb-server/admin.token");
    let server = setup.start();
    let token = fs::read_to_string(state).unwrap().trim().to_owned();
    let folder = Folder {
        server,
        services,
        token,
    };
    let mut client = folder.server.connect();
    client.send(&crate::support::frame(
        0,
        b"REQUEST:versions.which:2.0.0:1\nnull",
    ));
    let refused = client.message();
    assert!(
        refused.code() == "SERVICE_UNAVAILABLE" && refused.text().contains("disabled"),
        "{refused:?}"
    );
    assert_eq!(folder.asks("versions.which"), "{\"version\":\"1.2.0\"}");
    assert_eq!(
        folder
            .post("/services/versions/disable", "{\"version\":\"1.2.0\"}")
            .0,
        200
    );
    assert_eq!(folder.asks("versions.which"), "{\"version\":\"1.0.0\"}");
    assert_eq!(folder.post("/services/versions/disable", "").0, 200);
    assert_eq!(
        client.ask("versions.which", "").code(),
        "SERVICE_UNAVAILABLE"
    );
    assert!(
        !client
            .ask("system.services", "")
            .text()
            .contains("versions")
    );
    assert_eq!(folder.post("/services/versions/enable", "").0, 200);
    assert_eq!(folder.asks("versions.which"), "{\"version\":\"1.2.0\"}");
}

#[test]
fn a_twin_that_comes_later_changes_nothing() {
    let folder = start(Setup::new(BINARY));
    folder.copy("services", "echo.wasm", "echo@1.0.0.wasm");
    folder.server.until("the twin is refused", |server| {
        server.json("/readyz").to_string().contains("claimed by")
    });
    assert_eq!(folder.asks("echo.say"), "null");
}

/// 60 mutations of a component dropped into the folder, one after another.
/// The old one answers all the time.
#[test]
fn mutated_files_never_reach_the_callers() {
    let folder = start(Setup::new(BINARY));
    let whole = fs::read(component("services", "echo.wasm")).unwrap();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let (mut client, done) = (folder.server.connect(), &done);
        scope.spawn(move || {
            while !done.load(Relaxed) {
                assert_eq!(client.ask("echo.say", "[1,2]").text(), "[1,2]");
            }
        });
        for (round, mutated) in mutations(&whole, 60).into_iter().enumerate() {
            write(&folder.services.join("echo.wasm"), &mutated);
            let (status, answer) = folder.post("/services/reload", "");
            assert_eq!(status, 200, "{round}: {answer}");
        }
        done.store(true, Relaxed);
    });
}

/// Broken by one changed byte in the code or in the types, or cut off.
fn mutations(whole: &[u8], count: usize) -> Vec<Vec<u8>> {
    let mut seed = 0x2545_f491_4f6c_dd1d_u64;
    let mut random = move |below: usize| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        (seed % below as u64) as usize
    };
    let mutate = |_| {
        let mut bytes = whole.to_vec();
        // The first bytes are structure: what is wrong there never loads.
        bytes[8 + random(60)] ^= 1 << random(8);
        bytes.truncate(bytes.len() - random(40));
        bytes
    };
    (0..count).map(mutate).collect()
}

fn write(path: &Path, bytes: &[u8]) {
    let part = path.with_file_name(".part");
    fs::write(&part, bytes).unwrap();
    fs::rename(part, path).unwrap();
}

#[test]
fn a_component_that_takes_too_much_to_compile_hurts_nobody() {
    // One function so long that it keeps the compiler busy.
    let many = "(global.set $x (i64.add (i64.mul (global.get $x) (global.get $x)) (i64.const 7)))"
        .repeat(60_000);
    let bomb = wat::guest("bomb", "(global $x (mut i64) (i64.const 1))", &many);
    let (soon, later) = (Duration::from_millis(100), Duration::from_secs(600));
    for (memory, time, why) in [
        (64 << 20, later, "more than 67108864 bytes of memory"),
        (1 << 30, soon, "took longer than 100 ms"),
    ] {
        let worker = CompileWorker::start(Path::new(BINARY), memory, time);
        let ahead = Ahead {
            cpu: Cpu::Any,
            on_demand: false,
        };
        let error = worker.precompile(&bomb, ahead).unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
    }
}
