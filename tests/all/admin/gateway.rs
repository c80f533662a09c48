//! Who may knock at the admin endpoint, how long, and with how much.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket},
    os::unix::{fs::PermissionsExt as _, net::UnixStream},
    process::Command,
};

use crate::{
    BINARY, setup, start,
    support::{PATIENCE, TestServer, http},
};

fn silent(server: &TestServer) -> TcpStream {
    let stream = TcpStream::connect(server.admin).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

#[test]
fn two_hundred_silent_clients_are_displaced_for_one_that_asks() {
    let server = start();
    let mut peers: Vec<_> = (0..200).map(|_| silent(&server)).collect();
    for _ in 0..20 {
        assert_eq!(server.get("/healthz").0, 200);
    }
    let mut nothing = [0];
    assert_eq!(
        peers[0].read(&mut nothing).unwrap_or(0),
        0,
        "the first of them had to go"
    );
    // One that has begun to ask is no better.
    for peer in peers.iter_mut().rev().take(20) {
        peer.write_all(b"GET /healthz HTTP/1.1\r\nHost: loc")
            .unwrap();
    }
    let _more: Vec<_> = (0..100).map(|_| silent(&server)).collect();
    assert_eq!(server.get("/healthz").0, 200);
}

/// Sends as much as is taken; what comes back before the end.
fn exchange(server: &TestServer, bytes: &[u8]) -> String {
    let mut stream = silent(server);
    let _ = stream.write_all(bytes);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

#[test]
fn too_much_of_anything_is_refused() {
    let server = start();
    let head = "GET /healthz HTTP/1.1\r\nHost: localhost\r\n";
    let long = format!("{head}X: {}\r\n\r\n", "x".repeat(10 * 1024 * 1024));
    let many = format!("{head}{}\r\n", "X: x\r\n".repeat(100));
    let post = |line: &str| format!("POST /drain HTTP/1.1\r\nHost: localhost\r\n{line}\r\n\r\n");
    for (request, status) in [
        (long, 431),
        (many, 431),
        (post("Content-Length: 1048577"), 413),
        (post("Content-Length: -1"), 400),
        (post("Content-Length: 1\r\nContent-Length: 2"), 400),
        (post("Transfer-Encoding: chunked"), 411),
        ("no HTTP at all\r\n\r\n".into(), 400),
        ("\0\u{1}\r\n\r\n".into(), 400),
        (format!("{head}\r\n"), 200),
    ] {
        let answer = exchange(&server, request.as_bytes());
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status} ")),
            "{status}: {}",
            &answer[..answer.len().min(200)]
        );
        assert!(answer.contains("\r\nConnection: close\r\n"), "{answer}");
    }
}

