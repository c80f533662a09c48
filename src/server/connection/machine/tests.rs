//! What the machine does, step by step, without a socket.

use std::{net::Ipv4Addr, time::Duration};

use super::{deadlines::Late, *};
use crate::{
    access::{Access, ListenerPolicy},
    budget::Budget,
    config::{Auth, Bytes, Config, Millis, Principals},
    dispatch::Counted,
    http::{Exchange, Route},
    server::{drain::DrainFlags, peer::CloseRequest, settings::Buffers},
    wire::{Code, ErrorBody, frame::FrameHeader},
};

fn settings(memory: usize) -> Arc<ServerSettings> {
    let config = Config {
        max_message_size: Bytes(100_000),
        read_timeout: Millis::secs(5),
        handshake_timeout: Millis::secs(10),
        write_timeout: Millis::secs(20),
        idle_timeout: Millis::secs(60),
        ..Config::default()
    };
    Arc::new(ServerSettings {
        config: Arc::new(config),
        listeners: Vec::new(),
        max_connections: 1,
        reserved: 0,
        max_ending: 1,
        buffers: Buffers {
            read: 64,
            write: 1000,
            in_flight: 2,
        },
        thread_stack: 0,
        memory: Budget::new(memory),
    })
}

struct Test {
    machine: Machine,
    peer: Peer,
    now: Instant,
}

impl Test {
    fn new(state: State, must_authenticate: bool, memory: usize) -> Self {
        let access = Access::new(Principals::new(), "/nowhere".into(), 1).unwrap();
        let policy = Arc::new(ListenerPolicy {
            auth: Auth::None,
            rights: None,
            allow_unsecure: false,
        });
        let unauthenticated =
            access.unauthenticated("1".into(), Ipv4Addr::LOCALHOST.into(), false, &policy);
        let drain = Arc::new(DrainFlags::new().unwrap());
        let settings = settings(memory);
        let from = (Ipv4Addr::LOCALHOST, 1).into();
        let peer = Peer::new(
            (1, 0),
            from,
            Arc::new(unauthenticated),
            &drain,
            &settings.memory,
        );
        let now = Instant::now();
        let mut machine = Machine::new(&settings, state, now);
        if state == State::Idle {
            machine.open(must_authenticate, (true, true));
        }
        Self { machine, peer, now }
    }

    fn next(&mut self) -> Step {
        self.machine.next(&self.peer, self.now)
    }

    /// Reads these bytes, as many as there is room for each time.
    fn arrives(&mut self, mut bytes: &[u8]) -> Step {
        self.machine.readable = true;
        loop {
            match self.next() {
                Step::Read => {
                    self.read(&mut bytes);
                }
                step => return step,
            }
        }
    }

    /// One read of what there is.
    fn read(&mut self, bytes: &mut &[u8]) -> usize {
        let read_buffer = self.machine.read_buffer();
        let count = read_buffer.len().min(bytes.len());
        let (read, rest) = bytes.split_at(count);
        read_buffer[..count].copy_from_slice(read);
        *bytes = rest;
        let received = if count == 0 {
            Received::Nothing
        } else {
            let more = !rest.is_empty();
            Received::Bytes { count, more }
        };
        let (peer, now) = (&self.peer, self.now);
        self.machine.received(Ok(received), false, peer, now);
        count
    }

    /// What becomes of it once the time has passed that it waits for.
    fn too_late(&mut self) -> (Late, u64) {
        let (until, late) = self.machine.deadline(0).expect("a deadline");
        let after = (until - self.now).as_secs();
        self.now = until;
        self.machine.is_late();
        // There is nothing to read, and no room to write.
        let mut step = self.arrives(b"");
        while self.machine.close_reason().is_none() {
            match step {
                Step::Write => self.machine.blocked(until),
                Step::ProxyHeader | Step::Handshake => {
                    (self.machine.readable, self.machine.writable) = (false, false);
                }
                _ => break,
            }
            step = self.next();
        }
        (late, after)
    }

    fn ends_with(&self) -> String {
        self.machine
            .close_reason()
            .map_or("-".into(), ToString::to_string)
    }

    fn sends(&mut self) -> String {
        let mut all = Vec::new();
        while !self.machine.outbox.is_empty() {
            let next = self.machine.outbox.next().to_vec();
            self.machine.outbox.advance(next.len());
            all.extend(next);
        }
        self.machine.written(self.now);
        String::from_utf8_lossy(&all).into_owned()
    }
}

