//! The client library and the commands over it, against the real server.

use std::{
    fs,
    io::Write as _,
    net::TcpListener,
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use mb_server::{
    client::{Answer, Client, ClientError, Request},
    wire::{Payload, Topic},
};
use serde_json::{Value, json};

use crate::{
    BINARY, setup, start,
    support::admin::stop_calls,
    support::{RawClient, Received, pki::Pki},
};

fn topic(text: &str) -> Topic<'_> {
    Topic::parse(text).unwrap()
}

#[test]
fn many_threads_share_one_connection() {
    let server = start();
    let client = Client::builder(server.wire.to_string())
        .name("test/1")
        .connect()
        .unwrap();
    thread::scope(|scope| {
        for thread in 0..8 {
            let client = &client;
            scope.spawn(move || {
                let mut pending = Vec::new();
                for number in 0..100 {
                    let text = json!([thread, number, "x".repeat(number * 37)]).to_string();
                    let sent = client
                        .send(&Request::new(topic("echo.say"), Payload::Json(&text)))
                        .unwrap();
                    pending.push((text, sent));
                }
                for (text, sent) in pending {
                    assert_eq!(sent.wait().unwrap(), Answer::Json(text));
                }
            });
        }
    });
    let bytes = [0, 1, 255, 254];
    let said = client
        .call(&Request::new(topic("echo.say"), Payload::Binary(&bytes)))
        .unwrap();
    assert_eq!(said, Answer::Binary(bytes.to_vec()));
    assert_eq!(server.metric("mb_connections_accepted_total"), 1);
    match client.call_json::<_, Value>("nobody.here", &1).unwrap_err() {
        ClientError::Answered(refusal) => assert_eq!(refusal.code, "NO_ROUTE_FOUND"),
        other => panic!("{other}"),
    }
    let error = client.call_json::<_, u8>("echo.say", &"text").unwrap_err();
    assert!(matches!(error, ClientError::Unexpected(_)), "{error}");
}

#[test]
fn silence_is_filled_with_keep_alives() {
    // It asks for half of that.
    let server = setup().set("idle_timeout = 3000").start();
    let client = Client::builder(server.wire.to_string())
        .reconnect(false)
        .connect()
        .unwrap();
    server.until("several", |server| {
        server.metric("mb_keep_alives_total") >= 3
    });
    let said: Value = client.call_json("echo.say", &1).unwrap();
    assert_eq!(said, json!(1), "still the first connection");
}

/// A server of our own, which does to one connection what it is told.
fn serve_once(act: impl FnOnce(RawClient) + Send + 'static) -> (String, thread::JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let served = thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        drop(listener);
        let mut peer = RawClient { stream };
        assert!(
            peer.message()
                .line
                .starts_with("REQUEST:system.hello:1.0.0:hello")
        );
        let limits = json!({"limits": {"keepAliveIntervalMs": 30_000}}).to_string();
        answer(&mut peer, "RESPONSE:system.hello:1.0.0:hello", &limits);
        act(peer);
    });
    (address, served)
}

fn answer(peer: &mut RawClient, line: &str, payload: &str) {
    peer.send(&crate::support::frame(
        0,
        format!("{line}\n{payload}").as_bytes(),
    ));
}

const SHUTS_DOWN: &str = r#"{"code":"SHUTTING_DOWN","message":"the end","origin":"server"}"#;

