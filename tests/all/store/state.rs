//! The state folder on disks that are full, and files that are damaged. A file
//! that may not grow (`ulimit -f`) stands in for a full disk, which takes root;
//! `tests/load/disk.py` has a real one.

use std::{fs, path::Path, process::Command};

use crate::{BINARY, support::Setup};

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
    fs::write(state.join("store.redb"), "").unwrap();
    for action in ["export", "check"] {
        let (code, out, said) = store(&state, ":", &[action]);
        assert!(
            code == Some(1) && out.is_empty() && said.contains("is empty (0 bytes)"),
            "{said}"
        );
    }
}