fn frame(body: &str) -> Vec<u8> {
    let header = FrameHeader {
        length: u32::try_from(body.len()).unwrap(),
        binary: false,
        more: false,
        keep_alive: false,
    };
    [&header.encode()[..], body.as_bytes()].concat()
}

#[test]
fn each_state_has_its_deadline() {
    let wait = |state: State, must_authenticate: bool, bytes: &[u8]| {
        let mut test = Test::new(state, must_authenticate, 1 << 20);
        assert_eq!(test.arrives(bytes), Step::Wait);
        let (late, after) = test.too_late();
        (late, after, test.ends_with())
    };
    let mut early = Test::new(State::ProxyHeader, true, 0);
    assert_eq!(early.next(), Step::Wait);
    assert_eq!(early.too_late(), (Late::Handshake, 10));
    assert!(early.ends_with().contains("proxy-header"));
    let idle = wait(State::Idle, false, b"");
    assert_eq!((idle.0, idle.1), (Late::Silence, 60));
    assert!(idle.2.starts_with("IDLE_TIMEOUT"));
    let midway = wait(State::Idle, false, &frame("x")[..5]);
    assert_eq!((midway.0, midway.1), (Late::Message, 5));
    assert!(midway.2.starts_with("READ_TIMEOUT"));
    let nameless = wait(State::Idle, true, b"");
    assert_eq!((nameless.0, nameless.1), (Late::Hello, 10));
    // What comes later of the two does not count.
    let nameless = wait(State::Idle, true, &frame("x")[..5]);
    assert_eq!((nameless.0, nameless.1), (Late::Message, 5));

    let mut stuck = Test::new(State::Idle, false, 1 << 20);
    stuck.machine.keep_alive(KeepAlive::Frame, &stuck.peer);
    assert_eq!(stuck.next(), Step::Write);
    stuck.machine.blocked(stuck.now);
    stuck.machine.readable = true;
    assert_eq!(stuck.next(), Step::Wait, "nothing is read meanwhile");
    assert_eq!(stuck.too_late(), (Late::Writing, 20));
    assert_eq!(stuck.next(), Step::Close);
}

#[test]
fn an_answer_that_waits_gives_no_more_time_for_a_message() {
    let mut test = Test::new(State::Idle, false, 1 << 20);
    assert_eq!(test.arrives(&frame("x")[..5]), Step::Wait);
    test.now += Duration::from_secs(3);
    test.machine.keep_alive(KeepAlive::Frame, &test.peer);
    assert_eq!(test.next(), Step::Write);
    test.machine.blocked(test.now);
    assert_eq!(test.next(), Step::Wait);
    test.now += Duration::from_secs(1);
    test.sends();
    assert_eq!(test.next(), Step::Wait);
    assert_eq!(test.too_late(), (Late::Message, 1));
}

#[test]
fn messages_are_taken_and_answers_leave_before_the_next_wait() {
    let mut test = Test::new(State::Idle, false, 1 << 20);
    let step = test.arrives(&[frame("one"), frame("two")].concat());
    let Step::Message(Message { body, binary, .. }) = step else {
        panic!("{step:?}");
    };
    assert!(!binary && test.machine.input().message(body) == b"one");
    test.machine.keep_alive(KeepAlive::Frame, &test.peer);
    assert!(matches!(test.next(), Step::Message(_)), "answers gather");
    assert_eq!(test.next(), Step::Write);
    test.sends();
    assert_eq!(test.next(), Step::Wait);
    assert!(!test.machine.goes_on());
}

#[test]
fn buffers_that_calls_keep_are_paid_for() {
    let mut test = Test::new(State::Idle, false, 1 << 20);
    let memory = Arc::clone(&test.machine.settings.memory);
    let step = test.arrives(&[frame("one"), frame("two"), frame("three")].concat());
    assert!(matches!(step, Step::Message(_)));
    let mut kept = Vec::new();
    for count in 1..3 {
        kept.push(Arc::clone(test.machine.input()));
        test.machine.split_input();
        assert_eq!(memory.used(), 64 * count, "of {count} calls");
        assert!(matches!(test.next(), Step::Message(_)));
    }
    drop(kept);
    assert_eq!(memory.used(), 0);
}