#[test]
fn what_was_sent_and_lost_may_have_run() {
    type Say = fn(&mut RawClient);
    let cases: [(Say, bool); 3] = [
        (|_| {}, true),
        (
            |peer| answer(peer, "ERROR:system.error:1.0.0", SHUTS_DOWN),
            false,
        ),
        (
            |peer| {
                answer(
                    peer,
                    "ERROR:system.error:1.0.0",
                    r#"{"code":"X","message":"m","origin":"server"}"#,
                )
            },
            true,
        ),
    ];
    for (say, may_have_run) in cases {
        let (server, served) = serve_once(move |mut peer| {
            assert!(matches!(peer.receive(), Received::Message(_)));
            say(&mut peer);
        });
        let client = Client::builder(server).reconnect(false).connect().unwrap();
        let error = client.call_json::<_, Value>("a.b", &1).unwrap_err();
        assert_eq!(error.may_have_run(), may_have_run, "{error}");
        served.join().unwrap();
        let error = client.call_json::<_, Value>("a.b", &1).unwrap_err();
        assert!(
            matches!(error, ClientError::NotSent(_)),
            "afterwards nothing is sent: {error}"
        );
    }
}

#[test]
fn a_server_without_room_is_asked_again() {
    let (server, served) = serve_once(|mut peer| {
        for round in 0..3 {
            let Received::Message(request) = peer.receive() else {
                panic!("no request")
            };
            let id = request.line.split(':').nth(3).unwrap().to_owned();
            let busy = r#"{"code":"SERVICE_UNAVAILABLE","message":"m","origin":"server","details":{"retryAfterMs":5}}"#;
            match round {
                2 => answer(&mut peer, &format!("RESPONSE:a.b:1.0.0:{id}"), "42"),
                _ => answer(&mut peer, &format!("ERROR:a.b:1.0.0:{id}"), busy),
            }
        }
        assert_eq!(peer.receive(), Received::End);
    });
    let client = Client::builder(server).connect().unwrap();
    assert_eq!(client.call_json::<_, Value>("a.b", &1).unwrap(), json!(42));
    drop(client);
    served.join().unwrap();
}

#[test]
fn a_drained_server_is_followed_by_the_next_one() {
    // Both on one port, which the first one leaves to the second: below those
    // that the system gives to other tests meanwhile.
    let first = 20_000 + (std::process::id() % 10_000) as u16;
    let port = (first..32_000)
        .find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok())
        .unwrap();
    let begin = || {
        let setup = setup();
        let mut command = setup.command_on(port);
        setup.start_with(&mut command)
    };
    let mut first = begin();
    let client = Client::builder(format!("localhost:{port}"))
        .connect()
        .unwrap();
    let said: Value = client.call_json("echo.say", &1).unwrap();
    assert_eq!(said, json!(1));
    first.signal("TERM");
    assert!(first.wait().success());
    let second = begin();
    let said: Value = client.call_json("echo.say", &2).unwrap();
    assert_eq!(said, json!(2));
    assert_eq!(second.metric("mb_connections_accepted_total"), 1);
}

