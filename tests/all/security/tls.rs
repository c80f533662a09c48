//! TLS: who gets in, and what is said and counted of those who don't.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpStream},
    os::unix::fs::PermissionsExt as _,
    process::Command,
    sync::Arc,
    thread,
    time::{Duration, SystemTime},
};

use mb_server::{
    client::{Builder, Client, ClientError},
    transport::{ClientTls, client_config},
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _};
use serde_json::{Value, json};

use crate::{
    setup,
    support::{
        KEEPALIVE, PATIENCE, RawClient, TestServer, absent, frame,
        pki::{Pki, pair},
    },
};

fn start(settings: &str) -> TestServer {
    setup().set(settings).start()
}

fn tls(pki: &Pki, server: SocketAddr, change: impl FnOnce(&mut ClientTls)) -> Builder {
    let mut tls = ClientTls {
        ca: Some(pki.path("ca.crt")),
        ..ClientTls::default()
    };
    change(&mut tls);
    Client::builder(server.to_string()).tls(tls)
}

fn sum(builder: Builder) -> Result<Value, ClientError> {
    let client = builder.retries(0).reconnect(false).connect()?;
    client.call_json("calc.add", &json!({"a": 2, "b": 40}))
}

fn failures(server: &TestServer, reason: &str) -> u64 {
    server.count(&format!(
        "mb_handshake_failures_total{{reason=\"{reason}\"}}"
    ))
}

#[test]
fn who_gets_in() {
    let (pki, other) = (Pki::new(), Pki::new());
    pki.issue("client", &["ann"], (2020, 2040), 10);
    pki.issue("expired", &["ann"], (2019, 2020), 11);
    pki.issue("early", &["ann"], (2039, 2040), 12);
    pki.issue("revoked", &["ann"], (2020, 2040), 13);
    other.issue("foreign", &["ann"], (2020, 2040), 14);
    pki.revoke(&[13]);
    let crl = format!("crl = {:?}\n", pki.path("crl.pem").display().to_string());
    let server = start(&pki.settings(&(pki.ca_setting() + &crl)));
    let port = server.listeners[1];
    let shows = |dir: &Pki, name: &str| Some(pair(dir.dir.path(), name));
    let own = shows(&pki, "client");

    let sums = sum(tls(&pki, port, |tls| tls.identity = own.clone())).unwrap();
    assert_eq!(sums, json!({"sum": 42}));
    let any = sum(tls(&pki, port, |tls| {
        tls.identity = own.clone();
        (tls.ca, tls.reject_unauthorized) = (None, false);
    }));
    assert_eq!(
        any.unwrap(),
        json!({"sum": 42}),
        "reject_unauthorized = false takes any certificate"
    );
    let calls = server.calls();
    assert_eq!(calls, 2);

    type Change<'a> = Box<dyn Fn(&mut ClientTls) + 'a>;
    let wrong_ca: Change<'_> =
        Box::new(|tls| (tls.ca, tls.identity) = (Some(other.path("ca.crt")), own.clone()));
    let wrong_name: Change<'_> = Box::new(|tls| {
        (tls.server_name, tls.identity) = (Some("other.example".into()), own.clone())
    });
    let shown =
        |dir, name| -> Change<'_> { Box::new(move |tls| tls.identity = Some(pair(dir, name))) };
    let (own_dir, other_dir) = (pki.dir.path(), other.dir.path());
    let table: [(&str, Change<'_>, &str); 7] = [
        ("unknown-ca", wrong_ca, "refused-by-peer"),
        ("wrong-name", wrong_name, "refused-by-peer"),
        ("", Box::new(|_| {}), "no-certificate"),
        ("", shown(own_dir, "expired"), "expired"),
        ("", shown(own_dir, "early"), "not-yet-valid"),
        ("", shown(own_dir, "revoked"), "revoked"),
        ("", shown(other_dir, "foreign"), "unknown-ca"),
    ];
    for (said, change, counted) in table {
        let before = failures(&server, counted);
        match sum(tls(&pki, port, |tls| change(tls))).unwrap_err() {
            ClientError::NotSent(why) => assert!(why.contains(said), "{counted}: {why}"),
            other => panic!("{counted}: {other}"),
        }
        server.until(counted, |server| failures(server, counted) == before + 1);
    }
    assert_eq!(server.calls(), calls, "no guest was called");
    server.until("all of them are gone", |server| {
        server.json("/connections")["connections"] == json!([])
    });
}

