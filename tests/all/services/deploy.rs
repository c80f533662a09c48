//! Components that are deployed over the admin endpoint, to one server and to
//! several.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::atomic::{AtomicBool, Ordering::SeqCst},
    thread,
};

use serde_json::{Value, json};

use crate::{
    BINARY,
    support::{PATIENCE, RawClient, Setup, TestServer, component, http, wat},
};

/// Servers that take the same token, and a folder for what is deployed.
struct Fleet {
    servers: Vec<TestServer>,
    folders: Vec<PathBuf>,
    dir: tempfile::TempDir,
}

const TOKEN: &str = "a token for these tests";

impl Fleet {
    /// Each serves `versions` 1.0.0; the settings are those of the last one.
    fn start(count: usize, settings_of_last: &str) -> Self {
        Self::start_with(count, settings_of_last, |setup| {
            setup.with_as("guests", "versions@1.0.0.wasm", "versions.wasm")
        })
    }

    fn start_with(count: usize, of_last: &str, furnish: impl Fn(Setup) -> Setup) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let token = dir.path().join("deploy.token");
        fs::write(&token, TOKEN).unwrap();
        let (mut servers, mut folders) = (Vec::new(), Vec::new());
        for number in 0..count {
            let own = if number + 1 == count { of_last } else { "" };
            let setup = furnish(Setup::empty(BINARY)).set(&format!(
                "[admin]\ndeploy = true\ndeploy_token = {token:?}\n{own}"
            ));
            folders.push(setup.services());
            servers.push(setup.start());
        }
        Self {
            servers,
            folders,
            dir,
        }
    }

    /// A file to deploy.
    fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let file = self.dir.path().join(name);
        fs::write(&file, bytes).unwrap();
        file
    }

    fn guest(&self, name: &str, as_file: &str) -> PathBuf {
        self.file(as_file, &fs::read(component("guests", name)).unwrap())
    }

    /// `mb-server service ACTION …` for all of them: code and text.
    fn service(&self, arguments: &[&str]) -> (i32, String) {
        self.run("service", arguments)
    }

    fn deploy(&self, file: &Path, flags: &[&str]) -> (i32, String) {
        let file = file.display().to_string();
        self.service(&[&["deploy", &file], flags].concat())
    }

    fn run(&self, command: &str, arguments: &[&str]) -> (i32, String) {
        said(self.command(command, arguments).output().unwrap())
    }

    fn command(&self, command: &str, arguments: &[&str]) -> Command {
        let mut mb_server = Command::new(BINARY);
        mb_server.arg(command).args(arguments);
        for server in &self.servers {
            mb_server.args(["--admin", &server.admin.to_string()]);
        }
        if command == "service" {
            mb_server
                .arg("--token-file")
                .arg(self.dir.path().join("deploy.token"));
        }
        mb_server
    }

    /// Begins to deploy it under a watch.
    fn begin_watch(&self, file: &Path) -> Child {
        let file = file.display().to_string();
        let mut deploy = self.command("service", &["deploy", &file, "--watch", "1h"]);
        let deploy = deploy.stdout(Stdio::piped()).stderr(Stdio::piped());
        deploy.spawn().unwrap()
    }

    /// Deploys it under a watch, does this once it is served, and returns how
    /// the watch ends.
    fn watch(&self, file: &Path, meanwhile: impl FnOnce(&TestServer, &Child)) -> (i32, String) {
        let deploy = self.begin_watch(file);
        let second = &self.servers[1];
        second.until("it is deployed", |_| self.versions() == ["1.2.0"; 2]);
        meanwhile(second, &deploy);
        said(deploy.wait_with_output().unwrap())
    }

    fn versions(&self) -> Vec<String> {
        self.servers.iter().map(version).collect()
    }

    /// Nothing but this is left in the services folders.
    fn holds_only(&self, names: &[&str]) {
        for folder in &self.folders {
            let mut found: Vec<_> = fs::read_dir(folder)
                .unwrap()
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .collect();
            found.sort();
            assert_eq!(found, names);
        }
    }
}

/// Exit code and text of a command.
fn said(output: Output) -> (i32, String) {
    let text = [output.stdout, output.stderr].concat();
    (
        output.status.code().unwrap(),
        String::from_utf8(text).unwrap(),
    )
}