#[test]
fn lines_of_requests_give_lines_of_answers() {
    let server = start();
    let mut child = Command::new(BINARY)
        .args([
            "call",
            "--requests",
            "-",
            "--concurrency",
            "3",
            "--server",
            &server.wire.to_string(),
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = child.stdin.take().unwrap();
    for number in 0..20 {
        writeln!(
            input,
            "{}",
            json!({"topic": "calc.add", "payload": {"a": number, "b": 1}})
        )
        .unwrap();
    }
    writeln!(
        input,
        "\n{}",
        json!({"topic": "no.body", "id": "mine", "version": "1.2.3", "timeout": 60_000})
    )
    .unwrap();
    drop(input);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1), "one of them is an error");
    let lines: Vec<Value> = String::from_utf8(output.stdout)
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(lines.len(), 21);
    for (number, line) in lines[..20].iter().enumerate() {
        assert_eq!(
            *line,
            json!({"line": number + 1, "answer": {"sum": number + 1}})
        );
    }
    assert_eq!(lines[20]["line"], 22);
    assert_eq!(lines[20]["error"]["code"], "NO_ROUTE_FOUND");

    // What is wrong with a line takes nothing from those before it.
    let dir = tempfile::tempdir().unwrap();
    let lines = dir.path().join("lines");
    fs::write(
        &lines,
        "{\"topic\":\"calc.add\",\"payload\":{\"a\":1,\"b\":1}}\n".repeat(5) + "{",
    )
    .unwrap();
    let output = Command::new(BINARY)
        .args([
            "call",
            "--concurrency",
            "1000",
            "--server",
            &server.wire.to_string(),
            "--requests",
        ])
        .arg(&lines)
        .output()
        .unwrap();
    let answers = String::from_utf8(output.stdout).unwrap();
    assert_eq!(answers.matches("{\"sum\":2}").count(), 5, "{answers}");
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(
        output.status.code() == Some(2) && said.contains("line 6: "),
        "{said}"
    );

    let run = |arguments: &[&str]| {
        let output = Command::new(BINARY).args(arguments).output().unwrap();
        (
            output.status.code().unwrap(),
            String::from_utf8(output.stderr).unwrap(),
        )
    };
    let wire = server.wire.to_string();
    assert_eq!(
        run(&["ping", "--server", &wire, "-c", "3", "--interval", "0"]).0,
        0
    );
    for command in ["ping", "bench"] {
        let (code, said) = run(&[command, "--server", "127.0.0.1:1", "--retry", "1"]);
        assert!(
            code == 3 && said.contains("trying again") && said.contains("is the server running?"),
            "{code}: {said}"
        );
    }
    let (code, said) = run(&["call", "echo.say", "--tls"]);
    assert!(code == 2 && said.contains("--ca"), "{code}: {said}");
    let (code, said) = run(&["call", "echo.say", "--token-file", "/nowhere/token"]);
    assert!(
        code == 2 && said.contains("/nowhere/token"),
        "{code}: {said}"
    );
    assert!(
        run(&["call", "echo.say", "--server", "nonsense"])
            .1
            .contains("HOST:PORT")
    );
}

#[test]
fn development_certificates_work_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let certs = dir.path().join("certs");
    let make = |more: &[&str]| {
        Command::new(BINARY)
            .args(["cert", "dev"])
            .arg(&certs)
            .args(more)
            .output()
            .unwrap()
    };
    assert!(make(&["--client", "ann"]).status.success());
    let refused = make(&[]);
    assert!(
        !refused.status.success() && String::from_utf8_lossy(&refused.stderr).contains("--force"),
        "{refused:?}"
    );
    assert!(make(&["--client", "ann", "--force"]).status.success());
    for entry in std::fs::read_dir(&certs).unwrap() {
        use std::os::unix::fs::PermissionsExt as _;
        assert_eq!(
            entry.unwrap().metadata().unwrap().permissions().mode() & 0o777,
            0o600
        );
    }
    let path = |name: &str| certs.join(name).display().to_string();
    let server = setup()
        .set("plain = false\nauth = \"required\"")
        .set(&format!(
            "[tls]\nport = 0\ncert = {:?}\nkey = {:?}\nca = {:?}\n[principals.ann]\nrights = [\"*\"]",
            path("server.crt"),
            path("server.key"),
            path("ca.crt")
        ))
        .start();
    let address = format!("localhost:{}", server.wire.port());
    let call = |arguments: &[&str]| {
        Command::new(BINARY)
            .args([
                "call",
                "calc.add",
                r#"{"a":2,"b":40}"#,
                "--server",
                &address,
            ])
            .args(arguments)
            .output()
            .unwrap()
    };
    let (ca, cert, key) = (path("ca.crt"), path("client.crt"), path("client.key"));
    let output = call(&["--ca", &ca, "--cert", &cert, "--key", &key]);
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        "{\"sum\":42}\n",
        "{output:?}"
    );
    let output = call(&["--ca", &ca]);
    assert_eq!(output.status.code(), Some(3));
    assert!(
        String::from_utf8_lossy(&output.stderr).contains("no-certificate"),
        "{output:?}"
    );
}

