//! Principals, what they may do, and how much of the server they get.

use std::{
    io::{ErrorKind, Write as _},
    process::Command,
    time::Instant,
};

use serde_json::json;

use crate::{
    BINARY, setup,
    support::admin::stop_calls,
    support::{
        HOUR, KEEPALIVE, PATIENCE, RawClient, Received, Setup, TestServer, frame, most_resident,
    },
};

/// Makes a token as the operator does; its id and itself.
fn token(setup: &Setup, arguments: &[&str]) -> (String, String) {
    let mut command = Command::new(BINARY);
    command
        .args(["token", "new"])
        .args(arguments)
        .arg("--file")
        .arg(setup.dir.path().join("tokens.json"));
    let output = command.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let said = String::from_utf8(output.stderr).unwrap();
    let id = said.split_whitespace().nth(1).unwrap().to_owned();
    (
        id,
        String::from_utf8(output.stdout).unwrap().trim().to_owned(),
    )
}

fn with_tokens(setup: Setup, settings: &str) -> Setup {
    let file = setup.dir.path().join("tokens.json").display().to_string();
    setup.set(&format!(
        "tokens = {file:?}\nreload_interval = 50\n{settings}"
    ))
}

fn hello(peer: &mut RawClient, token: &str) -> crate::support::Message {
    peer.ask("system.hello", &json!({"token": token}).to_string())
}

fn failures(server: &TestServer, reason: &str) -> u64 {
    server.count(&format!("mb_auth_failures_total{{reason=\"{reason}\"}}"))
}

#[test]
fn a_token_admits_until_it_is_revoked() {
    let setup = with_tokens(
        setup(),
        "auth = \"required\"\n[principals.ann]\nrights = [\"calc.*\", \"echo.say@2\"]",
    );
    let (id, secret) = token(&setup, &["ann"]);
    let (_, narrow) = token(&setup, &["ann", "--right", "echo.*"]);
    let file = setup.dir.path().join("tokens.json");
    let server = setup.start();

    let mut peer = server.connect();
    let answer = hello(&mut peer, &secret);
    assert_eq!(answer.json()["principal"], "ann");
    assert_eq!(
        peer.ask("calc.add", "{\"a\":2,\"b\":40}").text(),
        "{\"sum\":42}"
    );
    assert_eq!(
        peer.ask("echo.say", "1").code(),
        "FORBIDDEN",
        "another version of it only"
    );
    assert_eq!(
        peer.ask("nobody.here", "1").code(),
        "FORBIDDEN",
        "before the look-up"
    );
    let listed = peer.ask("system.services", "").json();
    let names: Vec<_> = listed["services"]
        .as_array()
        .unwrap()
        .iter()
        .map(|row| row["name"].clone())
        .collect();
    assert_eq!(names, ["calc"]);
    assert_eq!(
        server.json("/connections")["connections"][0]["principal"],
        "ann"
    );
    let audit = server.json("/log?target=audit");
    let fields = |kind: &str| {
        let lines = audit["lines"].as_array().unwrap().iter();
        let mut fields = lines.map(|line| line["fields"].clone());
        fields.rfind(|fields| fields["security"] == kind).unwrap()
    };
    let (login, refused) = (fields("login"), fields("rights"));
    assert_eq!(
        (&login["principal"], &login["by"], &login["peer"]),
        (&json!("ann"), &json!("token"), &json!("127.0.0.1"))
    );
    assert_eq!(
        (&refused["principal"], &refused["topic"]),
        (&json!("ann"), &json!("nobody.here"))
    );

    let mut other = server.connect();
    hello(&mut other, &narrow);
    assert_eq!(
        other.ask("echo.say", "1").text(),
        "1",
        "the token's own rights"
    );
    assert_eq!(other.ask("calc.add", "{}").code(), "FORBIDDEN");

    let revoke = Command::new(BINARY)
        .args(["token", "revoke", &id, "--file"])
        .arg(file)
        .output()
        .unwrap();
    assert!(revoke.status.success(), "{revoke:?}");
    server.wait_for_log("tokens");
    assert_eq!(
        peer.ask("calc.add", "{\"a\":2,\"b\":40}").code(),
        "UNAUTHORIZED"
    );
    peer.expect_end();
    assert_eq!(other.ask("echo.say", "1").text(), "1", "others stay");
    assert_eq!(failures(&server, "expired"), 1);
}