/// What `versions` says of itself.
fn version(server: &TestServer) -> String {
    let answer = server.connect().ask("versions.which", "null").json();
    answer["version"].as_str().unwrap_or("none").to_owned()
}

/// A service called `job` with this version and these actions.
fn job(version: &str, actions: &[&str], body: &str) -> Vec<u8> {
    let actions: Vec<_> = actions
        .iter()
        .map(|name| json!({"name": name, "description": "d"}))
        .collect();
    let describe =
        json!({"name": "job", "version": version, "description": "d", "actions": actions});
    wat::guest_that_says(&describe.to_string(), "", body)
}

/// A request with a token: status and answer.
fn request(
    server: &TestServer,
    head: &str,
    token: Option<&str>,
    length: usize,
    body: &[u8],
) -> (u16, Value) {
    let bearer = token.map_or_else(String::new, |token| {
        format!("Authorization: Bearer {token}\r\n")
    });
    let mut stream = TcpStream::connect(server.admin).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    write!(
        stream,
        "{head} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {length}\r\n{bearer}\r\n"
    )
    .unwrap();
    // A server that refuses it before may not read it.
    let _ = stream.write_all(body);
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let status = answer.split(' ').nth(1).unwrap().parse().unwrap();
    let body = answer.split_once("\r\n\r\n").unwrap().1;
    (status, serde_json::from_str(body).unwrap())
}

fn put(server: &TestServer, path: &str, token: Option<&str>, body: &[u8]) -> (u16, Value) {
    request(server, &format!("PUT {path}"), token, body.len(), body)
}

fn post(server: &TestServer, path: &str, body: &Value) -> (u16, Value) {
    let body = body.to_string();
    let head = format!("POST {path}");
    request(server, &head, Some(TOKEN), body.len(), body.as_bytes())
}

#[test]
fn all_servers_serve_it_as_if_it_had_been_copied() {
    let fleet = Fleet::start(3, "");
    let file = fleet.guest("versions@1.2.0.wasm", "versions.wasm");
    let (code, text) = fleet.deploy(&file, &[]);
    assert_eq!(code, 0, "{text}");
    assert_eq!(
        text.matches("can take versions 1.2.0 in the place of 1.0.0")
            .count(),
        3,
        "{text}"
    );
    assert_eq!(
        text.matches("versions 1.2.0 is served").count(),
        3,
        "{text}"
    );
    assert_eq!(fleet.versions(), ["1.2.0"; 3]);
    for folder in &fleet.folders {
        let bytes = fs::read(folder.join("versions.wasm")).unwrap();
        assert_eq!(bytes, fs::read(&file).unwrap());
    }
    fleet.holds_only(&["versions.wasm"]);
    let (code, text) = fleet.deploy(&file, &[]);
    assert_eq!(code, 0, "{text}");
    assert_eq!(
        text.matches("serves this versions 1.2.0 already").count(),
        3
    );
    let trail = fleet.servers[0].json("/log?target=audit").to_string();
    assert!(
        trail.contains("/services/versions?force=false&check=false") && trail.contains("1.2.0"),
        "{trail}"
    );
    // The present rollback knows the file from before, also with this token.
    let (code, text) = fleet.service(&["rollback", "versions"]);
    assert_eq!(
        (code, fleet.versions()),
        (0, vec!["1.0.0".into(); 3]),
        "{text}"
    );
    let (code, text) = fleet.deploy(&file, &[]);
    assert!(
        code == 1 && text.contains("service rollback versions --undo"),
        "{code} {text}"
    );
    let (code, text) = fleet.service(&["rollback", "versions", "--undo"]);
    assert_eq!(
        (code, fleet.versions()),
        (0, vec!["1.2.0".into(); 3]),
        "{text}"
    );
    // One that is new, in a file with its version.
    let file = fleet.guest("versions@2.0.0.wasm", "versions@2.0.0.wasm");
    let (code, text) = fleet.deploy(&file, &[]);
    assert!(code == 0 && text.contains("which is new"), "{code} {text}");
    assert_eq!(fleet.versions(), ["1.2.0"; 3], "for callers of 1.0.0");
    fleet.holds_only(&["versions.wasm", "versions@2.0.0.wasm"]);
}

