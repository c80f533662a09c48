//! The command line, as a user types it.

use std::{
    io::{Read as _, Write as _},
    net::TcpListener,
    os::{fd::OwnedFd, unix::net::UnixDatagram},
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use crate::{
    BINARY, setup, start,
    support::{absent, component, frame},
};

fn run(arguments: &[&str], input: &[u8]) -> (Option<i32>, String, String) {
    run_in(Command::new(BINARY).args(arguments), input)
}

fn run_in(command: &mut Command, input: &[u8]) -> (Option<i32>, String, String) {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A program that does not read its input may be gone before it is written.
    let _ = child.stdin.take().unwrap().write_all(input);
    let Output {
        status,
        stdout,
        stderr,
    } = child.wait_with_output().unwrap();
    (
        status.code(),
        String::from_utf8_lossy(&stdout).into(),
        String::from_utf8_lossy(&stderr).into(),
    )
}

/// Other processes and threads write to the same standard error; their lines
/// stand between ours only where a line is one write. Each write to a datagram
/// socket is a datagram.
#[test]
fn what_is_said_on_standard_error_is_written_in_whole_lines() {
    let server = start();
    let address = server.wire.to_string();
    let (ours, theirs) = UnixDatagram::pair().unwrap();
    let status = Command::new(BINARY)
        .args(["call", "absent.run", "{}", "--server", &address])
        .stderr(OwnedFd::from(theirs))
        .status()
        .unwrap();
    assert!(!status.success());
    ours.set_nonblocking(true).unwrap();
    let (mut buffer, mut writes) = ([0; 4096], 0);
    while let Ok(size) = ours.recv(&mut buffer) {
        writes += 1;
        let line = String::from_utf8_lossy(&buffer[..size]);
        assert!(line.ends_with('\n'), "{line:?}");
    }
    assert!(writes > 0);
}

#[test]
fn call() {
    let server = start();
    let address = server.wire.to_string();
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "{\"a\":2,\"b\":40}").unwrap();
    let at_file = format!("@{}", file.path().display());
    let check = |arguments: &[&str], input: &str, code: i32, out: &str, error: &str| {
        let all = [&["call", "--server", &address], arguments].concat();
        let (status, stdout, stderr) = run(&all, input.as_bytes());
        assert_eq!(
            (status, &*stdout),
            (Some(code), out),
            "{arguments:?}: {stderr}"
        );
        assert!(stderr.contains(error), "{arguments:?}: {stderr:?}");
        assert_eq!(
            error.is_empty(),
            stderr.is_empty(),
            "{arguments:?}: {stderr:?}"
        );
    };
    check(
        &["calc.add", "{\"a\":2,\"b\":40}"],
        "",
        0,
        "{\"sum\":42}\n",
        "",
    );
    check(
        &["calc.add", "-"],
        "{\"a\":2,\"b\":40}",
        0,
        "{\"sum\":42}\n",
        "",
    );
    check(&["calc.add", &at_file], "", 0, "{\"sum\":42}\n", "");
    check(&["echo.say"], "", 0, "null\n", "");
    check(&["echo.say", "-5"], "", 0, "-5\n", "");
    check(&["echo.say", "--binary", "a\nb"], "", 0, "a\nb", "");
    check(
        &["calc.divide", "{\"a\":1,\"b\":0}"],
        "",
        1,
        "",
        "DIVISION_BY_ZERO: ",
    );
    check(&["none.x"], "", 1, "", "NO_ROUTE_FOUND: no service none");
    check(
        &["echo.say", "--version", "2.0.0"],
        "",
        1,
        "",
        "\"available\":[\"1.0.0\"]",
    );
    check(
        &["hostile.spin", "--timeout", "1000"],
        "",
        1,
        "",
        "TIMEOUT: ",
    );
    check(&["echo.say", "{"], "", 2, "", "not JSON");
    check(&["echo.say", "@/nowhere"], "", 2, "", "can't read /nowhere");
    check(&["echo"], "", 2, "", "no topic");
    check(
        &["echo.say", "--version", "1"],
        "",
        2,
        "",
        "MAJOR.MINOR.PATCH",
    );
    check(&["echo.say", "--timeout", "0"], "", 2, "", "1..=3600000");
}

