//! One run: a machine, and what its peers, the operator and the clock do.

use std::{
    collections::{HashMap, HashSet},
    net::{Ipv4Addr, SocketAddr},
    sync::{Arc, atomic::Ordering::SeqCst},
    time::Duration,
};

use shuttle::{FailurePersistence, Runner, scheduler::RandomScheduler, thread};

use crate::{
    access::{Access, ListenerPolicy},
    budget::Budget,
    client::{Client, Received, WebSocket},
    config::{Auth, Bytes, Config, Millis, Principals, Waiting, access::Listener},
    guests::Guests,
    http_peer,
    metrics::Metrics,
    server::{
        admission::{Admission, Shares},
        common::Common,
        connection::Connection,
        drain::DrainFlags,
        peer::CloseRequest,
        poller::{Events, Poller, Queue},
        settings::{Buffers, ListenerSettings, ServerSettings},
        workers::{RESERVE, Worker, Workers},
    },
    system::{self, AtomicUsize, Channel, Linger, Ordering, Pool, Wire, World},
    wire::{
        Reassembly,
        frame::{FrameHeader, KEEPALIVE_FRAME},
    },
};

/// Threads that poll.
const POLLERS: usize = 2;
/// Connections at the same time.
const SLOTS: usize = 3;
const READ_TIMEOUT: Duration = Duration::from_secs(5);
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);
/// As the poller has it.
pub const LONGEST_WAIT: Duration = Duration::from_secs(1);
/// Steps of the scheduler until it is a circle.
const MAX_STEPS: usize = 400_000;
/// Looks of one who waits for a rest.
const MAX_LOOKS: usize = 40_000;
pub const MAX_MESSAGE: usize = 2000;

const HANDSHAKE: &[u8] = b"GET /ws HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n\
    Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n\
    Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";

/// Runs a seed, or panics.
pub fn run(seed: u64) {
    runner(seed).run(move || Machine::new(seed).run());
}

/// Runs threads in an order that follows from a seed.
pub fn runner(seed: u64) -> Runner<RandomScheduler> {
    let mut config = shuttle::Config::new();
    config.max_steps = shuttle::MaxSteps::FailAfter(MAX_STEPS);
    config.failure_persistence = FailurePersistence::None;
    config.stack_size = 256 * 1024;
    config.silence_warnings = true;
    let scheduler = RandomScheduler::new_from_seed(seed, 1);
    Runner::new(scheduler, config)
}

/// Numbers that follow from a seed (SplitMix64; Steele, Lea, Flood 2014).
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// One of a range.
    pub fn of(&mut self, range: std::ops::Range<usize>) -> usize {
        range.start + (self.next() % (range.end - range.start) as u64) as usize
    }

    /// So often in a hundred times.
    pub fn happens(&mut self, percent: u64) -> bool {
        self.next() % 100 < percent
    }
}

struct Machine {
    world: Arc<World>,
    random: Random,
    guests: Arc<Guests>,
    shared: Arc<Workers>,
    admission: Arc<Admission>,
    listener: Arc<ListenerSettings>,
    clients: Vec<Client>,
    next: u64,
    next_request: u64,
    /// Half of the requests queue.
    many_queue: bool,
    draining: bool,
}