#[test]
fn what_breaks_callers_is_refused_and_named() {
    let fleet = Fleet::start_with(2, "", |setup| {
        setup.with_bytes("job.wasm", &job("1.1.0", &["run", "stop"], ""))
    });
    let serves = |version: &str| {
        for server in &fleet.servers {
            let rows = server.json("/services");
            assert_eq!(rows["services"][0]["version"], *version);
        }
    };
    let check = |version: &str, actions: &[&str], flags: &[&str], code: i32, expected: &str| {
        let file = fleet.file("job.wasm", &job(version, actions, ""));
        let (found, text) = fleet.deploy(&file, flags);
        assert!(
            found == code && text.contains(expected),
            "{version}: {found} {text}"
        );
    };
    check(
        "1.2.0",
        &["run"],
        &[],
        1,
        "for callers of 1.1.0: the action stop is gone",
    );
    check("1.0.0", &["run", "stop"], &[], 1, "1.0.0, which is older");
    serves("1.1.0");
    check("1.2.0", &["run"], &["--force"], 0, "breaks: for callers");
    serves("1.2.0");
    check(
        "2.0.0",
        &["other"],
        &["--dry-run"],
        0,
        "job@2.0.0.wasm beside it",
    );
    serves("1.2.0");
    let file = fleet.file("job@1.2.0.wasm", &job("1.2.0", &["run"], ""));
    let (code, text) = fleet.deploy(&file, &[]);
    assert!(
        code == 1 && text.contains("another file has job 1.2.0"),
        "{text}"
    );
    fleet.holds_only(&["job.wasm"]);
}

#[test]
fn where_one_refuses_none_switches() {
    let settings = format!(
        "[services.versions.grants]\nconfig = {{ a = \"b\" }}\ndigest = \"sha256:{}\"",
        "0".repeat(64)
    );
    let fleet = Fleet::start_with(2, "", |setup| setup.with("services", "calc.wasm"));
    let pinned = Fleet::start_with(1, &settings, |setup| setup.with("services", "calc.wasm"));
    let mut all = fleet;
    all.servers.extend(pinned.servers);
    all.folders.extend(pinned.folders);
    let file = all.guest("versions@1.0.0.wasm", "versions.wasm");
    let (code, text) = all.deploy(&file, &[]);
    assert!(
        code == 1 && text.contains("1 of 3 servers") && text.contains("its grants are for a file"),
        "{code} {text}"
    );
    all.holds_only(&["calc.wasm"]);
    // Nothing is held any more, so the next one is taken at once.
    all.servers.pop();
    let (code, text) = all.deploy(&file, &[]);
    assert_eq!(
        (code, all.versions()),
        (0, vec!["1.0.0".into(); 2]),
        "{text}"
    );
    // One that is away is no reason to go on without it.
    all.servers[1].child.kill().unwrap();
    all.servers[1].wait();
    let file = all.guest("versions@1.2.0.wasm", "versions.wasm");
    let (code, text) = all.deploy(&file, &[]);
    assert!(code == 3 && text.contains("can't reach"), "{code} {text}");
    assert_eq!(version(&all.servers[0]), "1.0.0");
    // What an earlier deploy has brought stays.
    let served = all.guest("versions@1.0.0.wasm", "versions.wasm");
    for flags in [&["--dry-run"][..], &[]] {
        assert_eq!(all.deploy(&served, flags).0, 3);
        assert_eq!(version(&all.servers[0]), "1.0.0");
    }
}

#[test]
fn a_switch_that_fails_is_undone_on_all() {
    let fleet = Fleet::start(3, "");
    let new = fleet.guest("versions@2.0.0.wasm", "versions@2.0.0.wasm");
    // A folder can't be replaced by a file.
    let in_the_way = fleet.folders[1].join("versions@2.0.0.wasm");
    fs::create_dir_all(in_the_way.join("full")).unwrap();
    let (code, text) = fleet.deploy(&new, &[]);
    assert!(
        code == 1 && text.contains("all serve what they served before"),
        "{code} {text}"
    );
    for at in [0, 2] {
        assert!(!fleet.folders[at].join("versions@2.0.0.wasm").exists());
        let rows = fleet.servers[at].json("/services");
        assert_eq!(rows["services"].as_array().unwrap().len(), 1);
    }
    fs::remove_dir_all(in_the_way).unwrap();
    fleet.holds_only(&["versions.wasm"]);
    // One that took the place of another gives it back.
    let (status, verdict) = {
        let bytes = fs::read(component("guests", "versions@1.2.0.wasm")).unwrap();
        put(&fleet.servers[0], "/services/versions", Some(TOKEN), &bytes)
    };
    assert_eq!(status, 200, "{verdict}");
    let step = |undo: bool| {
        let body = json!({"digest": verdict["digest"], "undo": undo});
        post(&fleet.servers[0], "/services/versions/deploy", &body)
    };
    assert_eq!(step(false).0, 200);
    assert_eq!(version(&fleet.servers[0]), "1.2.0");
    assert_eq!(step(true).0, 200);
    assert_eq!(version(&fleet.servers[0]), "1.0.0");
    assert_eq!(
        fs::read(fleet.folders[0].join("versions.wasm")).unwrap(),
        fs::read(component("guests", "versions@1.0.0.wasm")).unwrap()
    );
    for undo in [false, true] {
        assert_eq!(step(undo).0, 409, "it is neither held nor deployed");
    }
}