#[test]
fn nothing_comes_before_the_hello() {
    let server = with_tokens(setup(), "auth = \"required\"\nhandshake_timeout = \"60s\"").start();
    for (request, reason) in [
        ("REQUEST:calc.add:1.0.0:1\n{}", "missing"),
        ("REQUEST:system.ping:1.0.0:1\n", "missing"),
        ("REQUEST:calc.add:1.0.0\n{", "missing"),
        ("PUBLISH:calc.add:1.0.0:1\n{}", "missing"),
        ("REQUEST:system.hello:1.0.0:1\n{}", "missing"),
        (
            "REQUEST:system.hello:1.0.0:1\n{\"token\":\"mbt_wrong\"}",
            "token",
        ),
    ] {
        let before = failures(&server, reason);
        let mut peer = server.connect();
        peer.send(&frame(0, request.as_bytes()));
        assert_eq!(peer.message().code(), "UNAUTHORIZED", "{request}");
        peer.expect_end();
        assert_eq!(failures(&server, reason), before + 1, "{request}");
    }
    let audit = server.json("/log?target=audit&contains=system.hello");
    let refused = audit["lines"].as_array().unwrap();
    assert!(
        !refused.is_empty()
            && refused
                .iter()
                .all(|line| line["fields"]["security"] == "authentication"),
        "{audit}"
    );
    let mut large = server.connect();
    large.send(&(16_u32 * 1024 + 1).to_be_bytes());
    large.send(&[0; 4]);
    assert_eq!(large.message().code(), "MESSAGE_TOO_LARGE");
    assert_eq!(server.calls(), 0);
}

#[test]
fn keep_alives_and_pieces_do_not_make_the_time_for_a_hello_longer() {
    let server = with_tokens(setup(), "auth = \"required\"\nhandshake_timeout = 300").start();
    let mut slow = server.connect();
    let answer = loop {
        slow.send(&KEEPALIVE);
        match slow.receive() {
            Received::KeepAlive => {}
            Received::Message(answer) => break answer,
            Received::End => panic!("closed without a word"),
        }
    };
    assert_eq!(answer.code(), "READ_TIMEOUT");
    slow.expect_end();
    let mut begun = server.connect();
    begun.send(&[0, 0]);
    assert_eq!(begun.message().code(), "READ_TIMEOUT");
    begun.expect_end();
    assert_eq!(server.calls(), 0);
}

#[test]
fn an_address_that_fails_too_often_waits() {
    let setup = with_tokens(setup(), "auth = \"required\"");
    let (_, secret) = token(&setup, &["ann"]);
    let server = setup.start();
    let mut known = server.connect();
    hello(&mut known, &secret);
    let guess = || {
        let mut peer = server.connect();
        // One that is refused at once may be closed before it has asked.
        let request = b"REQUEST:system.hello:1.0.0:1\n{\"token\":\"mbt_guess\"}";
        let _ = peer.stream.write_all(&frame(0, request));
        let refused = peer.message();
        assert_eq!(refused.code(), "UNAUTHORIZED");
        peer.expect_end();
        refused.json()["details"]["retryAfterMs"].as_u64()
    };
    // A failure is forgotten after six seconds, so a slow machine takes more.
    let waits: Vec<_> = std::iter::repeat_with(guess).take(100).collect();
    let first = waits.iter().position(Option::is_some);
    assert!(first.is_some_and(|first| first >= 10), "{waits:?}");
    assert!(
        waits.iter().flatten().all(|wait| (1..=6001).contains(wait)),
        "{waits:?}"
    );
    let refused = waits.iter().flatten().count() as u64;
    assert_eq!(failures(&server, "too-many"), refused);
    assert!(
        known.ask("system.ping", "1").line.starts_with("RESPONSE"),
        "who is in stays in"
    );
}