#[test]
fn what_is_no_handshake_costs_nothing() {
    let pki = Pki::new();
    let server = start(&pki.settings(""));
    let port = server.listeners[1];

    // Plain bytes where TLS is spoken.
    let mut plain = TcpStream::connect(port).unwrap();
    plain.set_read_timeout(Some(PATIENCE)).unwrap();
    plain
        .write_all(b"\0\0\0\x14\0\0\0\0REQUEST:a.b:1.0.0:1\n")
        .unwrap();
    let mut answer = Vec::new();
    plain.read_to_end(&mut answer).unwrap();
    assert_eq!(answer.first(), Some(&0x15), "an alert: {answer:?}");
    server.until("not-tls", |server| failures(server, "not-tls") == 1);

    // A hello of TLS 1.1.
    let mut hello = vec![3, 2];
    hello.extend([7; 32]);
    hello.extend([0, 0, 2, 0xc0, 0x13, 1, 0]);
    let length = u8::try_from(hello.len()).unwrap();
    let mut record = vec![0x16, 3, 1, 0, length + 4, 1, 0, 0, length];
    record.extend(hello);
    let mut old = TcpStream::connect(port).unwrap();
    old.set_read_timeout(Some(PATIENCE)).unwrap();
    old.write_all(&record).unwrap();
    let mut answer = Vec::new();
    old.read_to_end(&mut answer).unwrap();
    assert_eq!(
        answer[..6],
        [0x15, 3, 3, 0, 2, 2],
        "a fatal alert: {answer:?}"
    );
    server.until("nothing-in-common", |server| {
        failures(server, "nothing-in-common") == 1
    });

    // TLS where plain bytes are spoken.
    let mut raw = server.connect();
    let config = client_config(&ClientTls {
        ca: Some(pki.path("ca.crt")),
        ..ClientTls::default()
    })
    .unwrap();
    let name = "localhost".try_into().unwrap();
    let mut session = rustls::ClientConnection::new(Arc::clone(&config), name).unwrap();
    let mut hello = Vec::new();
    session.write_tls(&mut hello).unwrap();
    raw.send(&hello);
    let code = raw.message().code();
    assert!(
        ["INVALID_FRAME", "MESSAGE_TOO_LARGE"].contains(&&*code),
        "{code}"
    );
    raw.expect_end();

    // Abandoned at each byte, by an end in order and by none.
    for (count, end) in (0..hello.len()).zip([true, false].into_iter().cycle()) {
        let mut stream = TcpStream::connect(port).unwrap();
        stream.write_all(&hello[..count]).unwrap();
        if end {
            stream.shutdown(Shutdown::Write).unwrap();
        }
    }
    server.until("all are gone", |server| {
        failures(server, "abandoned") == hello.len() as u64
    });
    assert_eq!(server.calls(), 0);
    assert_eq!(
        sum(tls(&pki, port, |_| {})).unwrap(),
        json!({"sum": 42}),
        "and it serves"
    );
}

#[test]
fn a_handshake_ends_at_its_deadline() {
    let pki = Pki::new();
    let server = setup()
        .set("handshake_timeout = 300")
        .set(&pki.settings(""))
        .start();
    let mut quiet = TcpStream::connect(server.listeners[1]).unwrap();
    quiet.set_read_timeout(Some(PATIENCE)).unwrap();
    quiet.write_all(&[0x16]).unwrap();
    quiet.read_to_end(&mut Vec::new()).unwrap();
    server.until("timeout", |server| failures(server, "timeout") == 1);
}

#[test]
fn certificates_give_names_and_invalid_ones_none() {
    let (pki, other) = (Pki::new(), Pki::new());
    pki.issue("client", &["ann"], (2020, 2040), 10);
    pki.issue("expired", &["ann"], (2020, 2021), 11);
    pki.issue("nameless", &[], (2020, 2040), 12);
    other.issue("client", &["ann"], (2020, 2040), 10);
    let settings = pki.settings(&(pki.ca_setting() + "reject_unauthorized = false\n"));
    let server = setup()
        .set("auth = \"optional\"")
        .set(&settings)
        .set("[principals.ann]\nrights = [\"calc.*\"]\n[principals.anonymous]\nrights = [\"echo.*\"]")
        .start();
    let port = server.listeners[1];
    assert!(
        sum(tls(&pki, port, |tls| tls.identity =
            Some(pair(pki.dir.path(), "client"))))
        .is_ok()
    );
    for (identity, reason) in [
        (None, None),
        (Some(pair(other.dir.path(), "client")), Some("unknown-ca")),
        (Some(pair(pki.dir.path(), "expired")), Some("expired")),
        (Some(pair(pki.dir.path(), "nameless")), Some("no-name")),
    ] {
        match sum(tls(&pki, port, |tls| tls.identity = identity)).unwrap_err() {
            ClientError::Answered(refusal) => assert_eq!(refusal.code, "FORBIDDEN"),
            other => panic!("{other}"),
        }
        if let Some(reason) = reason {
            let line = server.wait_for_log("client certificate not usable");
            assert!(line.contains("WARN") && line.contains(reason), "{line}");
        }
    }
}

