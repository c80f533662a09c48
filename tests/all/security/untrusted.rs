//! Files that somebody else wrote, or could have: machine code under another
//! name, files that crash the compiler, folders that others can change; and
//! what the processes that read them can still do.

use std::{
    fs,
    net::TcpListener,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::Instant,
};

use serde_json::json;
use sha2::{Digest as _, Sha256};

use crate::{
    BINARY, setup,
    support::{PATIENCE, Setup, TestServer, component, wat},
};

fn run(arguments: &[&Path]) -> Output {
    Command::new(BINARY).args(arguments).output().unwrap()
}

fn text(output: &Output) -> (Option<i32>, String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (
        output.status.code(),
        text(&output.stdout),
        text(&output.stderr),
    )
}

fn mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

/// `calc` as machine code, in a folder of its own.
fn machine_code() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("calc.cwasm");
    let source = component("services", "calc.wasm");
    let compiled = run(&[Path::new("compile"), &source, Path::new("-o"), &file]);
    assert!(compiled.status.success(), "{:?}", text(&compiled));
    (dir, file)
}

/// The error of a service in the list of the operator.
fn error(server: &TestServer, name: &str) -> Option<String> {
    let services = server.json("/services");
    let rows = services["services"].as_array().unwrap();
    let row = rows.iter().find(|row| {
        let file = row["file"].as_str().unwrap();
        file.ends_with(&format!("/{name}"))
    })?;
    row["error"].as_str().map(str::to_owned)
}

#[test]
fn machine_code_is_run_only_from_a_file_that_is_called_so() {
    let (dir, file) = machine_code();
    let disguised = dir.path().join("calc.wasm");
    fs::copy(&file, &disguised).unwrap();
    let (code, _, complaint) = text(&run(&[Path::new("inspect"), &disguised]));
    assert_eq!(code, Some(1));
    assert!(complaint.contains("NAME.cwasm"), "{complaint}");
    let calc = component("services", "calc.wasm");
    let against = [Path::new("inspect"), &calc, Path::new("--against")];
    for (old, expected) in [(&disguised, 1), (&file, 2)] {
        let (code, _, complaint) = text(&run(&[&against[..], &[old]].concat()));
        assert_eq!(code, Some(expected), "{complaint}");
        assert!(complaint.contains("machine code"), "{complaint}");
    }
    let out = dir.path().join("out.wasm");
    let (code, _, complaint) = text(&run(&[Path::new("compile"), &calc, Path::new("-o"), &out]));
    assert_eq!(code, Some(2), "{complaint}");

    let bytes = fs::read(&file).unwrap();
    let services = dir.path().join("services");
    let server = Setup::empty_in(BINARY, &services)
        .with("services", "echo.wasm")
        .with_bytes("calc.wasm", &bytes)
        .set("reload_interval = 50")
        .start();
    let refused = error(&server, "calc.wasm").unwrap();
    assert!(refused.contains("NAME.cwasm"), "{refused}");
    // And while it serves: what was loaded before is still served.
    fs::write(services.join(".part"), &bytes).unwrap();
    fs::rename(services.join(".part"), services.join("echo.wasm")).unwrap();
    server.until("it is refused", |server| {
        error(server, "echo.wasm").is_some_and(|error| error.contains("NAME.cwasm"))
    });
    assert_eq!(server.connect().ask("echo.say", "1").text(), "1");
}

#[test]
fn inspecting_machine_code_runs_nothing_of_it() {
    let (dir, file) = machine_code();
    let bytes = fs::read(file).unwrap();
    let end = bytes.iter().position(|byte| *byte == b'\n').unwrap() + 1;
    let mut code = bytes[end..].to_vec();
    // No program any more, and rightly signed.
    code[64..].fill(0xcc);
    let digest = |bytes: &[u8]| {
        let digest = Sha256::digest(bytes);
        digest
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect::<String>()
    };
    let head = String::from_utf8(bytes[..end].to_vec()).unwrap();
    let head = head.replace(&digest(&bytes[end..]), &digest(&code));
    let broken = dir.path().join("broken.cwasm");
    fs::write(&broken, [head.as_bytes(), &code].concat()).unwrap();
    let (status, shown, complaint) = text(&run(&[Path::new("inspect"), &broken]));
    assert_eq!(status, Some(0), "{complaint}");
    let source = fs::read(component("services", "calc.wasm")).unwrap();
    assert!(
        shown.contains("machine code")
            && shown.contains(&digest(&source))
            && shown.contains(env!("CARGO_PKG_VERSION")),
        "{shown}"
    );
    fs::write(&broken, &bytes[..bytes.len() - 1]).unwrap();
    let (status, _, complaint) = text(&run(&[Path::new("inspect"), &broken]));
    assert_eq!(status, Some(1));
    assert!(complaint.contains("digest"), "{complaint}");
}