#[test]
fn a_call_that_failed_names_its_request_id_which_why_takes() {
    let server = start();
    let (address, admin) = (server.wire.to_string(), server.admin.to_string());
    let call = |arguments: &[&str], input: &str| {
        let all = [&["call", "--server", &address], arguments].concat();
        run(&all, input.as_bytes())
    };
    let (status, _, error) = call(&["calc.divide", "{\"a\":1,\"b\":0}"], "");
    assert_eq!(status, Some(1), "{error}");
    let id = error
        .lines()
        .find_map(|line| line.strip_prefix("request id: "));
    let id = id.unwrap_or_else(|| panic!("{error}"));
    let (status, out, error) = run(&["why", id, "--admin", &admin], b"");
    assert_eq!(status, Some(0), "{error}");
    assert!(out.contains("DIVISION_BY_ZERO"), "{out}");

    let (_, _, error) = call(&["nobody.here", "--request-id", "mine.1"], "");
    assert!(error.ends_with("request id: mine.1\n"), "{error}");
    let (_, out, _) = run(&["why", "mine.1", "--admin", &admin], b"");
    assert!(out.contains("NO_ROUTE_FOUND"), "{out}");
    let (status, _, error) = call(&["echo.say", "1", "--request-id", "mine.2"], "");
    assert_eq!((status, &*error), (Some(0), ""));
    let (status, _, error) = call(&["echo.say", "1", "--request-id", "a b"], "");
    assert!(status == Some(2) && error.contains("1 to 64"), "{error}");

    let lines = "{\"topic\":\"nobody.here\",\"id\":\"mine.3\"}\n";
    let (_, out, _) = call(&["--requests", "-"], lines);
    assert!(out.contains("\"requestId\":\"mine.3\""), "{out}");
}

#[test]
fn call_where_nobody_answers() {
    // None that the system gives to another test meanwhile.
    let closed = "127.0.0.1:1";
    let (status, _, error) = run(&["call", "--server", closed, "echo.say"], b"");
    assert_eq!(status, Some(3));
    assert!(
        error.contains(closed) && error.contains("is the server running?"),
        "{error}"
    );
    for server in ["", "nonsense", "127.0.0.1:x", ":80", "a:65536"] {
        let (status, _, error) = run(&["call", "--server", server, "echo.say"], b"");
        assert_eq!(status, Some(2), "{server}: {error}");
        assert!(error.contains("HOST:PORT"), "{error}");
    }
    let foreign = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = foreign.local_addr().unwrap().to_string();
    let http = std::thread::spawn(move || {
        let (mut stream, _) = foreign.accept().unwrap();
        stream
            .write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            .unwrap();
        // Until the client has gone: a reset could overtake what was said.
        let _ = stream.read_to_end(&mut Vec::new());
    });
    let (status, _, error) = run(&["call", "--server", &address, "echo.say"], b"");
    http.join().unwrap();
    assert_eq!(status, Some(3));
    assert!(error.contains("does not speak this protocol"), "{error}");
}

#[test]
fn inspect() {
    let calc = component("services", "calc.wasm").display().to_string();
    let (status, out, _) = run(&["inspect", &calc], b"");
    assert_eq!(status, Some(0));
    for part in ["calc", "1.0.0", "divide", "mb:service/", "sha256:", "bytes"] {
        assert!(out.contains(part), "{part} is not in {out}");
    }
    let liar = component("guests", "liar.wasm").display().to_string();
    let (status, out, error) = run(&["inspect", &liar], b"");
    assert_eq!(status, Some(1));
    assert!(error.contains("honest"), "{error}");
    for part in ["liar.wasm", "sha256:", "bytes"] {
        assert!(out.contains(part), "{part} is not in {out}");
    }
    let (status, out, error) = run(&["inspect", "/nowhere\x1b[2J.wasm"], b"");
    assert_eq!((status, &*out), (Some(1), ""));
    assert!(!error.contains('\x1b'), "{error:?}");
}

