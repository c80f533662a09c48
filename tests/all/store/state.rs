//! The state folder on disks that are full, and files that are damaged. A file
//! that may not grow (`ulimit -f`) stands in for a full disk, which takes root;
//! `tests/load/disk.py` has a real one.

use std::{fs, io::Write as _, path::Path, process::Command, thread};

use rustix::process::{Pid, Resource, Rlimit, prlimit};

use crate::{
    BINARY,
    support::{RawClient, Setup, frame, http},
};

/// Files of so many blocks of 512 bytes, and an error instead of a signal.
fn files_of(blocks: u32) -> String {
    format!("trap '' XFSZ; ulimit -f {blocks}")
}

fn storing() -> Setup {
    Setup::empty(BINARY).with("guests", "greedy.wasm").set(
        "[services.greedy.grants]\nkeyvalue = true\nquota = \"64MiB\"\ncalls = [\"greedy.call\"]",
    )
}

/// Runs `mb-server store` after a command of the shell.
fn store(state: &Path, before: &str, arguments: &[&str]) -> (Option<i32>, String, String) {
    let mut command = Command::new("sh");
    command
        .arg("-c")
        .arg(format!("{before}; exec \"$0\" \"$@\""))
        .args([BINARY, "store"])
        .args(arguments)
        .env("MB_STATE_DIR", state);
    let output = command.output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (
        output.status.code(),
        text(&output.stdout),
        text(&output.stderr),
    )
}

#[test]
fn a_first_start_on_a_full_disk_leaves_nothing_that_a_later_start_refuses() {
    let home = tempfile::tempdir().unwrap();
    let set = format!("state_dir = {:?}", home.path());
    let start = |before: &str| {
        let setup = Setup::empty(BINARY)
            .with("guests", "greedy.wasm")
            .set(&set)
            .set("[services.greedy.grants]\nkeyvalue = true\ncalls = [\"greedy.call\"]")
            .after(before);
        setup.start()
    };
    let full = start(&files_of(0));
    full.wait_for_log("nothing can be changed over the admin endpoint");
    let ready = full.json("/readyz");
    assert_eq!(ready["store"]["status"], "unavailable", "{ready}");
    assert_eq!(full.metric("mb_store_failing"), 1);
    drop(full);
    for left in ["admin.token", "store.redb"] {
        assert!(!home.path().join(left).exists(), "{left}");
    }
    // What earlier programs left.
    fs::write(home.path().join("store.redb"), vec![0; 73_728]).unwrap();
    let again = start(":");
    let warned = again.wait_for_log("store.redb is empty (73728 bytes)");
    assert!(warned.contains("WARN"), "{warned}");
    assert_eq!(again.json("/readyz")["store"]["status"], "ok");
    let stored = again.connect().ask("greedy.kv-quota", "").json();
    assert!(stored["count"].is_number(), "{stored}");
    let token = fs::read_to_string(home.path().join("admin.token")).unwrap();
    assert_eq!(token.trim().len(), 64);
}

#[test]
fn a_full_disk_is_said_once_and_shown_until_there_is_room() {
    let server = storing().after(&files_of(8192)).start();
    let mut client = server.connect();
    for _ in 0..20 {
        let full = client.ask("greedy.kv-quota", "").json();
        assert!(full.to_string().contains("the disk is full"), "{full}");
    }
    let line = server.wait_for_log("writes were refused");
    assert!(line.contains("ERROR") && line.contains("the disk is full"));
    let ready = server.json("/readyz");
    let row = &ready["store"];
    assert_eq!(
        (&row["status"], &row["error"]),
        (&"failing".into(), &"the disk is full".into()),
        "{ready}"
    );
    assert!(row["full"].as_u64().unwrap() >= 20, "{row}");
    assert!(row["fileBytes"].as_u64().unwrap() > 1_000_000, "{row}");
    assert_eq!(server.metric("mb_store_failing"), 1);
    let (_, log) = server.get("/log?contains=services%20get");
    assert_eq!(log.matches("services get STORE_FAILED").count(), 1, "{log}");
}