#[test]
fn certificates_are_read_again_without_a_restart() {
    let pki = Pki::new();
    let server = setup()
        .set("reload_interval = 50")
        .set(&pki.settings(""))
        .start();
    let port = server.listeners[1];
    let before = tls(&pki, port, |_| {}).connect().unwrap();
    pki.issue("server", &["renewed.example"], (2020, 2040), 20);
    server.wait_for_log("certificates");
    let named = |name: &'static str| {
        tls(&pki, port, move |tls| tls.server_name = Some(name.into())).connect()
    };
    server.until("the new one", |_| named("renewed.example").is_ok());
    assert!(named("localhost").is_err());
    let sum: Value = before
        .call_json("calc.add", &json!({"a": 2, "b": 40}))
        .unwrap();
    assert_eq!(sum, json!({"sum": 42}), "open connections stay");
}

#[test]
fn a_server_with_wrong_files_does_not_start() {
    let pki = Pki::new();
    pki.issue("other", &["localhost"], (2020, 2040), 2);
    std::fs::write(pki.path("empty"), "").unwrap();
    let check = |cert: &str, key: &str, expected: &[&str]| {
        let settings = setup().set(&format!(
            "[tls]\nport = 0\ncert = {:?}\nkey = {:?}",
            pki.path(cert).display().to_string(),
            pki.path(key).display().to_string()
        ));
        let output = settings.command().output().unwrap();
        assert_eq!(output.status.code(), Some(2));
        let said = String::from_utf8(output.stderr).unwrap();
        for part in expected {
            assert!(said.contains(part), "{said:?} lacks {part:?}");
        }
    };
    check(
        "server.crt",
        "other.key",
        &[
            "other.key",
            "is not the key of the certificate",
            "server.crt",
        ],
    );
    check(
        "missing.crt",
        "server.key",
        &["missing.crt", "No such file"],
    );
    check(
        "server.key",
        "server.key",
        &["server.key", "no CERTIFICATE section"],
    );
    check(
        "server.crt",
        "server.crt",
        &["server.crt", "no PRIVATE KEY section"],
    );
    check("empty", "server.key", &["empty", "no CERTIFICATE section"]);
    let read = |name: &str| std::fs::read_to_string(pki.path(name)).unwrap();
    let write = |name: &str, text: String| std::fs::write(pki.path(name), text).unwrap();
    write(
        "joined.crt",
        read("server.crt").trim_end().to_owned() + &read("other.crt"),
    );
    check("joined.crt", "server.key", &["joined.crt: line "]);
    write("two.key", read("server.key") + &read("other.key"));
    check(
        "server.crt",
        "two.key",
        &["two.key: keys at line 1 and at line 6"],
    );
}