#[test]
fn check_says_what_is_set_and_where() {
    let file = tempfile::NamedTempFile::with_suffix(".toml").unwrap();
    std::fs::write(file.path(), "max_threads = 70\n[admin]\nport = 1234\n").unwrap();
    let path = file.path().display().to_string();
    let check = |arguments: &[&str], environment: &[(&str, &str)]| {
        let mut command = Command::new(BINARY);
        command
            .args(["check", "--config", &path])
            .args(arguments)
            .envs(environment.iter().copied());
        run_in(&mut command, b"")
    };
    let (status, out, _) = check(
        &["--port", "99"],
        &[("MB_IDLE_TIMEOUT", "5s"), ("MB_ADMIN__PORT", "77")],
    );
    assert_eq!(status, Some(0));
    let line = |start: &str| {
        out.lines()
            .find(|line| line.starts_with(start))
            .unwrap_or_else(|| panic!("{start}: {out}"))
    };
    assert!(line("port = 99").ends_with("# flag --port"));
    assert!(line("max_threads = 70").ends_with(&format!("# {path}")));
    assert!(line("idle_timeout = \"5s\"").ends_with("# environment variable MB_IDLE_TIMEOUT"));
    assert!(line("admin.port = 77").ends_with("# environment variable MB_ADMIN__PORT"));
    assert!(line("plain = true").ends_with("# default"));
    line("# services folder");
    let (status, _, error) = check(&["--services", "/nowhere"], &[]);
    assert_eq!(status, Some(2));
    assert!(
        error.contains("/nowhere") && error.contains("--services"),
        "{error}"
    );
    for (url, file, name) in [
        ("redis", "MB_STORE__PASSWORD_FILE", "store.password_file"),
        ("rediss", "MB_STORE__CA", "store.ca"),
    ] {
        let url = format!("{url}://localhost");
        let (status, _, error) = check(&[], &[("MB_STORE__URL", &url), (file, "/nowhere/file")]);
        assert_eq!(status, Some(2), "{error}");
        assert!(
            error.contains(name) && error.contains("/nowhere/file"),
            "{error}"
        );
    }
    let mut limited = Command::new("sh");
    limited.args(["-c", "ulimit -n 500; exec \"$0\" check", BINARY]);
    let (status, _, error) = run_in(&mut limited, b"");
    assert_eq!(status, Some(0));
    assert!(error.contains("the system allows 500"), "{error}");

    for (environment, parts) in [
        (("MB_PROT", "1"), ["unknown setting `prot`", "MB_PROT"]),
        (
            ("MB_MAX_THREADS", "0"),
            [
                "`max_threads` is 0, allowed is 8 to 16384",
                "MB_MAX_THREADS",
            ],
        ),
        (("MB_LOG", "mb_server=loud"), ["`log` must be", "MB_LOG"]),
    ] {
        let (status, _, error) = check(&[], &[environment]);
        assert_eq!(status, Some(2));
        assert!(parts.iter().all(|part| error.contains(part)), "{error}");
    }
    let (status, _, error) = run(&["check", "--config", "/nowhere.toml"], b"");
    assert_eq!(status, Some(2));
    assert!(error.contains("/nowhere.toml"), "{error}");
}

#[test]
fn serve_refuses_what_is_not_safe_or_not_possible() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().display().to_string();
    let serve = |arguments: &[&str]| {
        let all = [
            &[
                "serve",
                "--services",
                &folder,
                "--port",
                "0",
                "--admin-port",
                "0",
            ],
            arguments,
        ]
        .concat();
        run(&all, b"")
    };
    let (status, out, error) = serve(&["--host", "0.0.0.0"]);
    assert_eq!((status, &*out), (Some(2), ""));
    assert!(error.contains("allow_unsecure = true"), "{error}");
    let (status, _, error) = serve(&["--admin-host", "::"]);
    assert_eq!(status, Some(2));
    assert!(error.contains("admin.host"), "{error}");
    let (status, _, error) = serve(&["--services", "/nowhere"]);
    assert_eq!(status, Some(2), "{error}");
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let (status, _, error) = run(
        &[
            "serve",
            "--services",
            &folder,
            "--port",
            &port,
            "--admin-port",
            "0",
        ],
        b"",
    );
    assert_eq!(status, Some(1));
    assert!(
        error.contains(&port) && error.contains("--port 0"),
        "{error}"
    );
    let (status, _, error) = run(
        &[
            "serve",
            "--services",
            &folder,
            "--port",
            "0",
            "--admin-port",
            &port,
        ],
        b"",
    );
    assert_eq!(status, Some(1));
    assert!(error.contains("--admin-port 0"), "{error}");
}