/// A server of `counter`, whose values are in a folder.
fn counting(state: &Path) -> Setup {
    Setup::empty(BINARY)
        .with_as("services", "granted/counter.wasm", "counter.wasm")
        .set(&format!("state_dir = {state:?}"))
        .set("[services.counter.grants]\nkeyvalue = true")
}

const ADD: &str = r#"{"name":"n"}"#;

#[test]
fn an_answer_whose_write_fails_is_a_failure_of_the_store() {
    let home = tempfile::tempdir().unwrap();
    let server = counting(home.path()).after("trap '' XFSZ").start();
    let mut client = server.connect();
    let publish = |client: &mut RawClient| {
        let message = format!("PUBLISH:counter.add:1.0.0:p\n{ADD}");
        client.send(&frame(0, message.as_bytes()));
        client.message()
    };
    let over_http = || {
        let request = format!(
            "POST /call/counter.add HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\
             Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{ADD}",
            ADD.len()
        );
        http(server.wire, &request)
    };
    assert_eq!(client.ask("counter.add", ADD).json()["value"], 1);
    assert_eq!(publish(&mut client).json()["delivered"], 1);
    assert_eq!(over_http(), (200, r#"{"value":3}"#.into()));

    let pid = Pid::from_child(&server.child);
    let nothing = Rlimit {
        current: Some(0),
        maximum: None,
    };
    let before = prlimit(Some(pid), Resource::Fsize, nothing).unwrap();
    // The service has returned 4, 5 and 6.
    let failed = client.ask("counter.add", ADD);
    let is_full = "the disk is full";
    assert_eq!(failed.code(), "STORE_FAILED", "{failed:?}");
    assert_eq!(failed.json()["message"], is_full);
    assert_eq!(failed.json()["origin"], "service");
    assert_eq!(publish(&mut client).code(), "STORE_FAILED");
    let (status, body) = over_http();
    assert!(
        status == 422 && body.contains("STORE_FAILED"),
        "{status} {body}"
    );
    // Without an id nobody is answered, but it is counted.
    client.send(&frame(
        0,
        format!("PUBLISH:counter.add:1.0.0\n{ADD}").as_bytes(),
    ));
    server.until("the failure is counted", |server| {
        server.metric("mb_publish_failures_total") == 1
    });
    assert_eq!(publish(&mut client).code(), "STORE_FAILED");
    let past = server.json("/calls/past").to_string();
    assert_eq!(
        past.matches(r#""outcome":"STORE_FAILED""#).count(),
        5,
        "{past}"
    );

    prlimit(Some(pid), Resource::Fsize, before).unwrap();
    assert_eq!(client.ask("counter.add", ADD).json()["value"], 4);
}

#[test]
fn whatever_was_answered_outlives_the_server() {
    let home = tempfile::tempdir().unwrap();
    let mut server = counting(home.path()).start();
    // More at once than calls that one connection may leave behind.
    let mut client = server.connect();
    let requests = 0..200;
    for id in requests.clone() {
        client.request("counter.add", &id.to_string(), ADD);
    }
    let value = |client: &mut RawClient| client.message().json()["value"].as_u64();
    let mut values: Vec<_> = requests.map(|_| value(&mut client).unwrap()).collect();
    values.sort_unstable();
    assert!(values.into_iter().eq(1..=200), "each once");
    let writers = (0..6).map(|_| {
        let mut client = server.connect();
        thread::spawn(move || {
            let request = format!("REQUEST:counter.add:1.0.0:a\n{ADD}");
            let mut last = 0;
            while client
                .stream
                .write_all(&frame(0, request.as_bytes()))
                .is_ok()
                && matches!(client.stream.peek(&mut [0]), Ok(1))
            {
                last = client.message().json()["value"].as_u64().unwrap();
            }
            last
        })
    });
    let writers: Vec<_> = writers.collect();
    server.until("there is a load", |server| server.calls() > 1000);
    server.child.kill().unwrap();
    let answered = writers.into_iter().map(|writer| writer.join().unwrap());
    let answered = answered.max().unwrap();
    assert!(answered > 500, "{answered}");
    server.child.wait().unwrap();
    let again = counting(home.path()).start();
    let found = again.connect().ask("counter.get", ADD).json()["value"].clone();
    // One of each connection may have been written, and not answered.
    let found = found.as_u64().unwrap();
    assert!(
        (answered..=answered + 6).contains(&found),
        "{answered} {found}"
    );
}

#[test]
fn a_backup_onto_a_full_disk_blames_the_backup_and_leaves_no_part() {
    let home = tempfile::tempdir().unwrap();
    let (state, out) = (home.path().join("state"), home.path().join("out"));
    fs::create_dir(&out).unwrap();
    let lines = (0..500).map(|i| {
        format!(
            "{{\"service\":\"a\",\"bucket\":\"\",\"key\":\"{i}\",\"value\":\"{}\"}}\n",
            "QUJD".repeat(100)
        )
    });
    let backup = format!(
        "{{\"kind\":\"mb-server store\",\"format\":1}}\n{}{{\"entries\":500}}\n",
        lines.collect::<String>()
    );
    let (from, to) = (home.path().join("from.jsonl"), out.join("to.jsonl"));
    fs::write(&from, backup).unwrap();
    let (code, _, said) = store(&state, ":", &["import", from.to_str().unwrap()]);
    assert_eq!((code, &*said), (Some(0), "500 entries\n"));
    let before = fs::read(state.join("store.redb")).unwrap();
    let to = to.to_str().unwrap();
    let (code, _, said) = store(&state, &files_of(8), &["export", to]);
    assert!(
        code == Some(1) && said.contains("to.jsonl: File too large") && !said.contains("redb"),
        "{said}"
    );
    assert_eq!(fs::read_dir(&out).unwrap().count(), 0);
    let (code, _, said) = store(&state, ":", &["export", to]);
    assert_eq!((code, &*said), (Some(0), "500 entries\n"));
    let (code, _, said) = store(&state, ":", &["export", to]);
    assert!(
        code == Some(1) && said.contains("to.jsonl: there is"),
        "{said}"
    );
    let (code, _, said) = store(&state, ":", &["export", "-"]);
    assert!(code == Some(0), "{said}");
    let (code, _, said) = store(&state, ":", &["check"]);
    assert_eq!((code, &*said), (Some(0), "500 entries\n"));
    assert!(
        fs::read(state.join("store.redb")).unwrap() == before,
        "export and check change nothing"
    );
    let (code, _, said) = store(&state, ":", &["compact"]);
    assert!(code == Some(0) && said.contains("bytes before"), "{said}");

    // A bit of one value.
    let mut bytes = before;
    let at = bytes.windows(9).position(|bytes| bytes == b"ABCABCABC");
    bytes[at.unwrap() + 4] ^= 1;
    fs::write(state.join("store.redb"), &bytes).unwrap();
    let (code, _, said) = store(&state, ":", &["check"]);
    assert!(
        code == Some(1)
            && said.contains("damaged: the value of key \"")
            && said.contains("checksums"),
        "{said}"
    );
    let (code, out, said) = store(&state, ":", &["export"]);
    assert!(
        code == Some(1) && said.contains("499 entries; 1 damaged") && out.lines().count() == 501,
        "{said}"
    );
    assert_eq!(out.lines().last(), Some("{\"entries\":499,\"damaged\":1}"));
    // So does a running server.
    let setup = Setup::empty(BINARY).with_as("services", "granted/counter.wasm", "counter.wasm");
    let server = setup
        .set(&format!(
            "state_dir = {state:?}\n[services.counter.grants]\nkeyvalue = true"
        ))
        .start();
    let (admin, config) = (server.admin.to_string(), server.settings_file());
    let export = [
        "export",
        "-",
        "--admin",
        &admin,
        "--config",
        config.to_str().unwrap(),
    ];
    let (code, _, said) = store(&state, ":", &export);
    assert!(
        code == Some(1) && said.contains("499 entries; 1 damaged places"),
        "{said}"
    );
    drop(server);
    fs::write(state.join("store.redb"), "").unwrap();
    for action in ["export", "check"] {
        let (code, out, said) = store(&state, ":", &[action]);
        assert!(
            code == Some(1) && out.is_empty() && said.contains("is empty (0 bytes)"),
            "{said}"
        );
    }
}