#[test]
fn keys_that_cannot_be_used_are_named_with_their_cause() {
    let pki = Pki::new();
    let path = |name: &str| pki.path(name).display().to_string();
    let openssl = |arguments: &[&str]| Command::new("openssl").args(arguments).output();
    if let Err(error) = openssl(&["version"]) {
        return absent("openssl", &error);
    }
    let (key, cert, config) = (path("odd.key"), path("odd.crt"), path("server.key"));
    let check = |make: &[&str], expected: &str| {
        let made = openssl(make).unwrap();
        assert!(made.status.success(), "{make:?}: {made:?}");
        let settings = setup().set(&format!("[tls]\nport = 0\ncert = {cert:?}\nkey = {key:?}"));
        let output = settings.command().output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(
            said.contains("odd.key: ") && said.contains(expected),
            "{said}"
        );
        // A client with the same files says the same.
        let files = (pki.path("odd.crt"), pki.path("odd.key"));
        let client = tls(&pki, SocketAddr::from(([127, 0, 0, 1], 1)), |tls| {
            tls.identity = Some(files)
        });
        match client.connect().err().unwrap() {
            ClientError::NotSent(why) => assert!(why.contains(expected), "{why}"),
            other => panic!("{other}"),
        }
    };
    let self_signed = [
        "req",
        "-x509",
        "-nodes",
        "-keyout",
        &key,
        "-out",
        &cert,
        "-subj",
        "/CN=odd",
        "-addext",
        "basicConstraints=critical,CA:FALSE",
        "-newkey",
    ];
    let with = |more: &[&'static str]| [&self_signed[..], more].concat();
    check(
        &with(&["ec", "-pkeyopt", "ec_paramgen_curve:P-521"]),
        "curve P-521",
    );
    check(&with(&["rsa:1024"]), "RSA of 2048 to 4096 bits");
    let encrypt = [
        "pkey", "-in", &config, "-aes256", "-passout", "pass:x", "-out", &key,
    ];
    check(&encrypt, "openssl pkey -in FILE");
    check(
        &["pkey", "-in", &config, "-outform", "der", "-out", &key],
        "-inform der",
    );
}

#[test]
fn a_revoked_client_stays_out_however_the_lists_are_written() {
    let (pki, other) = (Pki::new(), Pki::new());
    pki.issue("revoked", &["ann"], (2020, 2040), 13);
    pki.issue("client", &["ann"], (2020, 2040), 14);
    let read = |pki: &Pki| std::fs::read_to_string(pki.path("ca.crt")).unwrap();
    std::fs::write(pki.path("cas.pem"), read(&pki) + &read(&other)).unwrap();
    let path = |name: &str| pki.path(name).display().to_string();
    let (cas, crl) = (path("cas.pem"), path("lists.pem"));
    let settings = |lists: &str, more: &str| {
        std::fs::write(&crl, lists).unwrap();
        setup().set(&pki.settings(&format!("ca = {cas:?}\ncrl = {crl:?}\n{more}")))
    };
    let connect = |server: &TestServer, name: &str| {
        let identity = Some(pair(pki.dir.path(), name));
        sum(tls(&pki, server.listeners[1], |tls| {
            tls.identity = identity
        }))
    };
    let own = pki.revocation_list(&[13], (2021, 2040));
    let (older, late) = (
        pki.revocation_list(&[], (2020, 2040)),
        pki.revocation_list(&[13], (2021, 2022)),
    );
    let others = other.revocation_list(&[], (2021, 2040));

    for (lists, warning) in [
        (format!("\u{feff}{own}{others}"), None),
        (format!("{own}\u{feff}{others}"), None),
        // Of two that are of one CA, the newer one counts.
        (format!("{older}{own}{others}"), None),
        (own.clone(), Some("no list of the CA")),
        (format!("{late}{others}"), Some("expired at")),
    ] {
        let server = settings(&lists, "").start();
        if let Some(warning) = warning {
            let line = server.wait_for_log("lists.pem");
            assert!(line.contains(warning) && line.contains("WARN"), "{line}");
        }
        assert!(connect(&server, "revoked").is_err(), "{lists}");
        server.until("revoked", |server| failures(server, "revoked") == 1);
        assert!(connect(&server, "client").is_ok(), "{lists}");
    }
    for lists in [
        format!(" {own}{others}"),
        format!("\t{own}{others}"),
        others.trim_end().to_owned() + &own,
        own.replace("X509 CRL", "CRL") + &others,
        own.replace("X509 CRL", "CERTIFICATE") + &others,
    ] {
        let output = settings(&lists, "").command().output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{lists}");
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(said.contains("lists.pem: line "), "{said}");
    }
    // No list of theirs, and one that is too old.
    for lists in [others.clone(), format!("{late}{others}")] {
        let server = settings(&lists, "crl_strict = true").start();
        assert!(connect(&server, "client").is_err());
        let line = server.wait_for_log("handshake failed");
        assert!(line.contains("tls.crl_strict is set"), "{line}");
    }
    let server = settings(&(own + &others), "crl_strict = true").start();
    assert!(connect(&server, "client").is_ok());
}

#[test]
fn a_certificate_of_a_ca_is_named_as_that() {
    let pki = Pki::new();
    pki.issue_ca("client", &["ann"], 10);
    let server = start(&pki.settings(&pki.ca_setting()));
    let shown = Some(pair(pki.dir.path(), "client"));
    match sum(tls(&pki, server.listeners[1], |tls| tls.identity = shown)).unwrap_err() {
        ClientError::NotSent(why) => {
            assert!(
                why.contains("client.crt: is that of a CA (CA:TRUE)"),
                "{why}"
            );
        }
        other => panic!("{other}"),
    }
    // One that shows it all the same.
    let (cert, key) = pair(pki.dir.path(), "client");
    let mut roots = rustls::RootCertStore::empty();
    roots
        .add(CertificateDer::from_pem_file(pki.path("ca.crt")).unwrap())
        .unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_client_auth_cert(
            vec![CertificateDer::from_pem_file(cert).unwrap()],
            PrivateKeyDer::from_pem_file(key).unwrap(),
        )
        .unwrap();
    let name = "localhost".try_into().unwrap();
    let mut session = rustls::ClientConnection::new(Arc::new(config), name).unwrap();
    let mut stream = TcpStream::connect(server.listeners[1]).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    while session
        .complete_io(&mut stream)
        .is_ok_and(|(read, _)| read > 0)
    {}
    let line = server.wait_for_log("handshake failed");
    assert!(
        line.contains("CA:TRUE") && line.contains("basicConstraints"),
        "{line}"
    );
}

#[test]
fn of_a_chain_the_servers_own_certificate_decides() {
    let (pki, old) = (Pki::new(), Pki::new());
    old.issue("expired", &["old"], (2019, 2020), 3);
    let read = |pki: &Pki, name: &str| std::fs::read_to_string(pki.path(name)).unwrap();
    let own = read(&pki, "server.crt");
    let chain = format!(
        "{own}{own}{}{}",
        read(&pki, "ca.crt"),
        read(&old, "expired.crt")
    );
    std::fs::write(pki.path("server.crt"), chain).unwrap();
    let server = start(&pki.settings(""));
    for part in [
        "certificate 2 is in it twice",
        "put them in order",
        "certificate 4, which",
    ] {
        let line = server.wait_for_log("server.crt");
        assert!(line.contains(part) && line.contains("WARN"), "{line}");
    }
    assert_eq!(
        sum(tls(&pki, server.listeners[1], |_| {})).unwrap(),
        json!({"sum": 42})
    );
    assert_eq!(server.json("/readyz")["invalidCertificates"], json!([]));
}

#[test]
fn a_certificate_that_is_not_valid_leaves_the_other_listeners() {
    for (years, problem) in [
        ((2019, 2020), "expired at"),
        ((2039, 2040), "is not valid before"),
    ] {
        let pki = Pki::new();
        pki.issue("server", &["localhost", "127.0.0.1"], years, 2);
        let server = setup()
            .set("reload_interval = 50")
            .set(&pki.settings(""))
            .start();
        let line = server.wait_for_log("server.crt");
        assert!(line.contains(problem) && line.contains("WARN"), "{line}");
        let plain = Client::builder(server.wire.to_string());
        assert_eq!(sum(plain).unwrap(), json!({"sum": 42}));
        let ready = server.json("/readyz");
        assert_eq!(ready["status"], "ready");
        let row = &ready["invalidCertificates"][0];
        assert!(
            row["file"].as_str().unwrap().ends_with("server.crt"),
            "{ready}"
        );
        assert!(row["error"].as_str().unwrap().contains(problem), "{ready}");
        assert!(sum(tls(&pki, server.listeners[1], |_| {})).is_err());

        pki.issue("server", &["localhost", "127.0.0.1"], (2020, 2040), 20);
        server.until("renewed", |server| {
            server.json("/readyz")["invalidCertificates"] == json!([])
        });
        assert_eq!(
            sum(tls(&pki, server.listeners[1], |_| {})).unwrap(),
            json!({"sum": 42})
        );

        // One that is worse than the present one is not taken.
        pki.issue("server", &["localhost", "127.0.0.1"], years, 21);
        while !server
            .wait_for_log("certificates stay as they were: ")
            .contains(problem)
        {}
        assert_eq!(
            sum(tls(&pki, server.listeners[1], |_| {})).unwrap(),
            json!({"sum": 42})
        );
    }
}

#[test]
fn certificates_that_could_not_be_read_are_read_at_a_later_look() {
    let pki = Pki::new();
    let server = setup()
        .set("reload_interval = 50")
        .set(&pki.settings(""))
        .start();
    let mode = |mode| {
        let mode = fs::Permissions::from_mode(mode);
        fs::set_permissions(pki.path("server.crt"), mode).unwrap();
    };
    assert_eq!(server.json("/readyz")["staleFiles"], json!([]));
    // A file that may not be read for now, and looks the same when it may.
    mode(0o606);
    pki.issue(
        "server",
        &["localhost", "renewed.example"],
        (2020, 2040),
        20,
    );
    let line = server.wait_for_log("certificates stay as they were: ");
    assert!(line.contains("WARN"), "{line}");
    let ready = server.json("/readyz");
    assert_eq!(ready["status"], "ready");
    let row = &ready["staleFiles"][0];
    assert_eq!(row["files"], "certificates", "{ready}");
    let error = row["error"].as_str().unwrap();
    assert!(error.contains("server.crt"), "{error}");
    mode(0o644);
    server.until("the renewed one", |server| {
        tls(&pki, server.listeners[1], |tls| {
            tls.server_name = Some("renewed.example".into());
        })
        .connect()
        .is_ok()
    });
    server.until("it is said", |server| {
        server.json("/readyz")["staleFiles"] == json!([])
    });
}

#[test]
fn openssl_and_node_connect_with_certificates() {
    let pki = Pki::new();
    pki.issue("client", &["ann"], (2020, 2040), 10);
    let server = start(&pki.settings(&pki.ca_setting()));
    let port = server.listeners[1].port().to_string();
    let path = |name: &str| pki.path(name).display().to_string();
    let mut openssl = Command::new("openssl");
    openssl.args([
        "s_client",
        "-connect",
        &format!("127.0.0.1:{port}"),
        "-CAfile",
        &path("ca.crt"),
    ]);
    openssl.args([
        "-verify_return_error",
        "-alpn",
        "mb/1",
        "-cert",
        &path("client.crt"),
        "-key",
        &path("client.key"),
    ]);
    openssl.stdin(std::process::Stdio::null());
    match openssl.output() {
        Err(error) => absent("openssl", &error),
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stdout);
            assert!(
                said.contains("Verify return code: 0") && said.contains("ALPN protocol: mb/1"),
                "{said}"
            );
        }
    }
    // As `RawClient` would, but over TLS.
    let script = "
        const tls = require('tls'), fs = require('fs'), [port, ca, cert, key] = process.argv.slice(1);
        const read = (file) => fs.readFileSync(file);
        const body = Buffer.from('REQUEST:calc.add:1.0.0:1\\n{\"a\":2,\"b\":40}');
        const head = Buffer.alloc(8); head.writeUInt32BE(body.length);
        const options = { port, host: '127.0.0.1', ca: read(ca), cert: read(cert), key: read(key), ALPNProtocols: ['mb/1'] };
        const socket = tls.connect(options, () => socket.write(Buffer.concat([head, body])));
        socket.on('data', (data) => { console.log(socket.alpnProtocol, data.subarray(8).toString()); socket.end(); });
        socket.on('error', (error) => { console.error(error.message); process.exit(1); });";
    let args = [
        "-e",
        script,
        &port,
        &path("ca.crt"),
        &path("client.crt"),
        &path("client.key"),
    ];
    match Command::new("node").args(args).output() {
        Err(error) => absent("node", &error),
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stdout);
            assert!(
                said.contains("mb/1 RESPONSE:calc.add:1.0.0:1\n{\"sum\":42}"),
                "{said} {output:?}"
            );
        }
    }
}