#[test]
fn help_and_mistakes() {
    for arguments in [
        &["--help"][..],
        &["serve", "--help"],
        &["call", "--help"],
        &["--version"],
    ] {
        assert_eq!(run(arguments, b"").0, Some(0), "{arguments:?}");
    }
    for arguments in [
        &[][..],
        &["srve"],
        &["serve", "--prot", "1"],
        &["call"],
        &["inspect"],
    ] {
        let (status, _, error) = run(arguments, b"");
        assert_eq!(status, Some(2), "{arguments:?}");
        assert!(error.contains("Usage"), "{error}");
    }
}

#[test]
fn the_store_is_backed_up_and_restored() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("mb.toml");
    let state = |name: &str| {
        std::fs::write(&config, format!("state_dir = {:?}", dir.path().join(name))).unwrap();
        config.to_str().unwrap()
    };
    let (code, _, error) = run(&["store", "export", "--config", state("none")], b"");
    assert!(
        code == Some(1) && error.contains("there is no store"),
        "{error}"
    );
    let backup = b"{\"kind\":\"mb-server store\",\"format\":1}\n\
        {\"service\":\"counter\",\"bucket\":\"b\",\"key\":\"k\",\"value\":\"NDI=\"}\n{\"entries\":1}\n";
    let (code, _, error) = run(&["store", "import", "-", "--config", state("one")], backup);
    assert_eq!((code, &*error), (Some(0), "1 entries\n"));
    let (code, out, _) = run(&["store", "export", "--config", state("one")], b"");
    assert_eq!((code, out.as_bytes()), (Some(0), backup.as_slice()));
    let (code, _, error) = run(&["store", "import", "-", "--config", state("one")], backup);
    assert!(code == Some(1) && error.contains("--merge"), "{error}");
    let (code, _, error) = run(
        &["store", "import", "-", "--config", state("two")],
        &backup[..60],
    );
    assert!(
        code == Some(1) && error.contains("nothing was written"),
        "{error}"
    );
}

#[test]
fn a_server_that_is_stopped_is_given_up() {
    let state = tempfile::tempdir().unwrap();
    let server = setup()
        .set(&format!("state_dir = {:?}", state.path()))
        .start();
    let config = server.settings_file().display().to_string();
    let (wire, admin) = (server.wire.to_string(), server.admin.to_string());
    server.signal("STOP");
    let stat = format!("/proc/{}/stat", server.child.id());
    server.until("it is stopped", |_| {
        std::fs::read_to_string(&stat).unwrap().contains(") T ")
    });
    let give_up = |arguments: &[&str], expected: &str| {
        let begun = Instant::now();
        let (status, _, error) = run(arguments, b"");
        assert_eq!(status, Some(3), "{arguments:?}: {error}");
        assert!(error.contains(expected), "{arguments:?}: {error}");
        begun.elapsed()
    };
    let operator = ["--admin", &admin, "--config", &config];
    let client = ["--server", &wire, "--timeout", "1000"];
    let give_up = &give_up;
    std::thread::scope(|scope| {
        for command in [
            &["status"][..],
            &["why", "x"],
            &["service", "rollback", "echo"],
        ] {
            let arguments = [command, &operator].concat();
            scope.spawn(move || give_up(&arguments, "is the server stopped"));
        }
        for command in [&["call", "echo.say"][..], &["ping"]] {
            let arguments = [command, &client].concat();
            scope.spawn(move || {
                let took = give_up(&arguments, "no answer to the hello in time; is it stopped");
                // Where nothing else is said it takes no less than 5 s.
                assert!(took < Duration::from_secs(5), "{took:?}");
            });
        }
    });
}

#[test]
fn a_token_does_not_leave_the_machine_unencrypted() {
    let token = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(token.path(), "secret").unwrap();
    let token = token.path().display().to_string();
    let state = tempfile::tempdir().unwrap();
    let config = state.path().join("mb.toml");
    std::fs::write(&config, format!("state_dir = {:?}", state.path())).unwrap();
    let config = config.display().to_string();
    // A network for documentation: nobody is there.
    let client = ["--server", "192.0.2.1:8081", "--token-file", &token];
    let operator = ["--admin", "192.0.2.1:9090", "--config", &config];
    for (command, flags, code) in [
        (&["call", "echo.say"][..], client, 3),
        (&["ping"], client, 3),
        (&["bench"], client, 2),
        (&["service", "rollback", "echo"], operator, 2),
    ] {
        let (status, _, error) = run(&[command, &flags].concat(), b"");
        assert_eq!(status, Some(code), "{command:?}: {error}");
        let expected = ["the token was not sent", "--allow-unsecure"];
        assert!(
            expected.iter().all(|part| error.contains(part)),
            "{command:?}: {error}"
        );
    }
}