impl Machine {
    fn new(seed: u64) -> Self {
        let world = World::begin();
        let mut random = Random(seed);
        let policy = Arc::new(ListenerPolicy {
            auth: Auth::None,
            rights: None,
            allow_unsecure: false,
        });
        let many_queue = random.happens(25);
        let config = Config {
            max_threads: random.of(if many_queue { 2..6 } else { 4..13 }),
            waiting: if random.happens(33) {
                Waiting::Threads
            } else {
                Waiting::Poller
            },
            max_message_size: Bytes(MAX_MESSAGE),
            read_timeout: Millis(READ_TIMEOUT),
            handshake_timeout: Millis::secs(10),
            write_timeout: Millis(WRITE_TIMEOUT),
            idle_timeout: Millis(IDLE_TIMEOUT),
            keep_alive_interval: Millis::secs(20),
            connection_max_age: Millis::secs(if random.happens(20) {
                random.of(10..100) as u64
            } else {
                0
            }),
            ..Config::default()
        };
        let settings = ServerSettings {
            config: Arc::new(config),
            listeners: Vec::new(),
            max_connections: SLOTS,
            reserved: 0,
            max_ending: 1,
            buffers: Buffers {
                read: 1 << random.of(4..9),
                write: 1 << random.of(7..11),
                in_flight: random.of(1..5),
            },
            thread_stack: 0,
            memory: Budget::new(random.of(1500..6000)),
        };
        let guests = Arc::<Guests>::default();
        guests.slots.store(random.of(1..3), SeqCst);
        let access = Access::new(Principals::new(), "/nowhere/tokens.json".into(), 1).unwrap();
        let shared = Arc::new(Workers {
            poller: Poller::new(SLOTS, POLLERS).unwrap(),
            threads: Pool::new(
                POLLERS + RESERVE,
                // Threads are left where the half of them that may wait does.
                settings.config.max_threads + if many_queue { 8 } else { 0 },
                0,
            ),
            waiting: AtomicUsize::new(0),
            due: Queue::default(),
            handle: Arc::<Guests>::clone(&guests),
            common: Arc::new(Common {
                settings: Arc::new(settings),
                metrics: Arc::<Metrics>::default(),
                access,
                drain: Arc::new(DrainFlags::new().unwrap()),
                linger: Linger,
                handshakes: Arc::default(),
                running: Arc::default(),
            }),
        });
        for _ in 0..POLLERS {
            assert!(Worker::start(&shared));
        }
        assert!(Worker::start_reserve(&shared));
        Self {
            world,
            random,
            guests,
            shared,
            admission: Admission::new(Shares {
                connections: SLOTS,
                unauthenticated: SLOTS,
                per_address: 0,
            }),
            listener: Arc::new(ListenerSettings {
                config: Listener::default(),
                tls: None,
                policy,
            }),
            clients: Vec::new(),
            next: 1,
            next_request: 1,
            many_queue,
            draining: false,
        }
    }

    fn run(mut self) {
        for _ in 0..self.random.of(5..40) {
            self.step();
            for _ in 0..self.random.of(0..30) {
                thread::yield_now();
            }
            if self.random.happens(30) {
                self.rest();
            }
        }
        self.end();
    }

    fn step(&mut self) {
        let open: Vec<_> = (0..self.clients.len())
            .filter(|at| !self.clients[*at].over && !self.clients[*at].gone)
            .collect();
        if open.is_empty() || self.random.happens(10) {
            if !self.draining {
                self.connect();
            }
            return;
        }
        let at = open[self.random.of(0..open.len())];
        match self.random.of(0..100) {
            0..35 => self.ask(at),
            35..60 => self.send(at),
            60..80 => {
                let most = self.random.of(1..400);
                self.take(at, most);
            }
            80..88 => self.pass(),
            88..91 => {
                self.send_all(at);
                let client = &mut self.clients[at];
                client.shut = true;
                client.wire.shut();
            }
            91..93 => {
                let client = &mut self.clients[at];
                client.gone = true;
                client.wire.reset();
            }
            93..95 => {
                let number = self.clients[at].number;
                let all = self.admission.peers().collect::<Vec<_>>();
                if let Some(peer) = all.iter().find(|peer| peer.number() == number) {
                    peer.request_close(CloseRequest::CLOSED);
                    self.shared.poller.deliver(peer.slot(), Events::CLOSE);
                }
            }
            95..97 => {
                let client = &mut self.clients[at];
                client.broken = true;
                let end = client.sent + client.unsent.len();
                match &mut client.received {
                    Received::Frames(_) => client.unsent.extend([0, 0, 0, 1, 0xff, 0, 0, 0]),
                    Received::Http { begins, .. } => {
                        begins.push((end, "what is broken".into()));
                        client.unsent.extend(http_peer::BROKEN);
                    }
                }
                self.send_all(at);
            }
            97 if self.random.happens(30) => self.drain(),
            98 => {
                let given = self.random.of(0..4);
                self.shared.threads.give(given);
            }
            _ => {
                let calls = self.shared.common.running.rows();
                if let Some(call) = calls.first() {
                    self.shared.common.running.kill(call.id);
                }
            }
        }
    }