#[test]
fn what_ends_it_is_said_behind_all_answers() {
    let mut test = Test::new(State::Idle, false, 1 << 20);
    test.peer.leave_call();
    assert_eq!(test.arrives(&[0, 0, 0, 1, 0xff, 0, 0, 0]), Step::Wait);
    assert_eq!(test.machine.state(), State::Ending);
    assert_eq!(test.machine.deadline(1), None, "a call has its own");
    let body = ErrorBody::server(Code::Timeout, "late");
    let outcome = Outcome::Error(Some(Code::Timeout), body);
    test.peer
        .answer_late(|late, traffic| late.answer(&Encoding::Frames, None, outcome, None, traffic));
    assert_eq!(test.next(), Step::Write);
    let said = test.sends();
    let (late, closing) = (said.find("TIMEOUT"), said.find("INVALID_FRAME"));
    assert!(late.is_some() && late < closing, "{said}");
    assert_eq!(test.next(), Step::Close);

    let mut notified = Test::new(State::Idle, false, 1 << 20);
    notified.peer.request_close(CloseRequest::CLOSED);
    assert_eq!(notified.next(), Step::Write);
    assert!(notified.sends().contains("SHUTTING_DOWN"));
    assert_eq!(notified.next(), Step::Close);

    // Before the protocol begins nothing can be said.
    let mut early = Test::new(State::Handshake, true, 1 << 20);
    early.peer.request_close(CloseRequest::CLOSED);
    assert_eq!(early.next(), Step::Close);

    let mut gone = Test::new(State::Idle, false, 1 << 20);
    gone.machine.keep_alive(KeepAlive::Frame, &gone.peer);
    let reset = Err(io::ErrorKind::ConnectionReset.into());
    gone.machine.received(reset, false, &gone.peer, gone.now);
    assert_eq!(gone.next(), Step::Close);
}

#[test]
fn a_message_waits_for_memory_and_its_request_gets_an_error() {
    let mut test = Test::new(State::Idle, false, 1000);
    let large = frame(&format!("REQUEST:a.b:1.0.0:7\n{}", "x".repeat(5000)));
    assert_eq!(test.arrives(&large), Step::Wait);
    assert!(matches!(test.machine.state(), State::Memory { .. }));
    assert_eq!(test.too_late(), (Late::Retry, 0));
    while test.machine.close_reason().is_none() {
        assert_eq!(test.next(), Step::Wait);
        test.too_late();
    }
    assert_eq!(test.next(), Step::Write);
    let said = test.sends();
    assert!(said.contains("ERROR:a.b:1.0.0:7\n{\"code\":\"SERVICE_UNAVAILABLE\""));
    assert!(said.contains("SERVER_BUSY"), "{said}");
    assert_eq!(test.next(), Step::Close);
}

#[test]
fn others_are_served_after_so_many_reads() {
    let mut test = Test::new(State::Idle, false, 1 << 20);
    test.machine.readable = true;
    for _ in 0..MAX_READS {
        assert_eq!(test.next(), Step::Read);
        let read_buffer = test.machine.read_buffer();
        let count = read_buffer.len();
        read_buffer.copy_from_slice(&frame("").repeat(count / 8)[..count]);
        let received = Ok(Received::Bytes { count, more: true });
        test.machine.received(received, false, &test.peer, test.now);
        while matches!(test.next(), Step::Message(_)) {}
        if test.machine.quantum.reads == MAX_READS {
            break;
        }
    }
    assert_eq!(test.next(), Step::Wait);
    assert!(test.machine.goes_on());
    test.machine.begin_quantum();
    assert_eq!(test.next(), Step::Read);
}