#[test]
fn rates_and_permits_are_shared_by_all_connections_of_a_principal() {
    let setup = with_tokens(
        setup(),
        "auth = \"required\"\n[principals.default]\nrights = [\"*\"]\n[principals.ann]\nrights = [\"*\"]\nrate = 2\n\
         [principals.bob]\nrights = [\"*\"]\nconcurrency = 1\n[services.calc]\nrate = 1",
    );
    let tokens = ["ann", "bob", "carl"].map(|name| token(&setup, &[name]).1);
    let server = setup.start();
    let connect = |token: &str| {
        let mut peer = server.connect();
        hello(&mut peer, token);
        peer
    };
    let (mut one, mut two) = (connect(&tokens[0]), connect(&tokens[0]));
    // Two at once and two a second, over both connections together: how many
    // it may be at most depends on how long this takes.
    let (begun, mut answered) = (Instant::now(), 0);
    for _ in 0..20 {
        for peer in [&mut one, &mut two] {
            let answer = peer.ask("echo.say", "1");
            if answer.line.starts_with("RESPONSE") {
                answered += 1;
                continue;
            }
            assert_eq!(answer.code(), "RATE_LIMITED");
            let wait = answer.json()["details"]["retryAfterMs"].as_u64();
            assert!((1..=501).contains(&wait.unwrap()), "{answer:?}");
        }
    }
    let most = 2 + begun.elapsed().as_millis() / 500;
    assert!((1..=most.min(39)).contains(&answered), "{answered}, {most}");

    let mut carl = connect(&tokens[2]);
    assert_eq!(
        carl.ask("calc.add", "{\"a\":1,\"b\":1}").text(),
        "{\"sum\":2}"
    );
    let refused = (0..20)
        .map(|_| carl.ask("calc.add", "{\"a\":1,\"b\":1}"))
        .find(|answer| answer.line.starts_with("ERROR"));
    assert_eq!(refused.unwrap().code(), "RATE_LIMITED", "of the service");
    assert_eq!(carl.ask("echo.say", "1").text(), "1");

    let (mut busy, mut waits) = (connect(&tokens[1]), connect(&tokens[1]));
    busy.request_within("hostile.spin", "1", HOUR, "{}");
    server.until("it runs", |server| {
        server.json("/connections")["connections"]
            .as_array()
            .unwrap()
            .iter()
            .any(|row| row["state"] == "calling")
    });
    waits.request_within("echo.say", "1", 100, "1");
    assert_eq!(waits.message().code(), "SERVICE_UNAVAILABLE");
    // More of them than there are polling workers.
    let mut waiting: Vec<_> = (0..crate::server::waiting::many())
        .map(|_| connect(&tokens[1]))
        .collect();
    waiting.push(waits);
    for peer in &mut waiting {
        peer.request_within("echo.say", "2", HOUR, "1");
    }
    let waiting_calls = |server: &TestServer| {
        server.json("/calls")["calls"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|call| call["state"] == "waiting")
            .count()
    };
    server.until("they wait", |server| waiting_calls(server) == waiting.len());
    assert_eq!(carl.ask("echo.say", "1").text(), "1");
    assert_eq!(
        waiting_calls(&server),
        waiting.len(),
        "nobody waits for them"
    );
    let calls = server.json("/calls");
    let running = calls["calls"].as_array().unwrap().iter();
    let running: Vec<_> = running.filter(|call| call["state"] == "running").collect();
    let [running] = running[..] else {
        panic!("{calls}")
    };
    let path = format!("/calls/{}", running["id"]);
    assert_eq!(
        crate::support::admin::change(&server, "DELETE", &path, "").0,
        200
    );
    for mut peer in waiting {
        assert_eq!(peer.message().text(), "1", "when the other one has ended");
    }
    assert_eq!(busy.message().code(), "SERVICE_FAILED");
}

#[test]
fn the_longest_idle_unauthenticated_peer_is_evicted() {
    let setup = with_tokens(
        setup(),
        "auth = \"optional\"\nmax_connections = 16\n[principals.default]\nrights = [\"*\"]",
    );
    let (_, secret) = token(&setup, &["ann"]);
    let server = setup.start();
    // An eighth is reserved, so 14 unauthenticated peers fit.
    let come = || {
        let mut peer = server.connect();
        assert!(peer.ask("system.ping", "1").line.starts_with("RESPONSE"));
        peer
    };
    let (mut second, mut first) = (come(), come());
    let _others: Vec<_> = (2..14).map(|_| come()).collect();
    // Who is still busy with the answer's end is not idle at all.
    server.until("all are idle", |server| {
        let rows = server.json("/connections");
        let rows = rows["connections"].as_array().unwrap();
        rows.len() == 14 && rows.iter().all(|row| row["state"] == "idle")
    });
    // The next ones get in when the idle ones are no longer so new that they are
    // left alone.
    let mut ann = loop {
        let mut peer = server.connect();
        let answer = hello(&mut peer, &secret);
        if answer.line.starts_with("RESPONSE") {
            break peer;
        }
        assert_eq!(answer.code(), "SERVER_BUSY");
    };
    assert_eq!(
        second.message().code(),
        "SERVER_BUSY",
        "it was idle for longer"
    );
    assert_eq!(ann.ask("echo.say", "1").text(), "1");
    let mut unauthenticated = server.connect();
    assert!(
        unauthenticated
            .ask("system.ping", "1")
            .line
            .starts_with("RESPONSE"),
        "an authenticated peer takes no slot of unauthenticated ones"
    );
    assert!(first.ask("system.ping", "1").line.starts_with("RESPONSE"));
    assert_eq!(server.count("mb_connections_evicted_total"), 1);
}