#[test]
fn what_is_held_is_gone_when_the_server_ends() {
    let mut fleet = Fleet::start(1, "");
    let bytes = fs::read(component("guests", "versions@1.2.0.wasm")).unwrap();
    let (status, verdict) = put(&fleet.servers[0], "/services/versions", Some(TOKEN), &bytes);
    assert_eq!(status, 200, "{verdict}");
    let parts = || fs::read_dir(&fleet.folders[0]).unwrap().count();
    assert_eq!(parts(), 2, "held beside what is served");
    let mut server = fleet.servers.pop().unwrap();
    server.signal("TERM");
    assert!(server.wait().success());
    fleet.holds_only(&["versions.wasm"]);
}

/// A server that can take everything, and answers the switch with this status.
/// Returns its address, and the thread, which ends once it was asked to go back.
fn failing(status: u16, digest: String) -> (String, thread::JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let serve = move || {
        loop {
            let (mut stream, _) = listener.accept().unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            let (mut request, mut byte) = (Vec::new(), [0]);
            while !request.ends_with(b"\r\n\r\n") && stream.read(&mut byte).unwrap() == 1 {
                request.push(byte[0]);
            }
            let head = String::from_utf8_lossy(&request).to_lowercase();
            let length = head.split("content-length: ").nth(1).unwrap_or("0\r\n");
            let length: usize = length.split("\r\n").next().unwrap().parse().unwrap();
            if head.contains("expect: 100-continue") {
                stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").unwrap();
            }
            let mut body = vec![0; length];
            stream.read_exact(&mut body).unwrap();
            let undo = head.starts_with("post") && String::from_utf8_lossy(&body).contains("true");
            let (status, answer) = match (head.starts_with("post"), undo) {
                (false, _) => (
                    200,
                    json!({"name": "versions", "version": "1.2.0", "digest": digest}),
                ),
                (true, true) => (200, json!({"done": "undone"})),
                (true, false) => (status, json!({"error": "as it happens"})),
            };
            let answer = answer.to_string();
            let length = answer.len();
            let text = format!(
                "HTTP/1.1 {status} x\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{answer}"
            );
            stream.write_all(text.as_bytes()).unwrap();
            if undo {
                return;
            }
        }
    };
    (address, thread::spawn(serve))
}

#[test]
fn one_that_may_have_switched_is_asked_to_go_back() {
    let fleet = Fleet::start(1, "");
    let new = fleet.guest("versions@1.2.0.wasm", "versions.wasm");
    let check = "/services/versions?check=true";
    let (_, verdict) = put(
        &fleet.servers[0],
        check,
        Some(TOKEN),
        &fs::read(&new).unwrap(),
    );
    for status in [500, 503] {
        let digest = verdict["digest"].as_str().unwrap().to_owned();
        let (address, undone) = failing(status, digest);
        let (code, text) = fleet.deploy(&new, &["--admin", &address]);
        assert!(
            code == 1 && text.contains("all serve what they served before"),
            "{code} {text}"
        );
        undone.join().unwrap();
        assert_eq!(fleet.versions(), ["1.0.0"]);
    }
}

#[test]
fn a_rollback_does_not_go_back_to_an_undone_deploy() {
    let fleet = Fleet::start(1, "");
    let server = &fleet.servers[0];
    let bytes = fs::read(component("guests", "versions@1.2.0.wasm")).unwrap();
    let verdict = put(server, "/services/versions", Some(TOKEN), &bytes).1;
    for undo in [false, true] {
        let body = json!({"digest": verdict["digest"], "undo": undo});
        assert_eq!(post(server, "/services/versions/deploy", &body).0, 200);
    }
    let (status, answer) = post(server, "/services/versions/rollback", &json!({}));
    assert_eq!(status, 409, "{answer}");
    assert_eq!(version(server), "1.0.0");
}