/// A server that answers a hello, and one request with what it is given.
fn answer_once(answer: &'static str) -> (String, std::thread::JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let serve = move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut talk = |answer: &dyn Fn(&str) -> String| {
            let mut head = [0; 8];
            stream.read_exact(&mut head).unwrap();
            let length = u32::from_be_bytes(head[..4].try_into().unwrap());
            let mut body = vec![0; length as usize];
            stream.read_exact(&mut body).unwrap();
            let line = String::from_utf8(body).unwrap();
            let id = line.lines().next().unwrap().split(':').nth(3).unwrap();
            let body = answer(id);
            let head = [u32::try_from(body.len()).unwrap().to_be_bytes(), [0; 4]].concat();
            stream
                .write_all(&[&head, body.as_bytes()].concat())
                .unwrap();
        };
        talk(&|id| {
            format!(
                "RESPONSE:system.hello:1.0.0:{id}\n{{\"limits\":{{\"keepAliveIntervalMs\":1000}}}}"
            )
        });
        talk(&|id| answer.replace("ID", id));
        // Until the client has gone.
        let _ = stream.read_to_end(&mut Vec::new());
    };
    (address, std::thread::spawn(serve))
}

#[test]
fn a_terminal_gets_no_control_characters_of_answers() {
    let good = "RESPONSE:echo.say:1.0.0:ID\n\"\x1b]0;evil\x07 \u{9b}2J\"";
    let bad = "ERROR:echo.say:1.0.0:ID\n{\"code\":\"X\",\"message\":\"\\u001b[2J\",\"timestamp\":\
               \"2026-01-01T00:00:00.000Z\",\"origin\":\"service\",\"details\":{\"a\":\"\u{9b}2J\"}}";
    for (answer, expected) in [(good, "\\u{1b}]0;evil\\u{7} \\u{9b}2J"), (bad, "\\u{9b}2J")] {
        let (address, served) = answer_once(answer);
        let command = format!("{BINARY} call --server {address} echo.say");
        let mut script = Command::new("script");
        script
            .args(["-qec", &command, "/dev/null"])
            .stdin(Stdio::null());
        match script.output() {
            Err(error) => return absent("script", &error),
            Ok(output) => {
                let shown = String::from_utf8_lossy(&output.stdout);
                assert!(shown.contains(expected), "{shown:?}");
                assert!(!shown.contains(['\x1b', '\x07', '\u{9b}']), "{shown:?}");
            }
        }
        served.join().unwrap();
    }
    // Another program gets what came.
    let (address, served) = answer_once(good);
    let (status, out, error) = run(&["call", "--server", &address, "echo.say"], b"");
    served.join().unwrap();
    assert_eq!((status, &*error), (Some(0), ""));
    assert_eq!(out, "\"\x1b]0;evil\x07 \u{9b}2J\"\n");
}

/// Each of these ended in a panic or by using up the memory.
#[test]
fn what_is_too_large_is_refused_with_a_text() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("mb.toml");
    let long = "x".repeat(65_000);
    std::fs::write(
        &config,
        format!("services_dir = \".\"\n[services.calc.grants.config]\nkey = \"{long}\"\n"),
    )
    .unwrap();
    let config = config.to_str().unwrap();
    let mut check = Command::new(BINARY);
    check.args(["check", "--config", config]).current_dir(&dir);
    let (code, shown, problem) = run_in(&mut check, b"");
    assert!(code == Some(0) && shown.contains(&long), "{problem}");
    let tokens = dir.path().join("tokens.json");
    let tokens = tokens.to_str().unwrap();
    for (time, why) in [
        ("9000years", "100 years"),
        ("500000000000years", "100 years"),
        ("0s", "revoke"),
    ] {
        let new = ["token", "new", "ann", "--file", tokens, "--expires", time];
        let (code, _, problem) = run(&new, b"");
        assert!(code == Some(2) && problem.contains(why), "{problem}");
    }
    let (code, _, problem) = run(&["call", "calc.add", "@/dev/zero", "--binary"], b"");
    assert!(
        code == Some(2) && problem.contains("/dev/zero: exceeds the limit of 67108864 bytes"),
        "{problem}"
    );
    let much = ["bench", "--size", "67000000", "--pipeline", "10000"];
    let (code, _, problem) = run(&much, b"");
    assert!(
        code == Some(2) && problem.contains("--pipeline"),
        "{problem}"
    );
    let mut deep = Command::new(BINARY);
    deep.arg("check").env("MB_HOST", "[".repeat(60_000));
    let (code, _, problem) = run_in(&mut deep, b"");
    assert!(code == Some(2) && problem.contains("MB_HOST"), "{problem}");
}