#[test]
fn addresses_have_their_share_and_their_lists() {
    let server = setup()
        .set("max_connections_per_address = 2")
        .set("[[listeners]]\nport = 0\ndeny = [\"127.0.0.0/8\"]")
        .set("[[listeners]]\nport = 0\nallow = [\"127.0.0.1/32\"]\nrights = [\"echo.*\"]")
        .set("[[listeners]]\nport = 0\nproxy_from = [\"127.0.0.1\\u002f32\"]\ndeny = [\"192.0.2.0/24\"]")
        .start();
    let [_, denied, allowed, proxied] = server.listeners[..] else {
        panic!("{:?}", server.listeners)
    };

    assert_eq!(
        RawClient::connect(denied).receive(),
        Received::End,
        "closed without a word"
    );
    let mut one = server.connect();
    let mut two = RawClient::connect(allowed);
    assert_eq!(
        one.ask("calc.add", "{\"a\":1,\"b\":1}").text(),
        "{\"sum\":2}"
    );
    assert_eq!(
        two.ask("calc.add", "{\"a\":1,\"b\":1}").code(),
        "FORBIDDEN",
        "the listener's rights are the most"
    );
    assert_eq!(two.ask("echo.say", "1").text(), "1");
    let mut three = server.connect();
    assert_eq!(three.message().code(), "SERVER_BUSY");

    // The balancer's own address is not what counts.
    let header = |ip: [u8; 4]| {
        let mut header = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c".to_vec();
        header.extend(ip);
        header.extend([127, 0, 0, 1, 0x30, 0x39, 0, 80]);
        header
    };
    let through = |ip: [u8; 4]| {
        let mut peer = RawClient::connect(proxied);
        peer.send(&header(ip));
        peer
    };
    let mut real = through([203, 0, 113, 9]);
    assert_eq!(real.ask("echo.say", "1").text(), "1");
    let rows = server.json("/connections");
    assert!(
        rows["connections"]
            .as_array()
            .unwrap()
            .iter()
            .any(|row| row["peer"] == "203.0.113.9:12345"),
        "{rows}"
    );
    let mut second = through([203, 0, 113, 9]);
    assert_eq!(second.ask("echo.say", "1").text(), "1");
    assert_eq!(through([203, 0, 113, 9]).message().code(), "SERVER_BUSY");
    assert_eq!(
        through([192, 0, 2, 1]).receive(),
        Received::End,
        "denied by its real address"
    );
    // The balancer looks whether we are there, or says nothing of its peer:
    // then its own address counts, which has its share by now.
    let unnamed: [&[u8]; 5] = [
        b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0",
        b"\r\n\r\n\0\r\nQUIT\n\x21\0\0\0",
        b"\r\n\r\n\0\r\nQUIT\n\x21\x31\0\0",
        b"PROXY UNKNOWN\r\n",
        b"PROXY UNKNOWN 192.0.2.1 203.0.113.9 1 2\r\n",
    ];
    let health = |header: &[u8]| {
        let mut peer = RawClient::connect(proxied);
        peer.send(header);
        peer
    };
    for header in unnamed {
        assert_eq!(health(header).message().code(), "SERVER_BUSY", "{header:?}");
    }
    drop(two);
    for header in unnamed {
        server.until("there is room for it", |_| {
            health(header)
                .ask("system.ping", "1")
                .line
                .starts_with("RESPONSE")
        });
    }
    assert_eq!(
        health(b"PROXY TCP4 192.0.2.1 10.0.0.1 1 2\r\n").receive(),
        Received::End,
        "denied by version 1 too"
    );
    let mut none = RawClient::connect(proxied);
    none.request("echo.say", "1", "1");
    assert_eq!(none.receive(), Received::End, "it must have one");
    drop(one);
    // Those that were dropped keep their share until the server has seen it.
    let code = loop {
        let mut untrusted = server.connect();
        untrusted.send(&header([203, 0, 113, 9]));
        let code = untrusted.message().code();
        if code != "SERVER_BUSY" {
            break code;
        }
    };
    assert!(
        ["INVALID_FRAME", "MESSAGE_TOO_LARGE"].contains(&&*code),
        "nobody else may have one: {code}"
    );
}