#[test]
fn large_answers_and_the_drain_pass_through_tls() {
    let pki = Pki::new();
    let mut server = start(&pki.settings(""));
    let client = tls(&pki, server.listeners[1], |_| {}).connect().unwrap();
    let text = "x".repeat(900_000);
    let said: Value = client
        .call_json("echo.say", &json!({"text": text}))
        .unwrap();
    assert_eq!(said, json!({"text": text}));
    let mut quiet = RawClient::connect(server.wire);
    server.signal("TERM");
    assert_eq!(quiet.message().code(), "SHUTTING_DOWN");
    assert!(server.wait().success());
}

/// A connection over TLS, to the byte.
struct Raw {
    stream: rustls::StreamOwned<rustls::ClientConnection, TcpStream>,
}

impl Raw {
    fn connect(config: &Arc<rustls::ClientConfig>, server: SocketAddr) -> Self {
        let socket = TcpStream::connect(server).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let name = "localhost".try_into().unwrap();
        let session = rustls::ClientConnection::new(Arc::clone(config), name).unwrap();
        Self {
            stream: rustls::StreamOwned::new(session, socket),
        }
    }

    /// The next message, and all that was sent if it is the last one.
    fn message(&mut self) -> String {
        let mut head = [0; 8];
        self.stream.read_exact(&mut head).unwrap();
        let length = u32::from_be_bytes(head[..4].try_into().unwrap());
        let mut body = vec![0; length as usize];
        self.stream.read_exact(&mut body).unwrap();
        String::from_utf8(body).unwrap()
    }