#[test]
fn a_file_that_is_not_served_is_not_replaced() {
    let fleet = Fleet::start(1, "");
    let bytes = fs::read(component("guests", "versions@2.0.0.wasm")).unwrap();
    let file = fleet.folders[0].join("versions@2.0.0.wasm");
    fs::write(&file, "not a component").unwrap();
    let path = "/services/versions@2.0.0";
    let (status, answer) = put(&fleet.servers[0], path, Some(TOKEN), &bytes);
    let error = answer["error"].as_str().unwrap_or_default();
    assert!(
        status == 409 && error.contains("is not served"),
        "{status} {answer}"
    );
    assert_eq!(fs::read(&file).unwrap(), b"not a component");
}

#[test]
fn a_dry_run_changes_nothing() {
    let fleet = Fleet::start(2, "");
    let file = fleet.guest("versions@1.2.0.wasm", "versions.wasm");
    for _ in 0..2 {
        let (code, text) = fleet.deploy(&file, &["--dry-run"]);
        assert!(
            code == 0 && text.contains("can take versions 1.2.0") && text.contains("nothing was"),
            "{code} {text}"
        );
        assert_eq!(fleet.versions(), ["1.0.0"; 2]);
        fleet.holds_only(&["versions.wasm"]);
    }
    let file = fleet.file("versions.wasm", b"no WebAssembly");
    let (code, text) = fleet.deploy(&file, &["--dry-run"]);
    assert!(
        code == 1 && text.contains("not WebAssembly"),
        "{code} {text}"
    );
}

#[test]
fn deploying_is_off_and_takes_a_token_of_its_own() {
    let bytes = fs::read(component("guests", "versions@1.2.0.wasm")).unwrap();
    let off = Setup::empty(BINARY).with("services", "calc.wasm").start();
    let (status, answer) = put(&off, "/services/versions", Some(&off.token()), &bytes);
    assert_eq!(status, 403, "{answer}");
    assert!(
        answer["error"]
            .as_str()
            .unwrap()
            .contains("admin.deploy = true")
    );
    let fleet = Fleet::start(1, "");
    let server = &fleet.servers[0];
    let admin = server.token();
    for token in [None, Some("wrong"), Some(&*admin), Some(&TOKEN[1..])] {
        let (status, answer) = put(server, "/services/versions", token, &bytes);
        assert_eq!(status, 401, "{answer}");
        let head = "POST /services/versions/deploy";
        assert_eq!(request(server, head, token, 0, b"").0, 401);
    }
    assert!(
        server
            .json("/log?target=audit")
            .to_string()
            .contains("admin-token")
    );
    // It deploys and goes back, and changes nothing else.
    let (status, _) = post(server, "/services/versions/disable", &json!({}));
    assert_eq!(status, 200);
    for path in ["/drain", "/services/reload", "/services/versions/try"] {
        assert_eq!(post(server, path, &json!({})).0, 401, "{path}");
    }
    fleet.holds_only(&["versions.wasm"]);
    // Its own file is made where none is named.
    let setup = Setup::empty(BINARY).set("[admin]\ndeploy = true");
    let file = setup.dir.path().join("state/mb-server/deploy.token");
    let server = setup.start();
    let token = fs::read_to_string(file).unwrap();
    let (status, answer) = put(&server, "/services/versions", Some(token.trim()), &bytes);
    assert_eq!(status, 200, "{answer}");
}

#[test]
fn an_address_that_others_reach_does_not_deploy() {
    for settings in [
        "[admin]\ndeploy = true\nhost = \"0.0.0.0\"",
        "allow_unsecure = true\n[admin]\ndeploy = true\nhost = \"0.0.0.0\"",
    ] {
        let setup = Setup::empty(BINARY).set(settings);
        let output = setup.command().output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{text}");
        assert!(
            text.contains("`admin.deploy` = true") && text.contains("tunnel"),
            "{text}"
        );
    }
    let (code, text) = {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("versions.wasm");
        fs::copy(component("guests", "versions@1.0.0.wasm"), &file).unwrap();
        let token = dir.path().join("token");
        fs::write(&token, TOKEN).unwrap();
        let output = Command::new(BINARY)
            .args(["service", "deploy"])
            .arg(file)
            .args(["--admin", "192.0.2.1:9090", "--token-file"])
            .arg(token)
            .output()
            .unwrap();
        (
            output.status.code(),
            String::from_utf8(output.stderr).unwrap(),
        )
    };
    assert!(code == Some(1) || code == Some(2), "{code:?} {text}");
    assert!(text.contains("nothing was changed"), "{text}");
}