#[test]
fn a_balancer_that_names_no_peer_is_held_to_the_lists_itself() {
    let lists = [
        "allow = [\"192.0.2.0/24\"]",
        "deny = [\"127.0.0.0/8\"]",
        "allow = [\"127.0.0.1/32\"]",
    ];
    let server = lists
        .iter()
        .fold(setup(), |setup, list| {
            setup.set(&format!(
                "[[listeners]]\nport = 0\nproxy_from = [\"127.0.0.1/32\"]\n{list}"
            ))
        })
        .start();
    for (number, lets_in) in [(1, false), (2, false), (3, true)] {
        for header in [
            &b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0"[..],
            b"\r\n\r\n\0\r\nQUIT\n\x21\0\0\0",
            b"\r\n\r\n\0\r\nQUIT\n\x21\x31\0\0",
            b"PROXY UNKNOWN\r\n",
        ] {
            let mut peer = RawClient::connect(server.listeners[number]);
            peer.send(header);
            if lets_in {
                assert!(peer.ask("system.ping", "1").line.starts_with("RESPONSE"));
            } else {
                assert_eq!(peer.receive(), Received::End, "{header:?}");
            }
        }
    }
    let mut named = RawClient::connect(server.listeners[1]);
    named.send(b"PROXY TCP4 192.0.2.7 10.0.0.1 12345 80\r\n");
    assert_eq!(named.ask("echo.say", "1").text(), "1");
    // Those that were dropped above leave the list in their own time.
    server.until("the named peer alone is listed", |server| {
        let rows = server.json("/connections");
        let rows = rows["connections"].as_array().unwrap();
        rows.len() == 1 && rows[0]["peer"] == "192.0.2.7:12345"
    });
}

fn revoke(server: &TestServer, file: &std::path::Path, id: &str) {
    let mut command = Command::new(BINARY);
    command.args(["token", "revoke", id, "--file"]).arg(file);
    assert!(command.output().unwrap().status.success());
    server.wait_for_log("tokens");
}

#[test]
fn a_revoked_token_ends_silent_connections_and_those_that_keep_alive() {
    let setup = with_tokens(
        setup(),
        "auth = \"required\"\nkeep_alive_interval = 200\n\
         max_connections = 8\n[principals.default]\nrights = [\"*\"]",
    );
    let (id, secret) = token(&setup, &["ann"]);
    let (_, other) = token(&setup, &["bob"]);
    let file = setup.dir.path().join("tokens.json");
    let server = setup.start();
    let come = |token: &str| {
        let mut peer = server.connect();
        assert!(hello(&mut peer, token).line.starts_with("RESPONSE"));
        peer
    };
    let (mut silent, mut lively, mut calling) = (come(&secret), come(&secret), come(&secret));
    let mut valid = come(&other);
    calling.request_within("hostile.spin", "1", HOUR, "{}");
    server.until("it runs", |server| {
        server.json("/calls")["calls"].as_array().unwrap().len() == 1
    });
    revoke(&server, &file, &id);
    lively.send(&KEEPALIVE);
    let said = loop {
        // One that was sent before the revocation was seen is answered.
        match lively.receive() {
            Received::KeepAlive => lively.send(&KEEPALIVE),
            Received::Message(said) => break said,
            Received::End => panic!("without a word"),
        }
    };
    assert_eq!(
        (&*said.line, &*said.code()),
        ("ERROR:system.error:1.0.0", "UNAUTHORIZED"),
    );
    assert_eq!(silent.message().code(), "UNAUTHORIZED");
    silent.expect_end();
    // What was begun is answered.
    stop_calls(&server);
    assert_eq!(calling.message().code(), "SERVICE_FAILED");
    assert_eq!(calling.message().code(), "UNAUTHORIZED");
    assert_eq!(valid.ask("echo.say", "1").text(), "1");
    drop((lively, calling));
    server.until("their places are free", |server| {
        server.json("/connections")["connections"]
            .as_array()
            .unwrap()
            .len()
            == 1
    });
    let all: Vec<_> = (1..8).map(|_| come(&other)).collect();
    assert_eq!(all.len(), 7);
}