#[test]
fn a_link_to_machine_code_is_as_safe_as_the_folder_that_holds_it() {
    let (_dir, file) = machine_code();
    for (folder, served) in [(0o755, true), (0o777, false), (0o1777, false)] {
        let setup = Setup::empty(BINARY);
        symlink(&file, setup.services().join("calc.cwasm")).unwrap();
        mode(&setup.services(), folder);
        let server = setup.start();
        let found = error(&server, "calc.cwasm");
        assert_eq!(found.is_none(), served, "{folder:o}: {found:?}");
        assert!(found.is_none_or(|error| error.contains("others can write to")));
    }
}

/// A component of so many component types, each inside of the one before.
fn nested_types(depth: usize) -> Vec<u8> {
    let body = [&[1], [0x41, 1, 1].repeat(depth).as_slice(), &[0x41, 0]].concat();
    let mut length = Vec::new();
    let mut rest = body.len();
    while rest > 0x7f {
        length.push(rest as u8 | 0x80);
        rest >>= 7;
    }
    length.push(rest as u8);
    [b"\0asm\x0d\0\x01\0\x07".as_slice(), &length, &body].concat()
}

#[test]
fn a_file_that_crashes_the_compiler_is_the_failure_of_that_file() {
    let dir = tempfile::tempdir().unwrap();
    let crashing = nested_types(20_000);
    let file = dir.path().join("nested.wasm");
    fs::write(&file, &crashing).unwrap();
    for command in ["inspect", "compile"] {
        let (code, _, complaint) = text(&run(&[Path::new(command), &file]));
        assert_eq!(code, Some(1), "{complaint}");
        assert!(
            complaint.contains("crashed on this file (signal "),
            "{complaint}"
        );
    }
    // One that wasmparser alone survives is none of the server's either.
    fs::write(&file, nested_types(1000)).unwrap();
    let (code, _, complaint) = text(&run(&[Path::new("inspect"), &file]));
    assert_eq!(code, Some(1), "{complaint}");

    let (services, state) = (dir.path().join("services"), dir.path().join("state"));
    let begin = || {
        Setup::empty_in(BINARY, &services)
            .with("services", "echo.wasm")
            .set(&format!("state_dir = {state:?}\nreload_interval = 50"))
            .start()
    };
    let crashed = |server: &TestServer| {
        error(server, "nested.wasm").is_some_and(|error| error.contains("crashed on this file"))
    };
    let server = begin();
    fs::write(services.join("nested.wasm"), &crashing).unwrap();
    server.until("the file is refused", crashed);
    assert_eq!(server.connect().ask("echo.say", "1").text(), "1");
    drop(server);
    let server = begin();
    assert!(crashed(&server), "after a restart");
    assert_eq!(server.connect().ask("echo.say", "1").text(), "1");
    // And the next one is compiled all the same.
    fs::copy(
        component("services", "calc.wasm"),
        services.join("calc.wasm"),
    )
    .unwrap();
    server.until("the next one is served", |server| {
        server.connect().ask("calc.add", r#"{"a":1,"b":2}"#).text() == r#"{"sum":3}"#
    });
}

#[test]
fn a_file_that_is_cut_short_is_called_so() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("calc.wasm");
    let whole = fs::read(component("services", "calc.wasm")).unwrap();
    for part in [9, 3 * whole.len() / 4, whole.len() - 1] {
        fs::write(&file, &whole[..part]).unwrap();
        for command in ["inspect", "compile"] {
            let (code, _, complaint) = text(&run(&[Path::new(command), &file]));
            assert_eq!(code, Some(1), "{complaint}");
            let expected = format!("cut short: it ends after {part} bytes");
            assert!(complaint.contains(&expected), "{complaint}");
        }
    }
}

#[test]
fn a_state_folder_that_others_can_change_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    fs::create_dir(&state).unwrap();
    mode(&state, 0o777);
    let setup = Setup::empty(BINARY).set(&format!("state_dir = {state:?}"));
    let (code, _, complaint) = text(&setup.command().output().unwrap());
    assert_eq!(code, Some(2), "{complaint}");
    assert!(
        complaint.contains("state_dir") && complaint.contains("chmod go-w"),
        "{complaint}"
    );
    let check = Command::new(BINARY)
        .arg("check")
        .env("MB_STATE_DIR", &state)
        .output()
        .unwrap();
    let complaint = String::from_utf8_lossy(&check.stderr);
    assert!(
        check.status.code() == Some(2) && complaint.contains("chmod go-w"),
        "{complaint}"
    );
}