/// Answers the first connection with these bytes, and then without end with more
/// of them.
fn hostile(begin: Vec<u8>, more: Vec<u8>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let _ = stream.read(&mut [0; 4096]);
            let mut goes_on = stream.write_all(&begin).is_ok() && !more.is_empty();
            while goes_on {
                goes_on = stream.write_all(&more).is_ok();
            }
        }
    });
    address
}

#[test]
fn a_server_that_answers_nonsense_is_named_so() {
    for page in ["[]", "\"x\"", "5", "{\"calls\":7}"] {
        let length = page.len();
        let answer = format!(
            "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{page}"
        );
        let address = hostile(answer.into(), Vec::new());
        let (code, _, problem) = run(&["why", "some-id", "--admin", &address], b"");
        assert!(
            code == Some(1) && !problem.contains("panic"),
            "{code:?} {problem}"
        );
    }
    // One that dies before it answers.
    let address = hostile(Vec::new(), Vec::new());
    let (code, _, problem) = run(&["why", "some-id", "--admin", &address], b"");
    assert!(
        code == Some(3) && problem.contains("closed the connection without an answer"),
        "{code:?} {problem}"
    );
    // The port of the wire has pages of the same names.
    let server = start();
    let wire = server.wire.to_string();
    let dir = tempfile::tempdir().unwrap();
    let token = dir.path().join("token");
    std::fs::write(&token, "a token of enough characters for this").unwrap();
    let token = token.to_str().unwrap();
    for command in [
        &["status"][..],
        &["why", "some-id"],
        &["service", "disable", "echo", "--token-file", token],
    ] {
        let arguments = [command, &["--admin", &wire]].concat();
        let (code, shown, problem) = run(&arguments, b"");
        assert!(
            code == Some(1) && problem.contains("this is no admin endpoint") && shown.is_empty(),
            "{command:?}: {code:?} {shown} {problem}"
        );
    }
    // Nothing at all.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = silent.local_addr().unwrap().to_string();
    let bench = [
        "bench",
        "-c",
        "1",
        "-d",
        "1",
        "--warm-up",
        "0",
        "--server",
        &address,
    ];
    let (code, _, problem) = run(&bench, b"");
    assert!(
        code == Some(3) && problem.contains("no answer to the hello in time"),
        "{code:?} {problem}"
    );
    // A frame of 4 GiB, once it has let us in.
    let hello = frame(0, b"RESPONSE:system.hello:1.0.0:hello\n{}");
    let address = hostile(
        [&*hello, &[0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0]].concat(),
        vec![b'x'; 1 << 20],
    );
    let (code, _, problem) = run(
        &["bench", "-c", "1", "--count", "1", "--server", &address],
        b"",
    );
    assert!(
        code == Some(3) && problem.contains("more than 68157440 bytes"),
        "{code:?} {problem}"
    );
}

#[test]
fn a_benchmark_counts_what_was_not_answered() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        for _ in 0..10 {
            let _ = stream.read(&mut [0; 4096]);
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n42");
        }
        // Open until the benchmark ends, and silent.
        let _ = std::io::copy(&mut stream, &mut std::io::sink());
    });
    let bench = "bench --http --json -c 1 -d 2 --warm-up 0 --rate 20 --server";
    let bench: Vec<_> = bench.split(' ').chain([&*address]).collect();
    let (code, result, problem) = run(&bench, b"");
    assert!(
        code == Some(1) && problem.contains("had no answer at the end, the oldest for 1."),
        "{code:?} {problem}"
    );
    let result: serde_json::Value = serde_json::from_str(&result).unwrap();
    assert_eq!(result["answers"], 10);
    // Of 40 that were due; half of all had to wait.
    assert!(result["unanswered"].as_u64().unwrap() >= 28, "{result}");
    assert!(
        result["micros"]["p50"].as_f64().unwrap() > 100_000.0,
        "{result}"
    );
    assert!(result["micros"]["max"].as_f64().unwrap() > 1e6, "{result}");
}

