//! What a small host needs: code that was compiled elsewhere, and a restart
//! that no client notices.

use std::{
    collections::HashMap,
    fs,
    net::TcpListener,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    thread,
    time::Duration,
};

use mb_server::{
    client::{Client, Request},
    wire::{Payload, Topic},
};
use serde_json::{Value, json};

use crate::{
    BINARY,
    support::admin::change,
    support::{Setup, TestServer, component},
};

fn compile(arguments: &[&Path]) -> (Option<i32>, String, String) {
    let output = Command::new(BINARY)
        .arg("compile")
        .args(arguments)
        .output()
        .unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (
        output.status.code(),
        text(output.stdout),
        text(output.stderr),
    )
}

fn compiled() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("calc.cwasm");
    let (code, said, complained) = compile(&[
        &component("services", "calc.wasm"),
        Path::new("--output"),
        &file,
    ]);
    let inspected = Command::new(BINARY)
        .arg("inspect")
        .arg(&file)
        .output()
        .unwrap();
    let shown = String::from_utf8_lossy(&inspected.stdout).into_owned();
    assert!(
        inspected.status.success() && shown.contains("ahead of time"),
        "{shown}"
    );
    assert_eq!(
        compile(&[&file, Path::new("-o"), &dir.path().join("again.cwasm")]).0,
        Some(2),
        "it is compiled already"
    );
    assert_eq!(code, Some(0), "{complained}");
    assert!(
        said.contains("calc 1.") && said.contains("digest for grants: sha256:"),
        "{said}"
    );
    (dir, file)
}

#[test]
fn a_file_that_was_compiled_ahead_is_served() {
    let (dir, _) = compiled();
    let server = Setup::empty_in(BINARY, dir.path()).start();
    let answer = server.connect().ask("calc.add", r#"{"a":2,"b":40}"#);
    assert_eq!(answer.json(), json!({"sum": 42}));
    // Beside its source, the one that nobody has to trust is taken.
    fs::copy(
        component("services", "calc.wasm"),
        dir.path().join("calc.wasm"),
    )
    .unwrap();
    assert_eq!(change(&server, "POST", "/services/reload", "").0, 200);
    let services = server.json("/services");
    let files: Vec<_> = services["services"]
        .as_array()
        .unwrap()
        .iter()
        .map(|row| row["file"].clone())
        .collect();
    assert_eq!(files.len(), 1);
    assert!(
        files[0].as_str().unwrap().ends_with("calc.wasm"),
        "{files:?}"
    );
}

#[test]
fn compiled_code_that_others_could_have_written_is_refused() {
    let (_dir, file) = compiled();
    let good = fs::read(file).unwrap();
    let refused = |bytes: &[u8], mode: u32| -> String {
        let setup = Setup::empty(BINARY).with_bytes("calc.cwasm", bytes);
        fs::set_permissions(setup.services(), fs::Permissions::from_mode(mode)).unwrap();
        let server = setup.start();
        let answer = server.connect().ask("calc.add", r#"{"a":2,"b":40}"#);
        assert_eq!(answer.code(), "SERVICE_UNAVAILABLE");
        server.json("/services")["services"][0]["error"]
            .as_str()
            .unwrap()
            .to_owned()
    };
    assert!(refused(&good, 0o777).contains("others can write to"));
    let mut changed = good.clone();
    *changed.last_mut().unwrap() ^= 1;
    assert!(refused(&changed, 0o755).contains("digest is not the recorded one"));
    assert!(refused(&good[..good.len() - 1], 0o755).contains("digest is not the recorded one"));
    let text = String::from_utf8_lossy(&good[..400]).into_owned();
    let server = format!("\"server\":\"{}\"", env!("CARGO_PKG_VERSION"));
    let at = text.find(&server).unwrap();
    let older = [
        &good[..at],
        b"\"server\":\"0.0.1\"",
        &good[at + server.len()..],
    ]
    .concat();
    assert!(refused(&older, 0o755).contains("compiled for mb-server 0.0.1"));
}

#[test]
fn what_can_t_be_compiled_says_why() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("calc.wasm");
    let (code, _, complained) = compile(&[&file]);
    assert_eq!(code, Some(2), "{complained}");
    fs::write(&file, "no wasm").unwrap();
    let (code, _, complained) = compile(&[&file]);
    assert_eq!(code, Some(1));
    assert!(complained.contains("not WebAssembly"), "{complained}");
    fs::copy(component("services", "calc.wasm"), &file).unwrap();
    let (code, _, complained) = compile(&[&file, Path::new("-o"), &file]);
    assert_eq!(code, Some(2));
    assert!(complained.contains("would replace it"), "{complained}");
    assert_eq!(
        fs::read_dir(dir.path()).unwrap().count(),
        1,
        "nothing half done is left"
    );
}

/// Three times one server takes over from another on a listener that outlives
/// them: twice when the one before has ended, as systemd does, once while it
/// still drains.
#[test]
fn servers_follow_each_other_and_no_call_fails() {
    let dir = tempfile::tempdir().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let begin = || -> TestServer {
        let setup = Setup::empty(BINARY)
            .with_as("services", "granted/counter.wasm", "counter.wasm")
            .set(&format!(
                "state_dir = {:?}",
                dir.path().join("state").display().to_string()
            ))
            .set("[services.counter.grants]\nkeyvalue = true");
        let (setup, mut command) = setup.command_with(&listener);
        setup.start_with(&mut command)
    };
    let mut server = begin();
    let client = Client::builder(listener.local_addr().unwrap().to_string())
        .connect()
        .unwrap();
    let (stop, answered) = (AtomicBool::new(false), AtomicUsize::new(0));
    let last: Mutex<HashMap<usize, i64>> = Mutex::default();
    let add = |thread: usize| -> i64 {
        let payload = json!({"name": format!("n{thread}")}).to_string();
        let topic = Topic::parse("counter.add").unwrap();
        // Longer than a machine takes to start a server.
        let request = Request {
            timeout: Duration::from_secs(60),
            ..Request::new(topic, Payload::Json(&payload))
        };
        let mb_server::client::Answer::Json(text) = client.call(&request).expect("no call fails")
        else {
            panic!()
        };
        serde_json::from_str::<Value>(&text).unwrap()["value"]
            .as_i64()
            .unwrap()
    };
    thread::scope(|scope| {
        for thread in 0..4 {
            let (stop, answered, last, add) = (&stop, &answered, &last, &add);
            scope.spawn(move || {
                let mut calls = 0;
                while !stop.load(SeqCst) {
                    calls += 1;
                    // Each count is one more than the one before: no write is
                    // lost, and none is made twice.
                    assert_eq!(add(thread), calls);
                    answered.fetch_add(1, SeqCst);
                }
                last.lock().unwrap().insert(thread, calls);
            });
        }
        for round in 0..3 {
            let until = answered.load(SeqCst) + 50;
            server.until("calls are answered", |_| answered.load(SeqCst) >= until);
            server.signal("TERM");
            if round < 2 {
                assert_eq!(server.wait().code(), Some(0));
            }
            let mut before = std::mem::replace(&mut server, begin());
            assert_eq!(before.wait().code(), Some(0));
        }
        let until = answered.load(SeqCst) + 50;
        server.until("calls are answered", |_| answered.load(SeqCst) >= until);
        stop.store(true, SeqCst);
    });
    assert_eq!(last.into_inner().unwrap().len(), 4);
}

/// With the environment that the image sets.
#[test]
fn a_container_serves_nobody_without_authentication_unless_set_to() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("admin/deploy/Containerfile");
    let file = fs::read_to_string(file).unwrap();
    let image: Vec<_> = file
        .lines()
        .filter_map(|line| line.strip_prefix("ENV "))
        .flat_map(str::split_whitespace)
        .map(|pair| pair.split_once('=').unwrap())
        .filter(|(key, _)| !key.ends_with("_DIR"))
        .collect();
    assert!(image.contains(&("MB_HOST", "0.0.0.0")), "{image:?}");
    let setup = Setup::empty(BINARY);
    let mut command = setup.command();
    let output = command.envs(image.clone()).output().unwrap();
    let complained = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{complained}");
    assert!(
        complained.contains("MB_AUTH=required") && complained.contains("MB_ALLOW_UNSECURE=true"),
        "{complained}"
    );
    for said in [("MB_AUTH", "required"), ("MB_ALLOW_UNSECURE", "true")] {
        let setup = Setup::empty(BINARY);
        let mut command = setup.command();
        command.envs(image.clone()).envs([said]);
        drop(setup.start_with(&mut command));
    }
}