#[test]
fn as_many_wait_as_may() {
    let server = start();
    let client = Client::builder(server.wire.to_string())
        .max_waiting(1)
        .connect()
        .unwrap();
    let spin = Request {
        timeout: Duration::from_secs(600),
        ..Request::new(topic("hostile.spin"), Payload::Json("{}"))
    };
    let first = client.send(&spin).unwrap();
    let hasty = Request {
        timeout: Duration::from_millis(20),
        ..Request::new(topic("echo.say"), Payload::Json("1"))
    };
    assert!(matches!(client.send(&hasty), Err(ClientError::NotSent(_))));
    server.until("the first one runs", |server| {
        server.json("/calls")["calls"].as_array().unwrap().len() == 1
    });
    stop_calls(&server);
    match first.wait().unwrap_err() {
        ClientError::Answered(refusal) => assert_eq!(refusal.code, "SERVICE_FAILED"),
        other => panic!("{other}"),
    }
    assert_eq!(
        client.call_json::<_, Value>("echo.say", &1).unwrap(),
        json!(1)
    );
}

#[test]
fn load_over_http_is_answered_as_in_frames() {
    let pki = Pki::new();
    let setup = setup();
    let tokens = setup.dir.path().join("tokens.json").display().to_string();
    let new = Command::new(BINARY)
        .args([
            "token", "new", "ann", "--right", "echo.*", "--file", &tokens,
        ])
        .output()
        .unwrap();
    assert!(new.status.success(), "{new:?}");
    let token = setup.dir.path().join("token");
    fs::write(&token, new.stdout).unwrap();
    let server = setup
        .set(&format!("auth = \"required\"\ntokens = {tokens:?}"))
        .set(&pki.settings(""))
        .start();
    let token = token.display().to_string();
    let ca = pki.path("ca.crt").display().to_string();
    let plain = server.listeners[0].to_string();
    let tls = format!("localhost:{}", server.listeners[1].port());
    let bench = |topic: &str, flags: &[&str]| {
        let output = Command::new(BINARY)
            .args([
                "bench", topic, "--json", "--count", "200", "-c", "3", "-p", "4",
            ])
            .args(flags)
            .output()
            .unwrap();
        let result: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.code(), result, error)
    };
    let with_token = ["--token-file", &token];
    for (protocol, flag) in [("frames", &[][..]), ("http", &["--http"])] {
        for server in [&["--server", &plain][..], &["--server", &tls, "--ca", &ca]] {
            for payload in [&["--size", "100000"][..], &["--binary"]] {
                let flags = [flag, server, &with_token, payload].concat();
                let (code, result, error) = bench("echo.say", &flags);
                assert_eq!(code, Some(0), "{flags:?}: {error}");
                let answers = result["answers"].as_u64().unwrap();
                assert!(answers >= 200, "{flags:?}: {result}");
                assert_eq!(result["protocol"], protocol);
            }
        }
        let flags = [flag, &["--server", &plain], &with_token].concat();
        let (code, result, _) = bench("calc.add", &flags);
        assert_eq!(code, Some(1), "{result}");
        assert_eq!(result["refused"]["FORBIDDEN"], result["answers"]);
        // Over HTTP, each request shows the token, and the connection ends.
        let (code, _, error) = bench("echo.say", &[flag, &["--server", &plain]].concat());
        let expected = if protocol == "frames" { 1 } else { 3 };
        assert!(
            code == Some(expected) && error.contains("UNAUTHORIZED"),
            "{code:?} {error}"
        );
    }
    let flags = ["--server", &plain, "--token-file", &token, "--threads", "8"];
    let (code, result, error) = bench("echo.say", &flags);
    let answers = result["answers"].as_u64().unwrap();
    assert!(code == Some(0) && answers >= 200, "{result} {error}");
    let output = Command::new(BINARY)
        .args(["call", "echo.say", "--server", &plain])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.code() == Some(1) && said.contains("does not let us in: UNAUTHORIZED"),
        "{output:?}"
    );
}