    fn ask(&mut self, topic: &str) -> String {
        let request = format!("REQUEST:{topic}:1.0.0:1\n1");
        self.stream
            .write_all(&frame(0, request.as_bytes()))
            .unwrap();
        self.message()
    }

    fn is_resumed(&self) -> bool {
        self.stream.conn.handshake_kind() == Some(rustls::HandshakeKind::Resumed)
    }
}

fn raw_config(pki: &Pki, client: Option<&str>) -> Arc<rustls::ClientConfig> {
    client_config(&ClientTls {
        ca: Some(pki.path("ca.crt")),
        identity: client.map(|name| pair(pki.dir.path(), name)),
        ..ClientTls::default()
    })
    .unwrap()
}

/// Issues a certificate for a client that expires soon; returns when.
fn expiring(pki: &Pki, name: &str) -> SystemTime {
    let now = SystemTime::now();
    // A certificate knows whole seconds, and is valid up to the end of its last one.
    let ends = now + Duration::from_secs(4);
    let begins = now - Duration::from_secs(3600);
    pki.issue_between(name, &["ann"], (begins, ends), 10);
    ends + Duration::from_secs(1)
}

fn sleep_until(time: SystemTime) {
    thread::sleep(time.duration_since(SystemTime::now()).unwrap_or_default());
}