#[test]
fn what_arrives_is_bounded_and_one_deploy_is_made_at_a_time() {
    let fleet = Fleet::start(1, "");
    let server = &fleet.servers[0];
    let bytes = fs::read(component("guests", "versions@1.2.0.wasm")).unwrap();
    let most = 256 * 1024 * 1024;
    let head = "PUT /services/versions";
    let (status, answer) = request(server, head, Some(TOKEN), most + 1, b"");
    assert!(
        status == 413 && answer["error"].as_str().unwrap().contains("256 MiB"),
        "{answer}"
    );
    for (path, expected) in [
        ("/services/2", "NAME.wasm"),
        ("/services/..%2Fversions", "no slash"),
        ("/services/other", "says that it is versions"),
    ] {
        let (status, answer) = put(server, path, Some(TOKEN), &bytes);
        assert!(
            status == 409 && answer["error"].as_str().unwrap().contains(expected),
            "{path}: {answer}"
        );
    }
    assert_eq!(
        put(server, "/services/versions?no=1", Some(TOKEN), b"").0,
        400
    );
    assert_eq!(
        put(server, "/services/versions?force=1", Some(TOKEN), b"").0,
        400
    );
    // One that breaks off leaves nothing.
    let mut stream = TcpStream::connect(server.admin).unwrap();
    write!(
        stream,
        "{head} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\nAuthorization: Bearer {TOKEN}\r\n\r\n",
        bytes.len()
    )
    .unwrap();
    stream.write_all(&bytes[..bytes.len() / 2]).unwrap();
    let is_receiving = || fs::read_dir(&fleet.folders[0]).unwrap().count() == 2;
    server.until("it is received", |_| is_receiving());
    let (status, answer) = put(server, "/services/versions", Some(TOKEN), &bytes);
    assert!(
        status == 409 && answer["error"].as_str().unwrap().contains("in progress"),
        "{answer}"
    );
    drop(stream);
    server.until("it has broken off", |_| !is_receiving());
    fleet.holds_only(&["versions.wasm"]);
    // What is held keeps the next one waiting, until it is dropped.
    let (status, held) = put(server, "/services/versions", Some(TOKEN), &bytes);
    assert_eq!(status, 200, "{held}");
    let file = fleet.guest("versions@2.0.0.wasm", "versions.wasm");
    let (code, text) = fleet.deploy(&file, &[]);
    assert!(code == 1 && text.contains("in progress"), "{code} {text}");
    let body = json!({"digest": held["digest"], "undo": true});
    assert_eq!(post(server, "/services/versions/deploy", &body).0, 200);
    fleet.holds_only(&["versions.wasm"]);
    let (code, text) = fleet.deploy(&file, &[]);
    assert_eq!(code, 0, "{text}");
    // What is served changes between the check and the switch.
    let (status, held) = put(server, "/services/versions?force=true", Some(TOKEN), &bytes);
    assert_eq!(status, 200, "{held}");
    let other = fleet.guest("versions@1.0.0.wasm", "other");
    fs::rename(other, fleet.folders[0].join("versions.wasm")).unwrap();
    server.until("it is followed", |server| {
        server.json("/services")["services"][0]["version"] == "1.0.0"
    });
    let body = json!({"digest": held["digest"]});
    let (status, answer) = post(server, "/services/versions/deploy", &body);
    assert!(
        status == 409 && answer["error"].as_str().unwrap().contains("has changed"),
        "{answer}"
    );
}