/// As of `ListenStream=8081`, which is `[::]`, for IPv4 too.
#[test]
fn an_inherited_socket_for_all_addresses_is_named_where_it_is_in_the_way() {
    let Ok(listener) = TcpListener::bind("[::]:0") else {
        eprintln!("skipped: there is no IPv6 here");
        return;
    };
    let address = listener.local_addr().unwrap();
    let start = |host: &str| {
        let setup = Setup::empty(BINARY).set(&format!("host = {host}"));
        let (setup, mut command) = setup.command_with(&listener);
        command.env("MB_ALLOW_UNSECURE", "true");
        let output = command.output().unwrap();
        drop(setup);
        (
            output.status.code(),
            String::from_utf8(output.stderr).unwrap(),
        )
    };
    for (hosts, wanted) in [
        ("\"127.0.0.1\"", "127.0.0.1"),
        ("[\"::\", \"0.0.0.0\"]", "0.0.0.0"),
    ] {
        let (code, complained) = start(hosts);
        assert_eq!(code, Some(1), "{complained}");
        for part in [
            format!("the socket {address} "),
            format!("ListenStream={wanted}:{}", address.port()),
            "BindIPv6Only=ipv6-only".into(),
            "host = \"::\"".into(),
        ] {
            assert!(complained.contains(&part), "{part}: {complained}");
        }
        assert!(!complained.contains("another server"), "{complained}");
    }
}

#[test]
fn an_inherited_socket_that_nobody_asked_for_is_named() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (setup, mut command) = Setup::empty(BINARY).command_with(&listener);
    command.args(["--host", "127.0.0.2"]);
    let output = command.output().unwrap();
    drop(setup);
    let complained = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{complained}");
    assert!(
        complained.contains(&listener.local_addr().unwrap().to_string()),
        "{complained}"
    );
}