#[test]
fn tls_files_that_others_can_change_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let certs = dir.path().join("certs");
    assert!(
        run(&[Path::new("cert"), Path::new("dev"), &certs])
            .status
            .success()
    );
    let file = |name: &str| certs.join(name);
    let (cert, key, ca) = (file("server.crt"), file("server.key"), file("ca.crt"));
    let tls = format!("[tls]\nport = 0\ncert = {cert:?}\nkey = {key:?}\nca = {ca:?}");
    for (path, bad, good) in [
        (&key, 0o606, 0o600),
        (&ca, 0o606, 0o600),
        (&certs, 0o707, 0o700),
    ] {
        mode(path, bad);
        let setup = Setup::empty(BINARY).set(&tls);
        let (code, _, complaint) = text(&setup.command().output().unwrap());
        assert_eq!(code, Some(2), "{complaint}");
        assert!(
            complaint.contains("tls: ") && complaint.contains("chmod"),
            "{complaint}"
        );
        mode(path, good);
    }
    drop(Setup::empty(BINARY).set(&tls).start());
}

/// A field of a process, as `/proc/PID/status` has it.
fn status(pid: u32, field: &str) -> Option<String> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find(|line| line.starts_with(field))?;
    Some(
        line[field.len()..]
            .trim_start_matches(':')
            .trim()
            .to_owned(),
    )
}

/// The one child of a process.
fn child(parent: u32) -> u32 {
    let all = fs::read_dir("/proc").unwrap();
    let pids = all.filter_map(|entry| entry.unwrap().file_name().to_str()?.parse::<u32>().ok());
    let children: Vec<_> = pids
        .filter(|pid| status(*pid, "PPid").is_some_and(|of| of == parent.to_string()))
        .collect();
    assert_eq!(children.len(), 1, "{children:?}");
    children[0]
}

#[test]
fn the_server_can_start_no_program_and_its_helper_holds_nothing() {
    // A listener that it was started with is not the helper's.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (setup, mut command) = setup().command_with(&listener);
    let mut server = setup.start_with(&mut command);
    drop(listener);
    assert_eq!(
        status(server.child.id(), "Seccomp").as_deref(),
        Some("2"),
        "the server"
    );
    let helper = child(server.child.id());
    let environment = fs::read(format!("/proc/{helper}/environ")).unwrap_or_default();
    assert_eq!(environment, b"", "its environment");
    // What the test itself was started with may be there as well.
    let files = fs::read_dir(format!("/proc/{helper}/fd")).unwrap();
    let sockets = files
        .filter_map(|file| fs::read_link(file.unwrap().path()).ok())
        .filter(|target| target.to_string_lossy().starts_with("socket:"));
    assert_eq!(sockets.count(), 1, "its sockets");
    server.child.kill().unwrap();
    server.wait();
    let until = Instant::now() + PATIENCE;
    while status(helper, "State").is_some_and(|state| !state.starts_with('Z')) {
        assert!(Instant::now() < until, "the helper outlives the server");
        std::thread::yield_now();
    }
}

#[test]
fn a_compile_worker_gives_up_its_rights_before_it_reads() {
    let job = json!({
        "largest_instance": 65536, "on_demand": false, "any_cpu": false, "quick": false,
        "reset": true, "copy_memory": false, "memory": 1 << 30, "seconds": 60,
    });
    let mut worker = Command::new(BINARY)
        .args(["compile-worker", &job.to_string()])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let until = Instant::now() + PATIENCE;
    // It waits for its input, which does not come.
    while status(worker.id(), "Seccomp").as_deref() != Some("2") {
        assert!(Instant::now() < until, "it keeps its rights");
        std::thread::yield_now();
    }
    let score = fs::read_to_string(format!("/proc/{}/oom_score_adj", worker.id())).unwrap();
    assert_eq!(score.trim(), "1000");
    assert_eq!(status(worker.id(), "NoNewPrivs").as_deref(), Some("1"));
    worker.kill().unwrap();
    worker.wait().unwrap();
}

#[test]
fn the_helper_outlives_a_time_without_descriptors() {
    use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};
    let graph = |say: &str| {
        // Nothing that the cache of compiled code knows from another run.
        let run = std::process::id();
        let body = format!("(drop (i32.const {run})) (call $say (i32.const {say}))");
        let graph = wat::Graph {
            body: &body,
            ..wat::Graph::default()
        };
        graph.service("late")
    };
    let setup = setup();
    let late = setup.services().join("late.wasm");
    let server = setup.start();
    let pid = Pid::from_child(&server.child);
    let files = fs::read_dir(format!("/proc/{}/fd", server.child.id())).unwrap();
    let open: Vec<u64> = files
        .filter_map(|file| file.unwrap().file_name().to_str()?.parse().ok())
        .collect();
    // Enough to look at the folder and to read a file, not for three pipes.
    let maximum = getrlimit(Resource::Nofile).maximum;
    let current = (0..).filter(|number| !open.contains(number)).nth(4);
    let few = Rlimit { current, maximum };
    let before = prlimit(Some(pid), Resource::Nofile, few).unwrap();
    fs::write(&late, graph("0")).unwrap();
    server.wait_for_log("Too many open files");
    prlimit(Some(pid), Resource::Nofile, before).unwrap();
    fs::write(&late, graph("1")).unwrap();
    server.until("the next file is compiled", |server| {
        server.connect().ask("late.run", "").text() == "true"
    });
}