#[test]
fn a_version_that_fails_is_rolled_back_by_the_watch() {
    let good = job("1.0.0", &["run"], "");
    let fleet = Fleet::start_with(2, "", |setup| setup.with_bytes("job.wasm", &good));
    let file = fleet.file("job.wasm", &job("1.0.1", &["run"], "(unreachable)"));
    let is_over = AtomicBool::new(false);
    let wire = fleet.servers[1].wire;
    let (code, text) = thread::scope(|scope| {
        let call = || {
            let mut client = RawClient::connect(wire);
            while !is_over.load(SeqCst) {
                client.ask("job.run", "null");
            }
        };
        scope.spawn(call);
        scope.spawn(call);
        let deployed = fleet.deploy(&file, &["--watch", "1h", "--max-errors", "2.5%"]);
        is_over.store(true, SeqCst);
        deployed
    });
    assert!(
        code == 1
            && text.contains("rolling back: the server ended")
            && text.contains("more than 2.5%; all serve what they served before"),
        "{code} {text}"
    );
    for (server, folder) in fleet.servers.iter().zip(&fleet.folders) {
        assert_eq!(server.json("/services")["services"][0]["version"], "1.0.0");
        assert_eq!(fs::read(folder.join("job.wasm")).unwrap(), good);
    }
    // One that nobody calls stays.
    let file = fleet.file("job.wasm", &job("1.0.2", &["run"], ""));
    let (code, text) = fleet.deploy(&file, &["--watch", "1s"]);
    assert!(
        code == 0 && text.contains("too few to judge"),
        "{code} {text}"
    );
    assert_eq!(
        fleet.servers[0].json("/services")["services"][0]["version"],
        "1.0.2"
    );
}

#[test]
fn a_watch_rolls_back_where_a_server_is_gone_and_not_where_others_changed_it() {
    let fleet = Fleet::start(2, "");
    let file = fleet.guest("versions@1.2.0.wasm", "versions.wasm");
    let (code, text) = fleet.watch(&file, |second, _| {
        let rolled_back = post(second, "/services/versions/rollback", &json!({}));
        assert_eq!(rolled_back.0, 200, "{}", rolled_back.1);
    });
    assert!(
        code == 1
            && text.contains("serves another file by now")
            && text.contains("nothing was rolled back"),
        "{code} {text}"
    );
    assert_eq!(fleet.versions(), ["1.2.0", "1.0.0"]);
    // One that is gone may have died of it.
    let fleet = Fleet::start(2, "");
    let (code, text) = fleet.watch(&file, |second, _| second.signal("KILL"));
    assert!(
        code == 3 && text.contains("1 of 2 servers could not be rolled back"),
        "{code} {text}"
    );
    assert_eq!(version(&fleet.servers[0]), "1.0.0");
}

#[test]
fn an_interrupted_deploy_leaves_nothing_held_and_an_interrupted_watch_what_is_served() {
    let fleet = Fleet::start(2, "");
    let (first, second) = (&fleet.servers[0], &fleet.servers[1]);
    let file = fleet.guest("versions@1.2.0.wasm", "versions.wasm");
    second.signal("STOP");
    let deploy = fleet.begin_watch(&file);
    let is_held = |_: &TestServer| fs::read_dir(&fleet.folders[0]).unwrap().count() == 2;
    first.until("the first one holds it", is_held);
    interrupt(&deploy);
    second.signal("CONT");
    let (code, text) = said(deploy.wait_with_output().unwrap());
    assert!(
        code == 1 && text.contains("nothing was changed: it was interrupted"),
        "{code} {text}"
    );
    fleet.holds_only(&["versions.wasm"]);
    let (code, text) = fleet.watch(&file, |_, watch| interrupt(watch));
    assert!(
        code == 1 && text.contains("nothing was rolled back"),
        "{code} {text}"
    );
    assert_eq!(fleet.versions(), ["1.2.0"; 2]);
}

fn interrupt(command: &Child) {
    let id = command.id().to_string();
    let status = Command::new("kill").args(["-INT", &id]).status();
    assert!(status.unwrap().success());
}

#[test]
fn a_deploy_of_a_disabled_service_says_so() {
    let fleet = Fleet::start(1, "");
    assert_eq!(fleet.service(&["disable", "versions"]).0, 0);
    let file = fleet.guest("versions@1.2.0.wasm", "versions.wasm");
    let (code, text) = fleet.deploy(&file, &[]);
    assert!(
        code == 0 && text.contains("is served") && text.contains("it is disabled"),
        "{code} {text}"
    );
}