    /// As the acceptor does it.
    fn connect(&mut self) {
        let wire = Wire::new(self.random.of(40..2000));
        let number = self.next;
        self.next += 1;
        let (shared, listener) = (Arc::clone(&self.shared), Arc::clone(&self.listener));
        let channel = Channel::over(&wire);
        let from = SocketAddr::from((Ipv4Addr::LOCALHOST, 2));
        let received = if self.random.happens(60) {
            Received::Frames(Reassembly::new(1 << 20, 64))
        } else {
            Received::Http {
                unread: Vec::new(),
                begins: Vec::new(),
                statuses: HashMap::new(),
            }
        };
        if let Ok(permit) = self.admission.admit(None, |_| false) {
            let common = Arc::clone(&shared.common);
            let new = Connection::over(number, channel, from, listener, common, permit);
            shared.poller.begin(Box::new(new)).unwrap();
            let is_frames = matches!(received, Received::Frames(_));
            let is_websocket = is_frames && self.random.happens(50);
            let websocket = is_websocket.then(WebSocket::default);
            let handshake = websocket.as_ref().map_or(&[][..], |_| HANDSHAKE);
            self.clients.push(Client {
                wire,
                number,
                unsent: handshake.to_vec(),
                websocket,
                asked: HashMap::new(),
                order: Vec::new(),
                ends: Vec::new(),
                sent: 0,
                received,
                answered: HashSet::new(),
                quick_answers: Vec::new(),
                keep_alives: (0, 0),
                closing: None,
                over: false,
                shut: false,
                gone: false,
                broken: false,
            });
        }
    }

    /// A request, or a keep-alive, to be sent.
    fn ask(&mut self, at: usize) {
        let random = &mut self.random;
        let client = &mut self.clients[at];
        if client.shut || client.broken {
            return;
        }
        let speaks_http = matches!(client.received, Received::Http { .. });
        if random.happens(10) && !speaks_http {
            let frame = match client.websocket {
                None => KEEPALIVE_FRAME.to_vec(),
                Some(_) => WebSocket::frame(0x89, b"ping"),
            };
            client.unsent.extend(frame);
            return;
        }
        for _ in 0..random.of(1..4) {
            let id = format!("r{}", self.next_request);
            self.next_request += 1;
            // Where many queue, calls are postponed.
            let kind = match random.of(0..10) {
                5..9 if self.many_queue => 8,
                kind => kind,
            };
            let (payload, quick) = match kind {
                0..4 => (format!("quick {}", random.of(0..300)), true),
                4 | 5 => (format!("stores {}", random.of(0..300)), false),
                6 => (format!("slow {}", random.of(1..3000)), false),
                7 => (format!("waits {}", random.of(0..3000)), false),
                8 => (format!("queues {}", random.of(0..3000)), false),
                _ => ("panics".into(), false),
            };
            // Blanks, so that some need memory.
            let blanks = if random.happens(20) {
                random.of(0..MAX_MESSAGE - 200)
            } else {
                0
            };
            let payload = payload + &" ".repeat(blanks);
            if let Received::Http {
                begins, statuses, ..
            } = &mut client.received
            {
                let sent = http_peer::request(random, &id, &payload);
                begins.push((client.sent + client.unsent.len(), id.clone()));
                statuses.extend(sent.status.map(|status| (id.clone(), status)));
                client.unsent.extend(sent.bytes);
                // All are answered in order, as the quick ones of frames.
                let end = client.sent + client.unsent.len();
                client.ends.push((end, id, true));
                client.broken = sent.is_last;
                if sent.is_last {
                    return;
                }
                continue;
            }
            let body = format!("REQUEST:a.b:1.0.0:{id}\n{payload}");
            let pieces = random.of(1..3);
            let size = body.len().div_ceil(pieces);
            let mut chunks = body.as_bytes().chunks(size).peekable();
            let mut opcode = 1;
            while let Some(chunk) = chunks.next() {
                if client.websocket.is_some() {
                    let first = opcode | if chunks.peek().is_none() { 0x80 } else { 0 };
                    client.unsent.extend(WebSocket::frame(first, chunk));
                    opcode = 0;
                    continue;
                }
                let mut header = FrameHeader {
                    length: chunk.len() as u32,
                    binary: false,
                    more: false,
                    keep_alive: false,
                };
                header.more = chunks.peek().is_some();
                client.unsent.extend(header.encode());
                client.unsent.extend(chunk);
            }
            let end = client.sent + client.unsent.len();
            client.ends.push((end, id, quick));
        }
    }

