//! What does not read, does not answer or is not there for a moment stalls
//! nothing but itself.

use std::{
    io::{Read as _, Write as _},
    net::TcpListener,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::{UnixDatagram, UnixStream},
    },
    process::{Child, Stdio},
    time::Instant,
};

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, apply_filter};
use serde_json::json;

use crate::{
    setup,
    support::{PATIENCE, RawClient},
};

/// Killed when dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Has writes of this descriptor wait, or fail where they would.
fn set_waiting(file: impl AsFd, waits: bool) {
    let mut flags = fcntl_getfl(&file).unwrap();
    flags.set(OFlags::NONBLOCK, !waits);
    fcntl_setfl(&file, flags).unwrap();
}

/// Both ends of a pipe that takes no byte more.
fn full_pipe() -> (std::io::PipeReader, std::io::PipeWriter) {
    let (reader, mut writer) = std::io::pipe().unwrap();
    set_waiting(&writer, false);
    // Single ones at the end: more than a page is taken whole or in part.
    for part in [4096, 1] {
        while writer.write(&vec![0; part]).is_ok() {}
    }
    set_waiting(&writer, true);
    (reader, writer)
}

#[test]
fn a_log_an_output_and_a_service_manager_that_read_nothing() {
    let manager = tempfile::tempdir().unwrap();
    let manager = manager.path().join("notify");
    let _manager = UnixDatagram::bind(&manager).unwrap();
    let notifying = UnixDatagram::unbound().unwrap();
    notifying.set_nonblocking(true).unwrap();
    while notifying.send_to(b"STATUS=full", &manager).is_ok() {}

    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let setup = setup();
    let admin = setup.dir.path().join("admin.sock");
    let setup = setup.set(&format!("[admin]\nsocket = {admin:?}"));
    let (setup, mut command) = setup.command_with(&listener);
    let ((_out, stdout), (mut log, stderr)) = (full_pipe(), full_pipe());
    command
        .env("NOTIFY_SOCKET", &manager)
        .stdout(Stdio::from(OwnedFd::from(stdout)))
        .stderr(Stdio::from(OwnedFd::from(stderr)));
    let mut server = Running(command.spawn().unwrap());
    drop(command);

    // The backlog of the listener holds it until the server accepts.
    let mut client = RawClient::connect(listener.local_addr().unwrap());
    for id in 0..20 {
        let failed = client.ask("hostile.trap", &format!("{{\"number\":{id}}}"));
        assert!(failed.line.starts_with("ERROR:"), "{failed:?}");
    }
    let sum = client.ask("calc.add", r#"{"a":1,"b":2}"#);
    assert!(sum.line.starts_with("RESPONSE:"), "{sum:?}");
    let mut page = String::new();
    let mut stream = UnixStream::connect(&admin).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
        .write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
        .unwrap();
    stream.read_to_string(&mut page).unwrap();
    assert!(page.contains("mb_log_lines_dropped_total 0\n"), "{page}");

    let status = std::process::Command::new("kill")
        .arg(server.0.id().to_string())
        .status();
    assert!(status.unwrap().success());
    let (ended, exited) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        let server = &mut server;
        scope.spawn(move || ended.send(server.0.wait().unwrap()).unwrap());
        let status = exited.recv_timeout(PATIENCE).unwrap_or_else(|_| {
            // What is read now lets it go on, and the test end.
            let _ = std::io::copy(&mut log, &mut std::io::sink());
            panic!("SIGTERM did not end it");
        });
        assert_eq!(status.code(), Some(0));
    });
    drop(setup);
}

#[test]
fn a_fatal_error_and_the_log_before_it_are_written_to_the_end() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let setup = setup();
    let mut command = setup.command_on(taken.local_addr().unwrap().port());
    let output = command.output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("calc 1.0.0 is served from"), "{text}");
    let last = text.lines().last().unwrap_or_default();
    assert!(last.starts_with("mb-server: can't listen on"), "{text}");
}

#[test]
fn readers_that_take_nothing_of_a_large_page() {
    let mut setup = setup();
    for number in 0..1500 {
        setup = setup.with_bytes(&format!("broken{number}.wasm"), b"no component");
    }
    let admin = setup.dir.path().join("admin.sock");
    let server = setup
        .set(&format!("log = \"off\"\n[admin]\nsocket = {admin:?}"))
        .start();
    // More than what a socket holds.
    assert!(server.get("/services").1.len() > 500_000);
    let mut readers: Vec<_> = (0..20)
        .map(|_| UnixStream::connect(&admin).unwrap())
        .collect();
    for reader in &mut readers {
        let request = b"GET /services HTTP/1.1\r\nHost: localhost\r\n\r\n";
        reader.write_all(request).unwrap();
    }
    let begun = Instant::now();
    for path in ["/healthz", "/readyz", "/metrics"] {
        assert_eq!(server.get(path).0, 200);
    }
    // After 10 s they are cut off, and would be in nobody's way any more.
    assert!(begun.elapsed().as_secs() < 9, "{:?}", begun.elapsed());
    for mut reader in readers {
        let mut start = [0; 12];
        reader.read_exact(&mut start).unwrap();
        assert_eq!(&start, b"HTTP/1.1 200");
    }
}

/// Has the system refuse what old kernels, gVisor and filters of containers
/// refuse, to this thread and to what it starts.
fn refuse_system_calls(error: i32) {
    let refused = [
        libc::SYS_pidfd_open,
        libc::SYS_prlimit64,
        libc::SYS_setpgid,
        libc::SYS_memfd_create,
        libc::SYS_eventfd2,
        libc::SYS_landlock_create_ruleset,
    ];
    let filter = SeccompFilter::new(
        refused.into_iter().map(|call| (call, vec![])).collect(),
        SeccompAction::Allow,
        SeccompAction::Errno(error as u32),
        std::env::consts::ARCH.try_into().unwrap(),
    );
    apply_filter(&BpfProgram::try_from(filter.unwrap()).unwrap()).unwrap();
}

#[test]
fn system_calls_that_a_container_refuses_are_done_without() {
    for error in [libc::EPERM, libc::ENOSYS] {
        let start = move || {
            refuse_system_calls(error);
            let setup = setup();
            let mut command = setup.command();
            // So that it compiles.
            command.env("XDG_CACHE_HOME", setup.dir.path().join("cache"));
            setup.start_with(&mut command)
        };
        let mut server = std::thread::spawn(start).join().unwrap();
        let sum = server.connect().ask("calc.add", r#"{"a":1,"b":2}"#);
        assert_eq!(sum.json(), json!({"sum": 3}), "{error}");
        assert_eq!(server.json("/readyz")["failedServices"], json!([]));
        let warnings = server.json("/log?level=warn").to_string();
        for warning in [
            "in the process group of the server",
            "compiles without a limit of",
        ] {
            assert!(warnings.contains(warning), "{error}: {warnings}");
        }
        // wasmtime itself does without it where there is none.
        let copied = warnings.contains("memory of instances is copied");
        assert_eq!(copied, error == libc::EPERM, "{warnings}");
        server.signal("TERM");
        assert_eq!(server.wait().code(), Some(0));
    }
}