#[test]
fn others_are_served_after_so_many_messages_and_long_calls() {
    let mut test = Test::new(State::Idle, false, 1 << 20);
    let settings = ServerSettings {
        buffers: Buffers {
            read: 64 * 1024,
            ..settings(1 << 20).buffers
        },
        ..ServerSettings::clone(&settings(1 << 20))
    };
    test.machine = Machine::new(&Arc::new(settings), State::Idle, test.now);
    test.machine.open(false, (true, true));
    let (mut messages, mut quantum, mut longest) = (0, 0, 0);
    // The buffer grows with what it is filled by.
    let all = frame("").repeat(30 * MAX_MESSAGES);
    let mut rest = &all[..];
    test.machine.readable = true;
    while messages < 30 * MAX_MESSAGES {
        match test.next() {
            Step::Read => {
                let count = test.read(&mut rest);
                assert!(count > 0);
            }
            Step::Message(_) => {
                (messages, quantum) = (messages + 1, quantum + 1);
                longest = longest.max(quantum);
            }
            Step::Wait => {
                assert!(test.machine.goes_on());
                test.machine.begin_quantum();
                quantum = 0;
            }
            step => panic!("{step:?}"),
        }
    }
    assert_eq!(longest, MAX_MESSAGES);
    let mut test = Test::new(State::Idle, false, 1 << 20);
    let step = test.arrives(&frame("x").repeat(2));
    assert!(matches!(step, Step::Message(_)));
    test.machine.end_quantum();
    assert_eq!(test.next(), Step::Wait);
    assert!(test.machine.goes_on());
    test.machine.begin_quantum();
    assert!(matches!(test.next(), Step::Message(_)));
}

#[test]
fn others_are_served_after_so_many_bytes() {
    let mut test = Test::new(State::Idle, false, 1 << 24);
    let large = Outcome::Binary(vec![7; 3 * MAX_WRITTEN / 2]);
    let (header, _) = Header::parse(b"REQUEST:a.b:1.0.0:7\n").unwrap();
    test.machine
        .answered(Encoding::Frames, Some(&header), large, None, &test.peer);
    assert_eq!(test.next(), Step::Write);
    let mut quanta = 1;
    loop {
        let count = test.machine.outbox.next().len().min(64 * 1024);
        if !test.machine.wrote(count) {
            test.machine.blocked(test.now);
            assert_eq!(test.next(), Step::Wait);
            assert!(test.machine.goes_on());
            test.machine.begin_quantum();
            assert_eq!(test.next(), Step::Write);
            quanta += 1;
        }
        if test.machine.outbox.is_empty() {
            break;
        }
    }
    assert_eq!(quanta, 2);
    test.machine.written(test.now);
    assert_eq!(test.next(), Step::Wait);
    assert!(!test.machine.goes_on());
}

#[test]
fn what_came_in_time_is_read_before_it_is_too_late() {
    let mut test = Test::new(State::Idle, false, 1 << 20);
    let all = frame("x");
    assert_eq!(test.arrives(&all[..5]), Step::Wait);
    // The whole process stood still for as long as one likes.
    test.now += Duration::from_secs(100);
    test.machine.is_late();
    assert!(matches!(test.arrives(&all[5..]), Step::Message(_)));
    assert_eq!(test.next(), Step::Wait);
    assert!(test.machine.close_reason().is_none());
    // A message that comes in drops has no more time than that.
    assert_eq!(test.arrives(&all[..5]), Step::Wait);
    test.now += Duration::from_secs(5);
    test.machine.is_late();
    assert_eq!(test.arrives(&all[5..6]), Step::Write);
    assert!(test.ends_with().starts_with("READ_TIMEOUT"));
}

#[test]
fn what_is_postponed_is_tried_again_and_nothing_is_read_meanwhile() {
    let mut test = Test::new(State::Idle, false, 1 << 20);
    let Step::Message(message) = test.arrives(&[frame("one"), frame("two")].concat()) else {
        panic!("no message");
    };
    test.machine.keep_alive(KeepAlive::Frame, &test.peer);
    let postponed = Postponed {
        until: test.now + Duration::from_secs(3),
        counted: Counted::ByPrincipal,
    };
    test.machine.postpone(message.clone(), postponed);
    assert_eq!(test.next(), Step::Write, "what was answered leaves");
    test.sends();
    test.machine.readable = true;
    assert_eq!(test.next(), Step::Wait);
    assert_eq!(test.machine.state(), State::Postponed);
    test.machine.retry();
    let Step::Message(again) = test.next() else {
        panic!("not tried again");
    };
    assert_eq!(
        (message.postponed, again.postponed),
        (None, Some(postponed))
    );
    assert_eq!(again.body, message.body);

    // Its handler has to say that it is too late.
    test.machine.postpone(again, postponed);
    assert_eq!(test.next(), Step::Wait);
    let (until, late) = test.machine.deadline(0).unwrap();
    assert_eq!((until, late), (postponed.until, Late::Postponed));
    test.now = until;
    test.machine.is_late();
    let Step::Message(again) = test.next() else {
        panic!("not tried when it is too late");
    };
    assert!(matches!(test.next(), Step::Message(_)));

    test.machine.postpone(again, postponed);
    test.peer.request_close(CloseRequest::CLOSED);
    assert_eq!(test.next(), Step::Write, "it is not begun any more");
    assert!(test.sends().contains("SHUTTING_DOWN"));
    assert_eq!(test.next(), Step::Close);
}