#[test]
fn a_resumed_session_brings_no_expired_certificate_in() {
    let pki = Pki::new();
    let server = start(&pki.settings(&pki.ca_setting()));
    let port = server.listeners[1];
    let ends = expiring(&pki, "client");
    let config = raw_config(&pki, Some("client"));
    assert!(Raw::connect(&config, port).ask("echo.say").ends_with("\n1"));
    let mut resumed = Raw::connect(&config, port);
    assert!(resumed.ask("echo.say").ends_with("\n1"));
    assert!(resumed.is_resumed(), "else this test shows nothing");
    assert_eq!(
        server.json("/connections")["connections"][0]["principal"],
        "ann"
    );
    sleep_until(ends);
    let mut late = Raw::connect(&config, port);
    let said = late.message();
    assert!(late.is_resumed(), "else this test shows nothing");
    assert!(
        said.starts_with("ERROR:system.error:1.0.0\n") && said.contains("UNAUTHORIZED"),
        "{said}"
    );
    server.until("it is counted", |server| failures(server, "expired") == 1);
    let said = resumed.ask("echo.say");
    assert!(
        said.starts_with("ERROR:echo.say:1.0.0:1\n") && said.contains("UNAUTHORIZED"),
        "the one that was open is closed too: {said}"
    );
}

#[test]
fn a_certificate_that_expires_or_is_revoked_ends_its_open_connections() {
    let pki = Pki::new();
    pki.issue("revoked", &["bob"], (2020, 2040), 11);
    pki.issue("stays", &["carl"], (2020, 2040), 12);
    pki.revoke(&[99]);
    let crl = format!("crl = {:?}\n", pki.path("crl.pem").display().to_string());
    let server = setup()
        .set("reload_interval = 50\nkeep_alive_interval = 200")
        .set(&pki.settings(&(pki.ca_setting() + &crl)))
        .start();
    let port = server.listeners[1];
    let come = |name: &str| {
        let mut peer = Raw::connect(&raw_config(&pki, Some(name)), port);
        assert!(peer.ask("echo.say").ends_with("\n1"));
        peer
    };
    let ends = expiring(&pki, "client");
    let (mut expires, mut stays) = (come("client"), come("stays"));
    let (mut silent, mut lively) = (come("revoked"), come("revoked"));
    pki.revoke(&[11]);
    server.wait_for_log("certificates: read again");
    lively.stream.write_all(&KEEPALIVE).unwrap();
    for peer in [&mut lively, &mut silent, &mut expires] {
        let said = peer.message();
        assert!(
            said.starts_with("ERROR:system.error:1.0.0\n") && said.contains("UNAUTHORIZED"),
            "{said}"
        );
    }
    assert!(SystemTime::now() > ends - Duration::from_secs(2));
    assert!(stays.ask("echo.say").ends_with("\n1"));
}