#[test]
fn a_request_in_pieces_and_one_that_waits_to_continue() {
    let server = start();
    let mut stream = silent(&server);
    for byte in b"GET /healthz HTTP/1.1\r\nhost: LOCALHOST\r\nConnection: keep-alive\r\n\r\n" {
        stream.write_all(&[*byte]).unwrap();
    }
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");

    let mut stream = silent(&server);
    let head = format!(
        "POST /log/filter HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {}\r\nExpect: 100-continue\r\n\
         Content-Length: 17\r\n\r\n",
        server.token()
    );
    stream.write_all(head.as_bytes()).unwrap();
    let mut go_on = [0; 25];
    stream.read_exact(&mut go_on).unwrap();
    assert_eq!(&go_on, b"HTTP/1.1 100 Continue\r\n\r\n");
    stream.write_all(br#"{"filter":"info"}"#).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
}

#[test]
fn it_answers_again_after_a_time_without_descriptors() {
    let server = setup().after("ulimit -n 70").start();
    let peers: Vec<_> = (0..100).map(|_| silent(&server)).collect();
    server.wait_for_log("admin endpoint can't accept");
    drop(peers);
    server.until("it answers", |server| {
        exchange(server, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n").contains(" 200 ")
    });
}

#[test]
fn refused_clients_are_displaced() {
    let server = start();
    let refused: Vec<_> = (0..64)
        .map(|_| {
            let mut peer = TcpStream::connect(server.admin).unwrap();
            peer.write_all(b"x\r\n\r\n").unwrap();
            // It has been answered, and stays.
            peer.read_exact(&mut [0; 12]).unwrap();
            peer
        })
        .collect();
    assert_eq!(server.get("/healthz").0, 200);
    drop(refused);
}

#[test]
fn a_socket_of_the_file_system_is_for_its_user() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("admin.sock");
    let server = setup().set(&format!("[admin]\nsocket = {path:?}")).start();
    assert!(
        server
            .said
            .contains(&format!("admin      unix:{}", path.display())),
        "{}",
        server.said
    );
    assert_eq!(
        fs::metadata(&path).unwrap().permissions().mode() & 0o777,
        0o600
    );
    let mut stream = UnixStream::connect(&path).unwrap();
    stream
        .write_all(b"GET /services HTTP/1.1\r\nHost: localhost\r\n\r\n")
        .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(
        answer.starts_with("HTTP/1.1 200") && answer.contains("calc"),
        "{answer}"
    );
    let output = Command::new(BINARY)
        .args(["status", "--admin", &format!("unix:{}", path.display())])
        .output()
        .unwrap();
    assert_eq!(
        output.status.code(),
        Some(0),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(String::from_utf8_lossy(&output.stdout).contains("calc"));
    let nowhere = Command::new(BINARY)
        .args(["status", "--admin", "unix:/nowhere.sock"])
        .output()
        .unwrap();
    assert_eq!(nowhere.status.code(), Some(3));
}

/// An address of this machine that is none of loopback; none without a network.
fn own_address() -> Option<Ipv4Addr> {
    let socket = UdpSocket::bind("0.0.0.0:0").ok()?;
    socket.connect("192.0.2.1:9").ok()?;
    match socket.local_addr().ok()? {
        SocketAddr::V4(address) if !address.ip().is_loopback() => Some(*address.ip()),
        _ => None,
    }
}

#[test]
fn from_another_machine_reading_takes_the_token_too() {
    let Some(ip) = own_address() else {
        eprintln!("skipped: this machine has no address but loopback");
        return;
    };
    let server = setup()
        .set(&format!("allow_unsecure = true\n[admin]\nhost = \"{ip}\""))
        .start();
    let bearer = format!("Authorization: Bearer {}\r\n", server.token());
    let ask = |host: &str, headers: &str| {
        http(
            server.admin,
            &format!(
                "GET /services HTTP/1.1\r\nHost: {host}\r\n{headers}Connection: close\r\n\r\n"
            ),
        )
        .0
    };
    let own = server.admin.to_string();
    assert_eq!(ask(&own, ""), 401);
    assert_eq!(ask(&own, "Authorization: Bearer wrong\r\n"), 401);
    assert_eq!(ask(&own, &bearer), 200);
    assert_eq!(ask(&own, &bearer.replace("Bearer", "bearer")), 200);
    // A probe learns the status, and nothing else.
    for (path, status) in [("/healthz", "ok"), ("/readyz", "ready")] {
        let probe = format!("GET {path} HTTP/1.1\r\nHost: pod\r\nConnection: close\r\n\r\n");
        let (code, body) = http(server.admin, &probe);
        assert_eq!(
            (code, &*body),
            (200, &*format!("{{\"status\":\"{status}\"}}"))
        );
    }
    assert_eq!(ask(&ip.to_string(), &bearer), 200);
    assert_eq!(ask("evil.example", &bearer), 403);
    assert_eq!(ask("192.0.2.1", &bearer), 403);
}

#[test]
fn no_socket_without_a_file_listens() {
    let server = start();
    assert_eq!(server.get("/healthz").0, 200);
    let inodes: Vec<_> = fs::read_dir(format!("/proc/{}/fd", server.child.id()))
        .unwrap()
        .filter_map(|file| fs::read_link(file.ok()?.path()).ok())
        .filter_map(|link| {
            Some(
                link.to_str()?
                    .strip_prefix("socket:[")?
                    .strip_suffix(']')?
                    .to_owned(),
            )
        })
        .collect();
    assert!(!inodes.is_empty());
    let table = fs::read_to_string("/proc/net/unix").unwrap();
    let named = table.lines().filter(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        let own = |inode: &&str| inodes.iter().any(|own| own == inode);
        fields.get(6).is_some_and(own) && fields.len() > 7
    });
    assert_eq!(
        named.collect::<Vec<_>>(),
        [""; 0],
        "any local user could connect"
    );
}