#[test]
fn no_timeout_is_too_long_for_the_client() {
    let server = start();
    let longest = Duration::MAX;
    let client = mb_server::client::Client::builder(server.wire.to_string())
        .connect_timeout(longest)
        .handshake_timeout(longest)
        .write_timeout(longest)
        .keep_alive(longest)
        .connect()
        .unwrap();
    let topic = mb_server::wire::Topic::parse("system.ping").unwrap();
    let request = mb_server::client::Request {
        timeout: longest,
        ..mb_server::client::Request::new(topic, mb_server::wire::Payload::Json("{}"))
    };
    client.call(&request).unwrap();
}

#[test]
fn what_cannot_be_written_is_a_failure() {
    let dir = tempfile::tempdir().unwrap();
    let tokens = dir.path().join("tokens.json");
    let tokens = tokens.to_str().unwrap();
    for arguments in [
        &["token", "new", "ann", "--file", tokens][..],
        &["token", "list", "--file", tokens],
        &["completions", "bash"],
    ] {
        let full = std::fs::OpenOptions::new()
            .write(true)
            .open("/dev/full")
            .unwrap();
        let mut command = Command::new(BINARY);
        let done = command.args(arguments).stdout(full).output().unwrap();
        let problem = String::from_utf8_lossy(&done.stderr);
        assert_eq!(done.status.code(), Some(1), "{arguments:?}: {problem}");
        assert!(
            problem.contains("print") || problem.contains("write"),
            "{problem}"
        );
    }
}

/// As `head -1` does: what it does not read is not to be done any more.
#[test]
fn a_reader_that_has_gone_ends_what_is_written_for_it() {
    let server = start();
    let address = server.wire.to_string();
    for arguments in [
        &["call", "--requests", "-", "--server", &address][..],
        &[
            "ping",
            "-c",
            "1000000",
            "--interval",
            "1",
            "--server",
            &address,
        ],
    ] {
        let mut child = Command::new(BINARY)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut input = child.stdin.take().unwrap();
        std::thread::spawn(move || {
            let line = b"{\"topic\":\"system.ping\"}\n";
            while input.write_all(line).is_ok() {}
        });
        let mut first = [0; 1];
        let mut output = child.stdout.take().unwrap();
        output.read_exact(&mut first).unwrap();
        drop(output);
        assert_eq!(child.wait().unwrap().code(), Some(0), "{arguments:?}");
    }
}

/// Once it takes SIGTERM for a wish, it takes SIGHUP for one, too: loading takes
/// as long as its compiler does.
#[test]
fn a_hangup_while_it_starts_is_no_end() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = Command::new(BINARY)
        .args(["serve", "--port", "0", "--admin-port", "0", "--services"])
        .arg(dir.path())
        .env("MB_STATE_DIR", dir.path().join("state"))
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let status = format!("/proc/{}/status", server.id());
    let takes_term = || {
        let status = std::fs::read_to_string(&status).unwrap();
        let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:"));
        u64::from_str_radix(caught.unwrap().trim(), 16).unwrap() & (1 << 14) != 0
    };
    let begun = Instant::now();
    while !takes_term() {
        assert!(begun.elapsed() < Duration::from_secs(30));
        std::thread::yield_now();
    }
    let pid = rustix::process::Pid::from_child(&server);
    rustix::process::kill_process(pid, rustix::process::Signal::HUP).unwrap();
    let mut output = std::io::BufReader::new(server.stdout.take().unwrap());
    let mut line = String::new();
    while !line.starts_with("ready") {
        line.clear();
        let read = std::io::BufRead::read_line(&mut output, &mut line).unwrap();
        assert!(read > 0, "it has ended");
    }
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    assert_eq!(server.wait().unwrap().code(), Some(0));
}