/// A masked frame of WebSocket.
fn websocket(first: u8, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(payload.len()).unwrap();
    let head = match length {
        ..126 => vec![first, 0x80 | length as u8],
        _ => [&[first, 0xfe][..], &length.to_be_bytes()].concat(),
    };
    [&head, &[0; 4][..], payload].concat()
}

/// A machine whose peer has asked for a WebSocket, and what came with that.
fn upgraded(memory: usize, behind: &[u8]) -> (Test, Step) {
    let head = b"GET /ws HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
                 Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
    let mut test = Test::new(State::Idle, false, memory);
    let Step::Head(head) = test.arrives(&[head, behind].concat()) else {
        panic!("no head");
    };
    let Ok(Route::WebSocket(upgrade)) = &head.asked else {
        panic!("{:?}", head.asked);
    };
    let exchange = Exchange::default();
    test.machine.upgrade(upgrade, exchange, false, &test.peer);
    let step = test.next();
    (test, step)
}

#[test]
fn a_websocket_begins_behind_its_handshake() {
    let behind = [
        websocket(0x81, b"one"),
        websocket(0x89, b"two"),
        websocket(0x88, b""),
    ];
    let (mut test, step) = upgraded(1 << 20, &behind.concat());
    let Step::Message(message) = step else {
        panic!("{step:?}");
    };
    assert_eq!(message.encoding, Encoding::WebSocket);
    assert_eq!(test.machine.input().message(message.body.clone()), b"one");
    // A call that is left keeps its message, and what is behind goes on.
    let kept = Arc::clone(test.machine.input());
    test.machine.split_input();
    test.peer.leave_call();
    let Step::KeepAlive(ping) = test.next() else {
        panic!("no ping");
    };
    test.machine.keep_alive(ping, &test.peer);
    assert_eq!(test.next(), Step::Write);
    let sent = test.sends();
    assert!(
        sent.starts_with("HTTP/1.1 101 ") && sent.ends_with("two"),
        "{sent}"
    );
    // The close frame is answered behind the call.
    assert_eq!(test.next(), Step::Wait);
    let (header, _) = Header::parse(b"REQUEST:a.b:1.0.0:7\n").unwrap();
    let outcome = Outcome::Json("\"late\"".into());
    test.peer.answer_late(|late, traffic| {
        late.answer(&message.encoding, Some(&header), outcome, None, traffic);
    });
    assert_eq!(kept.message(message.body), b"one");
    assert_eq!(test.next(), Step::Write);
    assert!(
        test.sends()
            .starts_with("\u{fffd}\u{1b}RESPONSE:a.b:1.0.0:7\n\"late\"\u{fffd}")
    );
    assert_eq!(test.next(), Step::Close);
}

#[test]
fn a_message_of_a_websocket_waits_for_memory() {
    let (mut test, _) = upgraded(1000, b"");
    test.sends();
    let large = format!("REQUEST:a.b:1.0.0:7\n{}", "x".repeat(5000));
    assert_eq!(test.arrives(&websocket(0x81, large.as_bytes())), Step::Wait);
    assert!(matches!(test.machine.state(), State::Memory { .. }));
    assert!(test.machine.settings.memory.used() <= 1000);
    while test.machine.close_reason().is_none() {
        assert_eq!(test.next(), Step::Wait);
        test.too_late();
    }
    assert_eq!(test.next(), Step::Write);
    let sent = test.sends();
    assert!(sent.contains("ERROR:a.b:1.0.0:7\n"), "{sent}");
    assert!(
        sent.contains("SERVICE_UNAVAILABLE") && sent.contains("SERVER_BUSY"),
        "{sent}"
    );
}