#[test]
fn rights_and_rates_that_change_hold_for_open_connections() {
    let with = |rights: &str| {
        format!(
            "auth = \"required\"\n[principals.ann]\nrights = [{rights}]\n[principals.bob]\nrights = [\"*\"]\nrate = 2\n"
        )
    };
    let setup = setup();
    let file = setup.dir.path().join("tokens.json").display().to_string();
    let settings = |rights: &str| format!("tokens = {file:?}\n{}", with(rights));
    let setup = setup.set(&settings("\"*\""));
    let tokens = ["ann", "bob"].map(|name| token(&setup, &[name]).1);
    let server = setup.start();
    let [mut ann, mut bob] = tokens.map(|token| {
        let mut peer = server.connect();
        hello(&mut peer, &token);
        peer
    });
    assert_eq!(ann.ask("echo.say", "1").text(), "1");
    // It is answered a second's worth of them.
    let often = |peer: &mut RawClient| {
        (0..100).any(|_| peer.ask("echo.say", "1").line.starts_with("ERROR"))
    };
    assert!(often(&mut bob));
    std::fs::write(server.settings_file(), settings("\"calc.*\"")).unwrap();
    let (status, applied) = crate::support::admin::change(&server, "POST", "/config/reload", "");
    assert_eq!(status, 200, "{applied}");
    assert_eq!(ann.ask("echo.say", "1").code(), "FORBIDDEN");
    let listed = ann.ask("system.services", "").json();
    assert_eq!(listed["services"].as_array().unwrap().len(), 1, "{listed}");
    assert_eq!(
        ann.ask("calc.add", "{\"a\":2,\"b\":40}").text(),
        "{\"sum\":42}"
    );
    assert!(often(&mut bob));
}

#[test]
fn connections_that_are_too_old_are_closed_in_order() {
    let server = setup().set("connection_max_age = 3000").start();
    let begun = Instant::now();
    let (mut silent, mut lively, mut calling) =
        (server.connect(), server.connect(), server.connect());
    assert_eq!(silent.ask("echo.say", "1").text(), "1");
    calling.request_within("hostile.spin", "1", HOUR, "{}");
    let mut answers = 0;
    let last = loop {
        let said = lively.ask("echo.say", "1");
        if said.line.starts_with("ERROR") {
            break said;
        }
        answers += 1;
    };
    assert!(answers > 0 && begun.elapsed().as_millis() >= 2970);
    assert_eq!(
        (&*last.line, &*last.code()),
        ("ERROR:system.error:1.0.0", "SHUTTING_DOWN")
    );
    lively.expect_end();
    assert_eq!(silent.message().code(), "SHUTTING_DOWN");
    silent.expect_end();
    stop_calls(&server);
    let ended = calling.message().code();
    assert_eq!(ended, "SERVICE_FAILED", "what was begun ends");
    assert_eq!(calling.message().code(), "SHUTTING_DOWN");
    calling.expect_end();
    assert_eq!(server.connect().ask("echo.say", "1").text(), "1");
}