#[test]
fn what_tls_has_agreed_on_is_spoken() {
    let pki = Pki::new();
    let server = start(&pki.settings(""));
    let mut config = Arc::unwrap_or_clone(raw_config(&pki, None));
    let request = "GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
    for (agreed, begins) in [(None, "HTTP/1.1 200"), (Some("http/1.1"), "HTTP/1.1 200")] {
        config.alpn_protocols = agreed.map(|name: &str| name.into()).into_iter().collect();
        let mut peer = Raw::connect(&Arc::new(config.clone()), server.listeners[1]);
        peer.stream.write_all(request.as_bytes()).unwrap();
        let mut answer = vec![0; begins.len()];
        peer.stream.read_exact(&mut answer).unwrap();
        assert_eq!(String::from_utf8_lossy(&answer), begins);
    }
    config.alpn_protocols = vec!["mb/1".into()];
    let mut peer = Raw::connect(&Arc::new(config.clone()), server.listeners[1]);
    peer.stream.write_all(request.as_bytes()).unwrap();
    assert!(peer.message().contains("INVALID_FRAME"));

    // A listener offers what it speaks, so the handshake tells who is wrong.
    for (protocols, spoken, other) in [("frames", "mb/1", "http/1.1"), ("http", "http/1.1", "mb/1")]
    {
        let setup = setup().set(&format!("protocols = [{protocols:?}]"));
        let server = setup.set(&pki.settings("")).start();
        for (offered, agreed) in [
            (vec![spoken], Some(spoken)),
            (vec![other, spoken], Some(spoken)),
            (vec![other], None),
        ] {
            config.alpn_protocols = offered
                .iter()
                .map(|name| name.as_bytes().to_vec())
                .collect();
            let mut peer = Raw::connect(&Arc::new(config.clone()), server.listeners[1]);
            let rustls::StreamOwned { conn, sock } = &mut peer.stream;
            let done = conn.complete_io(sock);
            let found = done.ok().and_then(|_| conn.alpn_protocol());
            assert_eq!(found, agreed.map(str::as_bytes), "{protocols}: {offered:?}");
        }
    }
}

#[test]
fn failures_of_others_of_its_address_do_not_keep_a_valid_certificate_out() {
    let pki = Pki::new();
    pki.issue("client", &["ann"], (2020, 2040), 10);
    let server = setup()
        .set("auth = \"required\"\nhandshake_timeout = \"60s\"")
        .set(&pki.settings(&(pki.ca_setting() + "reject_unauthorized = false\n")))
        .set("[principals.ann]\nrights = [\"*\"]")
        .start();
    let port = server.listeners[1];
    let (nobody, ann) = (raw_config(&pki, None), raw_config(&pki, Some("client")));
    let hello = |payload: &str| {
        let mut peer = Raw::connect(&nobody, port);
        let request = format!("REQUEST:system.hello:1.0.0:1\n{payload}");
        // One that is refused at once may be closed before it has asked.
        let _ = peer.stream.write_all(&frame(0, request.as_bytes()));
        peer.message()
    };
    assert!(hello("{}").contains("must carry a token"));
    // A failure is forgotten after six seconds, so a slow machine takes more.
    let refused: Vec<_> = (0..100)
        .map(|_| hello("{\"token\":\"mbt_wrong\"}"))
        .collect();
    assert!(
        refused
            .iter()
            .all(|refused| refused.contains("UNAUTHORIZED"))
    );
    let first = refused
        .iter()
        .position(|refused| refused.contains("retryAfterMs"));
    assert!(first.is_some_and(|first| first >= 10), "{first:?}");
    for _ in 0..10 {
        hello("{}");
    }
    assert!(Raw::connect(&ann, port).ask("echo.say").ends_with("\n1"));

    // From there, few handshakes run at the same time.
    let accepted = "mb_connections_accepted_total";
    server.until("all have left", |server| {
        server.json("/connections")["connections"] == json!([])
    });
    let before = server.metric(accepted);
    let stuck: Vec<_> = (0..20).map(|_| TcpStream::connect(port).unwrap()).collect();
    server.until("the others were closed", |server| {
        let open = server.json("/connections")["connections"].clone();
        server.metric(accepted) == before + 20 && open.as_array().unwrap().len() == 8
    });
    drop(stuck);
    server.until("there is room", |_| {
        let mut peer = Raw::connect(&ann, port);
        let request = frame(0, b"REQUEST:echo.say:1.0.0:1\n1");
        peer.stream.write_all(&request).is_ok() && peer.stream.read(&mut [0; 64]).is_ok()
    });
}