#[test]
fn a_deploy_under_load_loses_no_call() {
    let fleet = Fleet::start(3, "");
    let file = fleet.guest("versions@1.2.0.wasm", "versions.wasm");
    let is_over = AtomicBool::new(false);
    let addresses: Vec<_> = fleet.servers.iter().map(|server| server.wire).collect();
    let counts: Vec<u32> = thread::scope(|scope| {
        let is_over = &is_over;
        let call = |address| {
            move || {
                let mut client = RawClient::connect(address);
                let mut count = 0;
                while !is_over.load(SeqCst) {
                    let answer = client.ask("versions.which", "null");
                    assert!(answer.line.starts_with("RESPONSE"), "{answer:?}");
                    count += 1;
                }
                count
            }
        };
        let callers: Vec<_> = addresses
            .iter()
            .map(|address| scope.spawn(call(*address)))
            .collect();
        let deployed = fleet.deploy(&file, &[]);
        is_over.store(true, SeqCst);
        assert_eq!(deployed.0, 0, "{}", deployed.1);
        callers
            .into_iter()
            .map(|caller| caller.join().unwrap())
            .collect()
    });
    assert!(counts.iter().all(|count| *count > 10), "{counts:?}");
    assert_eq!(fleet.versions(), ["1.2.0"; 3]);
}

#[test]
fn a_unix_socket_takes_deploys() {
    let setup = Setup::empty(BINARY);
    let socket = setup.dir.path().join("admin.sock");
    let state = setup.dir.path().join("state/mb-server");
    let server = setup
        .set(&format!("[admin]\ndeploy = true\nsocket = {socket:?}"))
        .start();
    let output = Command::new(BINARY)
        .args(["service", "deploy"])
        .arg(component("guests", "versions@2.0.0.wasm"))
        .args(["--admin", &format!("unix:{}", socket.display())])
        // The token is that of the settings.
        .env("MB_STATE_DIR", state)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{text}");
    let row = &server.json("/services")["services"][0];
    assert_eq!(
        (&row["version"], &row["source"]),
        (&json!("2.0.0"), &json!("file"))
    );
    let trail = server.json("/log?target=audit").to_string();
    assert!(trail.contains("unix:uid="), "{trail}");
}

#[test]
fn services_are_disabled_on_several_and_differences_are_shown() {
    let fleet = Fleet::start(2, "");
    let (code, text) = fleet.service(&["disable", "versions"]);
    assert!(
        code == 0 && text.matches("service versions is disabled").count() == 2,
        "{code} {text}"
    );
    for server in &fleet.servers {
        assert_eq!(
            server.connect().ask("versions.which", "null").code(),
            "SERVICE_UNAVAILABLE"
        );
    }
    let (code, text) = fleet.service(&["enable", "versions", "--version", "1.0.0"]);
    assert_eq!(
        (code, fleet.versions()),
        (0, vec!["1.0.0".into(); 2]),
        "{text}"
    );
    let (code, text) = fleet.run("status", &[]);
    assert!(
        code == 0 && text.contains("serve the same"),
        "{code} {text}"
    );
    let one = fleet.servers[0].admin.to_string();
    let token = fleet.servers[0].token();
    let bearer = format!("Authorization: Bearer {token}\r\n");
    let body =
        "POST /services/versions/disable HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n";
    assert_eq!(
        http(fleet.servers[0].admin, &format!("{body}{bearer}\r\n")).0,
        200
    );
    let (code, text) = fleet.run("status", &[]);
    let line = text.lines().find(|line| line.contains("disabled"));
    assert!(
        code == 1
            && line.is_some_and(|line| line.contains(&one) && line.contains("versions 1.0.0")),
        "{code} {text}"
    );
    let (code, text) = fleet.service(&["rollback", "versions"]);
    assert!(
        code == 1 && text.matches("no earlier file of versions").count() == 2,
        "{code} {text}"
    );
    let mut client = fleet.servers[1].connect();
    client.request("nobody.here", "on.one", "null");
    assert_eq!(client.message().code(), "NO_ROUTE_FOUND");
    let (code, text) = fleet.run("why", &["on.one"]);
    let two = fleet.servers[1].admin.to_string();
    assert!(
        code == 0 && text.contains("NO_ROUTE_FOUND") && text.contains(&two) && !text.contains(&one),
        "{code} {text}"
    );
    let (code, text) = fleet.run("why", &["nowhere"]);
    assert!(code == 1 && text.contains("nothing is recorded"), "{text}");
}