    /// Some of what there is to send.
    fn send(&mut self, at: usize) {
        let client = &mut self.clients[at];
        let most = client.unsent.len().min(self.random.of(1..700));
        Self::deliver(client, most);
    }

    fn send_all(&mut self, at: usize) {
        let client = &mut self.clients[at];
        let all = client.unsent.len();
        Self::deliver(client, all);
    }

    fn deliver(client: &mut Client, count: usize) {
        if client.shut || client.gone || count == 0 {
            return;
        }
        let bytes: Vec<u8> = client.unsent.drain(..count).collect();
        client.sent += bytes.len();
        while let Some((end, _, _)) = client.ends.first()
            && *end <= client.sent
        {
            let (_, id, quick) = client.ends.remove(0);
            client.asked.insert(id.clone(), quick);
            client.order.push(id);
        }
        if bytes.windows(8).any(|eight| eight == KEEPALIVE_FRAME) {
            client.keep_alives.0 += 1;
        }
        client.wire.send(&bytes);
    }

    /// The peer takes some of what there is.
    fn take(&mut self, at: usize, most: usize) {
        let client = &mut self.clients[at];
        let bytes = client.wire.take(most);
        let bytes = match &mut client.websocket {
            None => bytes,
            Some(websocket) => websocket.translate(&bytes),
        };
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            match &mut client.received {
                Received::Frames(received) => {
                    let spare = received.spare();
                    let count = spare.len().min(rest.len());
                    spare[..count].copy_from_slice(&rest[..count]);
                    received.advance(count);
                    rest = &rest[count..];
                    client.read();
                }
                Received::Http { unread, .. } => {
                    unread.extend(std::mem::take(&mut rest));
                    client.read_http();
                }
            }
        }
        if client.wire.is_over() {
            client.over = true;
        }
    }

    fn pass(&mut self) {
        if self.random.happens(70) {
            self.guests.flush(self.random.of(1..4));
        }
        let millis = match self.random.of(0..4) {
            // Less than a worker waits for events by itself.
            _ if self.many_queue && self.random.happens(70) => self.random.of(1..900),
            0 => 1,
            1 => self.random.of(1..100),
            2 => self.random.of(100..5000),
            _ => self.random.of(5000..70_000),
        };
        self.world.pass(Duration::from_millis(millis as u64));
    }

    fn drain(&mut self) {
        self.draining = true;
        self.shared.common.drain.begin();
        for peer in self.admission.peers() {
            self.shared.poller.deliver(peer.slot(), Events::CLOSE);
        }
    }

    /// Until nobody has anything to do; then what was promised holds.
    fn rest(&mut self) {
        self.wait_for_rest();
        for at in 0..self.clients.len() {
            let number = self.clients[at].number;
            let peers: Vec<_> = self.admission.peers().collect();
            let Some(peer) = peers.iter().find(|peer| peer.number() == number) else {
                continue;
            };
            let row = peer.row();
            let client = &self.clients[at];
            // What waits for the peer, for memory, or for calls, is not read.
            if ["idle", "handshake"].contains(&row.state) {
                assert!(
                    !client.wire.is_unread(),
                    "there is something to read, and nobody does: {row:?}"
                );
            }
            // A peer that takes nothing is given up, after the calls in flight.
            let closes = self.draining
                || client.broken
                || peer.close_request().is_some()
                || peer.is_closing();
            // It is with a call, writes, or has a call that is postponed.
            let calls = row.in_flight > u64::from(peer.calls_left());
            let reads = !calls && ["idle", "reading", "calling"].contains(&row.state);
            if reads && !closes && !client.wire.is_unread() {
                client.check_handled(&self.guests);
            }
            if calls && !closes && !client.wire.is_full() {
                client.check_postponed(&self.guests);
            }
        }
        let is_late = || {
            let late = self.shared.poller.overdue_for(system::now());
            late.is_some_and(|late| late > LONGEST_WAIT)
        };
        // Between the look at the clock and the wait, the clock has moved: so
        // much later a worker looks again.
        if is_late() {
            self.world.pass(LONGEST_WAIT);
            self.wait_for_rest();
        }
        assert!(!is_late(), "a deadline has passed, and nobody looks");
        assert!(
            !self.shared.poller.has_queued(),
            "a connection has something to do, and nobody serves it"
        );
        assert!(
            self.shared.due.is_empty(),
            "an answer may leave, and nobody sends it"
        );
        assert!(
            !self.shared.may_wait() || !self.shared.poller.is_kept_waiting(),
            "a call may begin, and nobody tries"
        );
    }

    /// Whoever is idle has answered all.
    fn check_idle(&mut self) {
        for peer in self.admission.peers().collect::<Vec<_>>() {
            let row = peer.row();
            let number = peer.number();
            let at = self.clients.iter().position(|one| one.number == number);
            if let Some(at) = at.filter(|_| row.state == "idle" && row.in_flight == 0) {
                self.take(at, usize::MAX);
                self.clients[at].check(&self.guests, self.cut_off());
            }
        }
    }

    /// Whether somebody was cut off who took no answers.
    fn cut_off(&self) -> bool {
        self.shared.common.metrics.write_timeouts.get() > 0
    }

    fn wait_for_rest(&self) {
        for look in 0.. {
            if self.world.is_at_rest() {
                break;
            }
            assert!(look < MAX_LOOKS, "it does not come to rest");
            thread::yield_now();
        }
    }

    /// All peers take what there is and send what they have; the clock moves on.
    fn end(mut self) {
        // One guest after the other, at worst.
        for _ in 0..80 {
            for at in 0..self.clients.len() {
                self.send_all(at);
                self.take(at, usize::MAX);
            }
            self.guests.flush(usize::MAX);
            self.rest();
            let cut_off = self.cut_off();
            let all =
                |client: &Client| client.over || client.missing(&self.guests, cut_off).is_empty();
            if self.clients.iter().all(all) {
                break;
            }
            self.world.pass(Duration::from_millis(3000));
            self.rest();
            self.check_idle();
        }
        if std::env::var("MB_SEED").is_ok() {
            for peer in self.admission.peers() {
                println!("{:?}", peer.row());
            }
            println!(
                "{:?} {:?}",
                self.shared.common.running.rows(),
                self.shared.common.settings
            );
        }
        for client in &self.clients {
            client.check(&self.guests, self.cut_off());
        }
        self.drain();
        for _ in 0..40 {
            for at in 0..self.clients.len() {
                self.take(at, usize::MAX);
            }
            self.guests.flush(usize::MAX);
            self.world.pass(Duration::from_millis(500));
            self.rest();
        }
        for at in 0..self.clients.len() {
            self.take(at, usize::MAX);
        }
        for client in &self.clients {
            client.check(&self.guests, self.cut_off());
            assert!(
                client.over || client.gone,
                "connection {} was not ended",
                client.number
            );
        }
        assert!(
            self.admission.wait_until_empty(std::time::Instant::now()),
            "a permit is not back: {:?}",
            self.admission
                .peers()
                .map(|peer| peer.row())
                .collect::<Vec<_>>()
        );
        assert_eq!(
            self.shared.common.settings.memory.used(),
            0,
            "memory is not back"
        );
        assert!(
            self.shared.common.running.rows().is_empty(),
            "a call is listed"
        );
        assert_eq!(
            self.shared.waiting.load(Ordering::SeqCst),
            0,
            "a call waits"
        );
        let threads = POLLERS + RESERVE;
        assert_eq!(self.world.threads(), threads, "a thread is not back");
        assert!(
            !self.shared.poller.all_are_absent(),
            "nobody is in a call, and all count as absent"
        );
        self.shared.poller.shut_down();
        for look in 0.. {
            if self.world.threads() == 0 {
                break;
            }
            assert!(look < MAX_LOOKS, "a thread does not end");
            thread::yield_now();
        }
    }
}