#[test]
fn the_operator_closes_all_connections_of_a_principal() {
    let setup = with_tokens(
        setup(),
        "auth = \"optional\"\n[principals.default]\nrights = [\"*\"]",
    );
    let tokens = ["ann", "bob"].map(|name| token(&setup, &[name]).1);
    let server = setup.start();
    let come = |token: &str| {
        let mut peer = server.connect();
        hello(&mut peer, token);
        peer
    };
    let (mut one, mut two, mut busy) = (come(&tokens[0]), come(&tokens[0]), come(&tokens[0]));
    let (mut bob, mut unauthenticated) = (come(&tokens[1]), server.connect());
    busy.request_within("hostile.spin", "1", HOUR, "{}");
    server.until("it runs", |server| {
        server.json("/calls")["calls"].as_array().unwrap().len() == 1
    });
    let close = |name: &str| {
        crate::support::admin::change(
            &server,
            "POST",
            &format!("/principals/{name}/disconnect"),
            "",
        )
    };
    assert_eq!(close("nobody"), (200, json!({"closed": 0})));
    assert_eq!(close("ann"), (200, json!({"closed": 3})));
    for peer in [&mut one, &mut two] {
        assert_eq!(peer.message().code(), "UNAUTHORIZED");
        peer.expect_end();
    }
    stop_calls(&server);
    let ended = busy.message().code();
    assert_eq!(ended, "SERVICE_FAILED", "what was begun ends");
    assert_eq!(busy.message().code(), "UNAUTHORIZED");
    busy.expect_end();
    assert_eq!(bob.ask("echo.say", "1").text(), "1");
    assert!(
        unauthenticated
            .ask("system.ping", "1")
            .line
            .starts_with("RESPONSE")
    );
}

#[test]
fn who_says_nothing_does_not_keep_out_who_has_a_token() {
    let setup = with_tokens(setup(), "auth = \"required\"");
    let (_, secret) = token(&setup, &["ann"]);
    let server = setup.start();
    let say_nothing = || {
        let mut peer = server.connect();
        let refused = peer.ask("system.hello", "{}");
        assert_eq!(refused.code(), "UNAUTHORIZED");
        peer.expect_end();
        refused.json()["details"]["retryAfterMs"].is_u64()
    };
    let throttled: Vec<_> = std::iter::repeat_with(say_nothing).take(100).collect();
    let first = throttled.iter().position(|throttled| *throttled);
    assert!(first.is_some_and(|first| first >= 10), "{throttled:?}");
    let answer = hello(&mut server.connect(), &secret);
    assert!(answer.line.starts_with("RESPONSE"), "{answer:?}");
    let refused = throttled.iter().filter(|throttled| **throttled).count() as u64;
    assert_eq!(failures(&server, "missing"), 100 - refused);
    assert_eq!(failures(&server, "too-many"), refused);
}

#[test]
fn system_topics_count_for_the_rate() {
    let setup = with_tokens(
        setup(),
        "auth = \"optional\"\n[principals.ann]\nrights = [\"*\"]\nrate = 3\n[principals.anonymous]\nrate = 1",
    );
    let (_, secret) = token(&setup, &["ann"]);
    let server = setup.start();
    // More than a second's worth, whatever the machine does meanwhile.
    let refused = |peer: &mut RawClient, topic: &str, payload: &str| {
        let answers = (0..100).map(|_| peer.ask(topic, payload));
        answers
            .filter(|answer| answer.line.starts_with("ERROR"))
            .inspect(|answer| assert_eq!(answer.code(), "RATE_LIMITED", "{topic}"))
            .count()
    };
    let mut unauthenticated = server.connect();
    let mut ann = server.connect();
    let again = json!({"token": secret}).to_string();
    for (topic, payload) in [
        ("system.ping", "1"),
        ("system.services", ""),
        ("system.hello", "{}"),
    ] {
        assert!(
            refused(&mut unauthenticated, topic, payload) > 80,
            "{topic}"
        );
        // Unauthenticated peers over their rate keep nobody from
        // authenticating.
        assert!(hello(&mut ann, &secret).line.starts_with("RESPONSE") || topic != "system.ping");
        assert!(refused(&mut ann, topic, payload) > 60, "{topic}");
    }
    assert!(refused(&mut ann, "system.hello", &again) > 60);
}

/// Sends the same again and again until the server ends the connection; says how.
fn flood(peer: &mut RawClient, bytes: &[u8], goes_on: impl Fn() -> bool) -> Option<ErrorKind> {
    peer.stream.set_write_timeout(Some(PATIENCE)).unwrap();
    while goes_on() {
        match peer.stream.write(bytes) {
            // A machine that stops and goes on interrupts what has a timeout.
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Some(error.kind()),
            Ok(_) => {}
        }
    }
    None
}

/// Several, so that each read fills the server's buffer.
#[test]
fn keep_alives_that_nobody_takes_the_answers_of_are_not_collected() {
    for auth in ["required", "none"] {
        let server = with_tokens(
            setup(),
            &format!("auth = \"{auth}\"\nmemory = \"64MiB\"\nwrite_timeout = 1000"),
        )
        .start();
        let (wire, process) = (server.wire, server.child.id());
        let before = most_resident(process);
        let grown = || (most_resident(process) - before) >> 20;
        let keep_alives = KEEPALIVE.repeat(32 * 1024);
        std::thread::scope(|scope| {
            for _ in 0..16 {
                scope.spawn(|| {
                    let ended = flood(&mut RawClient::connect(wire), &keep_alives, || grown() < 32);
                    assert!(
                        matches!(
                            ended,
                            None | Some(ErrorKind::BrokenPipe | ErrorKind::ConnectionReset)
                        ),
                        "the server should have ended it: {ended:?}"
                    );
                });
            }
        });
        assert!(grown() < 32, "{auth}: {} MiB more", grown());
    }
}

#[test]
fn a_peer_that_must_authenticate_is_ended_whatever_it_sends_and_reads() {
    let server = with_tokens(setup(), "auth = \"required\"\nhandshake_timeout = 500").start();
    let (wire, process) = (server.wire, server.child.id());
    let before = most_resident(process);
    let begun = Instant::now();
    let goes_on = || begun.elapsed() < PATIENCE && most_resident(process) - before < 64 << 20;
    let keep_alives = KEEPALIVE.repeat(32 * 1024);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let mut peer = RawClient::connect(wire);
                let mut answers = peer.stream.try_clone().unwrap();
                scope.spawn(move || std::io::copy(&mut answers, &mut std::io::sink()));
                let ended = flood(&mut peer, &keep_alives, goes_on);
                let _ = peer.stream.shutdown(std::net::Shutdown::Both);
                assert!(ended.is_some(), "it goes on and on");
            });
        }
    });
}

#[test]
fn listeners_without_authentication_are_refused_at_the_start() {
    let check = |settings: &str, expected: Option<&str>| {
        let output = setup().set("host = \"0.0.0.0\"").set(settings);
        let mut command = Command::new(BINARY);
        let file = output.dir.path().join("mb.toml");
        let _ = output.command();
        let output = command
            .arg("check")
            .arg("--config")
            .arg(file)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        match expected {
            None => assert!(output.status.success(), "{settings}: {said}"),
            Some(part) => assert!(
                !output.status.success() && said.contains(part),
                "{settings}: {said}"
            ),
        }
    };
    check("", Some("reach without authentication"));
    check("auth = \"required\"", None);
    check("allow_unsecure = true", None);
    check("plain = false", Some("`plain` must be"));
    check("[tls]\ncert = \"/nowhere.crt\"", Some("tls.key"));
    check(
        "auth = \"required\"\n[tls]\ncert = \"/nowhere.crt\"\nkey = \"/nowhere.key\"",
        Some("/nowhere.crt"),
    );
    check("auth = \"maybe\"", Some("auth"));
    check(
        "auth = \"required\"\n[principals.ann]\nrights = [\"calc\"]",
        Some("is no right"),
    );
}

#[test]
fn the_audit_trail_says_what_a_principal_has_used() {
    let settings = "auth = \"required\"\n[principals.ann]\nrights = [\"*\"]";
    let setup = with_tokens(setup(), settings);
    let (_, secret) = token(&setup, &["ann"]);
    let server = setup.start();
    let mut peer = server.connect();
    hello(&mut peer, &secret);
    let request = format!("REQUEST:echo.say:1.0.0:ask::{HOUR}\n[1,2,3]");
    let request = frame(0, request.as_bytes());
    for _ in 0..3 {
        assert_eq!(peer.ask("echo.say", "[1,2,3]").text(), "[1,2,3]");
    }
    let count = |name: &str| server.count(&format!("mb_principal_{name}"));
    assert_eq!(count("requests_total{principal=\"ann\"}"), 3);
    let bytes = count("bytes_total{principal=\"ann\",direction=\"in\"}");
    assert_eq!(bytes, 3 * request.len() as u64);
    // That of who has yet to authenticate.
    assert_eq!(count("requests_total{principal=\"-\"}"), 1);
    drop(peer);
    server.signal("TERM");
    let line = server.wait_for_log("security=\"usage\"");
    let has = |text: &str| assert!(line.contains(text), "{line}");
    has("principal=\"ann\" requests=3 ");
    has(&format!(" bytes_in={bytes} "));
    assert!(!line.contains("peak_memory=0"), "{line}");
}
