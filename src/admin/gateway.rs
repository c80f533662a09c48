//! The subset of HTTP that the endpoint needs: each connection is for one
//! request.
//!
//! Each client gets a thread, within a limit, and a time to send its request.
//! Beyond the limit, the longest-connected client without a request is
//! displaced. The thread that has read a request also writes the answer, within
//! a time, so a slow reader delays no other client.

use std::{
    collections::BTreeMap,
    io::{self, BufWriter, Read as _, Write},
    net::{IpAddr, TcpListener},
    os::unix::net::UnixListener,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Condvar, Mutex},
    thread,
    time::{Duration, Instant},
};

use socket2::Socket;
use tiny_http::{HTTPVersion, Header, StatusCode};

use super::{Admin, LINES, Page, refuse, routes, token};
use crate::{
    budget::{Budget, Reservation},
    locks::lock,
    log::{AUDIT, Limiter},
};

/// Connections at the same time.
const MAX_CLIENTS: usize = 64;
/// Largest request line and header lines together, in bytes.
const MAX_HEAD: usize = 16 * 1024;
/// Most header lines.
const MAX_HEADERS: usize = 64;
/// Largest body of a request, in bytes.
pub(super) const MAX_BODY: usize = 1024 * 1024;
/// Time for a whole request to arrive, and for each part of a component.
const READ_WITHIN: Duration = Duration::from_secs(10);
/// Time for a whole component to arrive.
const UPLOAD_WITHIN: Duration = Duration::from_secs(300);
/// Pages that are built at the same time.
const MAX_BUILDING: usize = 4;
/// Time for the building of a page to begin.
const BUILD_WITHIN: Duration = Duration::from_secs(10);
/// Changes at the same time; they wait for each other anyway.
const MAX_CHANGES: usize = 4;
/// Event streams at the same time.
const MAX_EVENT_STREAMS: usize = 8;
/// Largest answer, in bytes.
pub const MAX_ANSWER: usize = 32 * 1024 * 1024;
/// Answers up to this size in bytes are sent whatever memory is taken.
const SMALL_ANSWER: usize = 64 * 1024;
/// Time for a client to take a whole answer; of an event stream, each part of
/// it.
const TAKE_WITHIN: Duration = Duration::from_secs(10);
/// Time for a client to take a whole backup. As long as it takes it, a file
/// keeps what is overwritten meanwhile.
const EXPORT_WITHIN: Duration = Duration::from_secs(3600);
/// Time for a refused client to read why, while what it still sends is dropped.
const LINGER: Duration = Duration::from_secs(2);
/// What a client waits for that sends its head alone at first.
const CONTINUE: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";
/// Pause after an error of the accept call.
const PAUSE: Duration = Duration::from_millis(100);

/// The page loads only from this server.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// A listener of the endpoint.
pub enum AdminListener {
    /// TCP. Peers of other machines must show the token to read, too.
    Tcp(TcpListener),
    /// A Unix socket: users who may open its file may read.
    Unix(UnixListener),
}

/// The gateway, as its threads share it.
pub(super) struct Gateway {
    admin: Admin,
    clients: Mutex<Clients>,
    /// A client has left.
    left: Condvar,
    /// Counting semaphores of what is done at the same time.
    building: Arc<Budget>,
    changes: Arc<Budget>,
    event_streams: Arc<Budget>,
    exports: Arc<Budget>,
    /// Bytes of received bodies, and of answers that have yet to be taken.
    held: Arc<Budget>,
}

#[derive(Default)]
struct Clients {
    next: u64,
    /// By number, so the longest-connected first.
    open: BTreeMap<u64, Client>,
}

struct Client {
    socket: Arc<Socket>,
    /// Its request has not arrived, or was invalid.
    reading: bool,
    /// Its answer is an event stream.
    endless: bool,
}

/// A client's slot; released when dropped.
struct ClientSlot<'a> {
    gateway: &'a Gateway,
    number: u64,
}

impl Drop for ClientSlot<'_> {
    fn drop(&mut self) {
        lock(&self.gateway.clients).open.remove(&self.number);
        self.gateway.left.notify_all();
    }
}

/// Why a request is refused: status and message.
type HttpError = (u16, &'static str);

/// A whole request.
pub(super) struct Request {
    pub(super) method: String,
    /// Path and query.
    pub(super) url: String,
    /// HTTP/1.0, which needs no Host. Browsers do not speak it.
    pub(super) is_old: bool,
    /// It is from this machine, or has the token.
    pub(super) may_look: bool,
    /// Address and port, or user and process, of the client.
    pub(super) peer: String,
    headers: Vec<(String, Vec<u8>)>,
    /// Of an upload, what came with the head.
    pub(super) body: Vec<u8>,
    /// Bytes of an upload that have yet to come.
    rest: usize,
    /// The client waits for `100 Continue` before it sends them.
    continues: bool,
    /// Keeps the memory for the body, unless that is small.
    _held: Option<Reservation>,
}

impl Request {
    /// Returns the first header of this name, in any case; none where it is not
    /// UTF-8.
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        let (_, value) = self
            .headers
            .iter()
            .find(|(known, _)| known.eq_ignore_ascii_case(name))?;
        std::str::from_utf8(value).ok()
    }

    pub(super) fn path(&self) -> &str {
        self.url.split('?').next().unwrap_or_default()
    }

    /// Whether it is a probe, which any client may send.
    pub(super) fn is_probe(&self) -> bool {
        self.looks() && matches!(self.path(), "/healthz" | "/readyz")
    }

    /// Whether its body is a component, which is read as it arrives.
    fn is_upload(&self) -> bool {
        self.method == "PUT"
    }

    /// Whether it only reads.
    fn looks(&self) -> bool {
        matches!(&*self.method, "GET" | "HEAD")
    }
}

/// The body of an upload, read as it arrives; of other requests nothing.
struct Arriving<'a> {
    socket: &'a Socket,
    begun: &'a [u8],
    rest: usize,
    continues: bool,
    deadline: Instant,
}

impl<'a> Arriving<'a> {
    fn of(request: &'a Request, socket: &'a Socket) -> Self {
        Self {
            socket,
            begun: if request.is_upload() {
                &request.body
            } else {
                &[]
            },
            rest: request.rest,
            continues: request.continues,
            deadline: Instant::now() + UPLOAD_WITHIN,
        }
    }
}

impl io::Read for Arriving<'_> {
    fn read(&mut self, part: &mut [u8]) -> io::Result<usize> {
        if !self.begun.is_empty() {
            return self.begun.read(part);
        }
        let wanted = part.len().min(self.rest);
        if wanted == 0 {
            return Ok(0);
        }
        // Who is refused before never sends it.
        if std::mem::take(&mut self.continues) {
            write_before(self.socket, CONTINUE, Instant::now() + READ_WITHIN)?;
        }
        let patience = remaining(self.deadline)?.min(READ_WITHIN);
        self.socket.set_read_timeout(Some(patience))?;
        let mut socket = self.socket;
        let count = match socket.read(&mut part[..wanted]) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Err(error) if is_late(&error) => {
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    "nothing came for 10 s, or not all within 5 min",
                ));
            }
            read => read?,
        };
        self.rest -= count;
        Ok(count)
    }
}

/// Writes to a peer, each write within its time.
struct InTime<'a>(&'a Socket, Option<Instant>);

impl Write for InTime<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let soon = Instant::now() + TAKE_WITHIN;
        let deadline = self.1.map_or(soon, |end| end.min(soon));
        write_before(self.0, bytes, deadline)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Gateway {
    pub(super) fn new(admin: Admin) -> Arc<Self> {
        Arc::new(Self {
            held: Budget::new(admin.memory),
            admin,
            clients: Mutex::default(),
            left: Condvar::new(),
            building: Budget::new(MAX_BUILDING),
            changes: Budget::new(MAX_CHANGES),
            event_streams: Budget::new(MAX_EVENT_STREAMS),
            exports: Budget::new(1),
        })
    }

    /// Starts to accept clients, on a thread of its own.
    pub(super) fn open(self: &Arc<Self>, listener: AdminListener) -> io::Result<()> {
        let listener: Socket = match listener {
            AdminListener::Tcp(listener) => listener.into(),
            AdminListener::Unix(listener) => listener.into(),
        };
        // One that was inherited may be otherwise.
        listener.set_nonblocking(false)?;
        let gateway = Arc::clone(self);
        let accept_all = move || {
            loop {
                match listener.accept() {
                    Ok((socket, _)) => gateway.accept(socket),
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => {
                        if LINES.allows("admin endpoint, accepting") {
                            tracing::warn!("admin endpoint can't accept, trying again: {error}");
                        }
                        thread::sleep(PAUSE);
                    }
                }
            }
        };
        thread::Builder::new()
            .name("mb-admin-listen".into())
            .spawn(accept_all)
            .map(drop)
    }

    /// Waits until the clients have their answers, at most this long: a client
    /// that drains the server must get the answer to that.
    pub(super) fn finish(&self, within: Duration) {
        let answering = |clients: &mut Clients| {
            clients
                .open
                .values()
                .any(|client| !client.reading && !client.endless)
        };
        drop(
            self.left
                .wait_timeout_while(lock(&self.clients), within, answering),
        );
    }

    fn accept(self: &Arc<Self>, socket: Socket) {
        let socket = Arc::new(socket);
        let Some(number) = self.take_slot(&socket) else {
            // A few bytes always find room in a socket that is new.
            let _ = socket.set_nonblocking(true);
            let (head, body) = refusal((503, "too many requests at the same time; try again"));
            let _ = (&*socket).write_all(&[head, body.into_bytes()].concat());
            return;
        };
        let gateway = Arc::clone(self);
        let serve = move || {
            let slot = ClientSlot {
                gateway: &gateway,
                number,
            };
            gateway.serve(&socket, &slot);
        };
        if let Err(error) = thread::Builder::new()
            .name("mb-admin-client".into())
            .spawn(serve)
        {
            lock(&self.clients).open.remove(&number);
            if LINES.allows("admin endpoint, threads") {
                tracing::warn!("admin endpoint: {error}");
            }
        }
    }

    /// Takes a slot, if need be that of the longest-connected client without a
    /// request.
    fn take_slot(&self, socket: &Arc<Socket>) -> Option<u64> {
        let mut clients = lock(&self.clients);
        if clients.open.len() >= MAX_CLIENTS {
            let slow = clients
                .open
                .iter()
                .find(|(_, client)| client.reading)
                .map(|(number, _)| *number)?;
            let slow = clients.open.remove(&slow)?;
            // Its thread ends by that.
            let _ = slow.socket.shutdown(std::net::Shutdown::Both);
        }
        let number = clients.next;
        clients.next += 1;
        clients.open.insert(
            number,
            Client {
                socket: Arc::clone(socket),
                reading: true,
                endless: false,
            },
        );
        Some(number)
    }

    fn serve(&self, socket: &Socket, slot: &ClientSlot<'_>) {
        let request = self.read(socket, Instant::now() + READ_WITHIN);
        // One that is refused can be displaced like one that has sent no
        // request.
        if matches!(request, Ok(Some(_)))
            && let Some(client) = lock(&self.clients).open.get_mut(&slot.number)
        {
            client.reading = false;
        }
        let refused = match request {
            Ok(None) => return,
            Ok(Some(request)) => match self.answer(socket, slot, &request) {
                Ok(()) => return,
                Err(refused) => refused,
            },
            Err(refused) => refused,
        };
        let (head, body) = refusal(refused);
        let deadline = Instant::now() + LINGER;
        let sent = write_before(socket, &head, deadline)
            .and_then(|()| write_before(socket, body.as_bytes(), deadline))
            .and_then(|()| socket.shutdown(std::net::Shutdown::Write));
        if sent.is_ok() {
            drop_what_comes(socket, Instant::now() + LINGER);
        }
    }

    /// Answers a request, or returns why not.
    fn answer(
        &self,
        socket: &Socket,
        slot: &ClientSlot<'_>,
        request: &Request,
    ) -> Result<(), HttpError> {
        let is_event_stream = request.looks() && request.url.trim_end_matches('?') == "/events";
        if is_event_stream && self.admin.is_addressed(request) {
            return self.stream(socket, slot, request);
        }
        let is_export = request.method == "POST" && request.path() == "/store/export";
        let may_export = is_export && request.may_look && self.admin.is_addressed(request);
        let mut upload = Arriving::of(request, socket);
        let (status, kind, body) = if may_export {
            match self.export(socket, request)? {
                None => return Ok(()),
                Some(page) => page,
            }
        } else {
            self.build(request, &mut upload)?
        };
        if body.len() > MAX_ANSWER.min(self.held.limit()) {
            return Err((
                400,
                "the answer exceeds 32 MiB, or a sixteenth of memory; ask for less with limit=NUMBER",
            ));
        }
        let counted = if body.len() > SMALL_ANSWER {
            body.len()
        } else {
            0
        };
        let _taken = hold(&self.held, counted, Instant::now())
            .ok_or((503, "other large answers have yet to be read; try again"))?;
        let allow = (status == 405).then(|| routes::methods(request.path()));
        let head = head(status, kind, body.len(), allow.as_deref());
        let deadline = Instant::now() + TAKE_WITHIN;
        // It is the peer's loss if it does not take it.
        let _ = write_before(socket, &head, deadline)
            .and_then(|()| match &*request.method {
                "HEAD" => Ok(()),
                _ => write_before(socket, body.as_bytes(), deadline),
            })
            .and_then(|()| socket.shutdown(std::net::Shutdown::Write));
        // A client that is still sending would lose the answer.
        if upload.rest > 0 {
            drop_what_comes(socket, Instant::now() + LINGER);
        }
        Ok(())
    }

    /// Builds the requested page, or makes the change.
    fn build(&self, request: &Request, upload: &mut Arriving<'_>) -> Result<Page, HttpError> {
        if let Some(page) = self.admin.probe(request) {
            return Ok(page);
        }
        let now = Instant::now();
        // That there is an answer at all depends on nothing.
        let _building = if request.path() == "/healthz" {
            None
        } else if request.looks() {
            let building = hold(&self.building, 1, now + BUILD_WITHIN);
            Some(building.ok_or((503, "too many pages are requested; try again"))?)
        } else {
            let change = hold(&self.changes, 1, now);
            Some(change.ok_or((503, "other changes are in progress; try again"))?)
        };
        // A panic is logged by its hook.
        catch_unwind(AssertUnwindSafe(|| self.admin.route(request, upload)))
            .map_err(|_| (500, "a defect of the server; its log says more"))
    }

    /// Writes events until the client leaves.
    fn stream(
        &self,
        socket: &Socket,
        slot: &ClientSlot<'_>,
        request: &Request,
    ) -> Result<(), HttpError> {
        let _event_stream = hold(&self.event_streams, 1, Instant::now())
            .ok_or((503, "as many listen already as may"))?;
        if let Some(client) = lock(&self.clients).open.get_mut(&slot.number) {
            client.endless = true;
        }
        // It ends with the first write that fails, a second after the
        // listener went; a panic ends it too.
        let write_events = || {
            self.admin
                .write_events(&mut InTime(socket, None), request.method == "HEAD")
        };
        let _ = catch_unwind(AssertUnwindSafe(write_events));
        Ok(())
    }

    /// Writes a backup; a page where there is none.
    fn export(&self, socket: &Socket, request: &Request) -> Result<Option<Page>, HttpError> {
        let _export = hold(&self.exports, 1, Instant::now())
            .ok_or((503, "another export is in progress; try again"))?;
        let mut out = InTime(socket, Some(Instant::now() + EXPORT_WITHIN));
        let export = || {
            let mut out = BufWriter::with_capacity(SMALL_ANSWER, &mut out);
            let page = self.admin.export(request, &mut out);
            let _ = out.flush();
            page
        };
        let page = catch_unwind(AssertUnwindSafe(export))
            .map_err(|_| (500, "a defect of the server; its log says more"))?;
        if page.is_none() {
            let _ = socket.shutdown(std::net::Shutdown::Write);
        }
        Ok(page)
    }

    /// Reads a whole request; none if the client leaves before.
    fn read(&self, socket: &Socket, deadline: Instant) -> Result<Option<Request>, HttpError> {
        let mut bytes = Vec::new();
        let head = loop {
            let seen = bytes.len();
            match read_some(socket, &mut bytes, deadline) {
                Ok(0) => return Ok(None),
                Ok(_) => {}
                Err(error) if is_late(&error) && bytes.is_empty() => return Ok(None),
                Err(error) if is_late(&error) => {
                    return Err((408, "the request did not come within 10 s"));
                }
                Err(_) => return Ok(None),
            }
            let end = find(&bytes, b"\r\n\r\n", seen.saturating_sub(3));
            match end.map(|at| at + 4) {
                Some(end) if end <= MAX_HEAD => break end,
                None if bytes.len() < MAX_HEAD => {}
                _ => return Err((431, "the header exceeds 16 KiB")),
            }
        };
        let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
        let mut request = httparse::Request::new(&mut headers);
        let body = bytes.split_off(head);
        let mut body = match request.parse(&bytes) {
            Ok(status) if status.is_complete() => body,
            Err(httparse::Error::TooManyHeaders) => {
                return Err((431, "there are more than 64 header lines"));
            }
            _ => return Err((400, "this is no HTTP/1.1 request")),
        };
        let method = request.method.unwrap_or_default().to_owned();
        let (most, exceeds) = if method == "PUT" {
            (self.admin.max_upload, "the component exceeds 256 MiB")
        } else {
            (MAX_BODY, "the body exceeds 1 MiB")
        };
        let (length, continues) = framing(request.headers)?;
        if length > most {
            return Err((413, exceeds));
        }
        let (authority, url) = target(request.path.unwrap_or_default());
        let mut received = Request {
            method,
            url: url.to_owned(),
            is_old: request.version == Some(0),
            may_look: self.may_look(socket, request.headers),
            peer: peer_of(socket),
            headers: Vec::new(),
            body: Vec::new(),
            rest: 0,
            continues,
            _held: None,
        };
        if !received.may_look && !received.is_probe() {
            static REMOTE: Limiter = Limiter::audit();
            if REMOTE.allows("admin endpoint from other machines") {
                tracing::warn!(
                    target: AUDIT,
                    security = "admin-token",
                    peer = received.peer,
                    "another machine requested without the token"
                );
            }
            return Err((
                401,
                "from another machine, reading too takes the header Authorization: Bearer TOKEN",
            ));
        }
        if received.is_upload() {
            body.truncate(length);
            received.rest = length - body.len();
        } else if length > MAX_HEAD {
            let held = hold(&self.held, length, Instant::now());
            received._held =
                Some(held.ok_or((503, "other large requests are being read; try again"))?);
        }
        let length = length - received.rest;
        if continues && body.len() < length {
            let _ = (&*socket).write_all(CONTINUE);
        }
        while body.len() < length {
            match read_some(socket, &mut body, deadline) {
                Ok(0) => return Ok(None),
                Ok(_) => {}
                Err(error) if is_late(&error) => {
                    return Err((408, "the body did not come within 10 s"));
                }
                Err(_) => return Ok(None),
            }
        }
        body.truncate(length);
        let headers = request.headers.iter().map(|header| {
            let is_host = header.name.eq_ignore_ascii_case("host");
            let value = authority.filter(|_| is_host).unwrap_or(header.value);
            // A page of somebody else can't have an address for its name, so
            // the one that the peer has connected to is as good as loopback.
            let is_own = is_host && is_own_address(socket, value);
            let value = if is_own { b"localhost" } else { value };
            (header.name.to_owned(), value.to_owned())
        });
        received.headers = headers.collect();
        received.body = body;
        Ok(Some(received))
    }

    /// Whether a client may read: from this machine, or with the token. A
    /// change takes the token in any case, which is checked later.
    fn may_look(&self, socket: &Socket, headers: &[httparse::Header<'_>]) -> bool {
        let is_unix = socket.local_addr().is_ok_and(|own| own.is_unix());
        let peer = socket.peer_addr().ok().and_then(|peer| peer.as_socket());
        if is_unix || peer.is_some_and(|peer| peer.ip().to_canonical().is_loopback()) {
            return true;
        }
        let shown = headers
            .iter()
            .find(|header| header.name.eq_ignore_ascii_case("authorization"));
        let shown = shown.and_then(|header| {
            std::str::from_utf8(header.value)
                .ok()
                .and_then(token::bearer)
        });
        self.admin
            .token
            .as_ref()
            .zip(shown)
            .is_some_and(|(token, shown)| token::is_same(token, shown))
    }
}

/// Address and port of a peer; of one over a Unix socket, user and process.
fn peer_of(socket: &Socket) -> String {
    let peer = socket.peer_addr().ok().and_then(|peer| peer.as_socket());
    peer.map(|peer| peer.to_string()).unwrap_or_else(|| {
        rustix::net::sockopt::socket_peercred(socket).map_or_else(
            |_| "unix".into(),
            |peer| format!("unix:uid={},pid={}", peer.uid, peer.pid),
        )
    })
}

/// Reserves an amount by the deadline, if it is available.
fn hold(budget: &Arc<Budget>, amount: usize, deadline: Instant) -> Option<Reservation> {
    let mut held = Reservation::empty(budget);
    held.raise_until(amount, deadline).then_some(held)
}

/// Splits a target in absolute form, as proxies send it, into the authority,
/// which replaces Host, and path and query.
fn target(target: &str) -> (Option<&[u8]>, &str) {
    let rest = match target.split_at_checked(7) {
        Some((scheme, rest)) if scheme.eq_ignore_ascii_case("http://") => rest,
        _ => return (None, target),
    };
    let path = rest.find(['/', '?']).unwrap_or(rest.len());
    let (authority, path) = rest.split_at(path);
    let path = if path.is_empty() { "/" } else { path };
    (Some(authority.as_bytes()), path)
}

/// The body's length, and whether the peer waits for `100 Continue`.
fn framing(headers: &[httparse::Header<'_>]) -> Result<(usize, bool), HttpError> {
    let named = |name: &'static str| {
        headers
            .iter()
            .filter(move |header| header.name.eq_ignore_ascii_case(name))
    };
    if named("transfer-encoding").next().is_some() {
        return Err((411, "a body needs a Content-Length here"));
    }
    let mut lengths = named("content-length");
    let length = match (lengths.next(), lengths.next()) {
        (None, _) => 0,
        (Some(header), None) => {
            let digits = std::str::from_utf8(header.value)
                .ok()
                .filter(|text| text.bytes().all(|b| b.is_ascii_digit()));
            digits
                .and_then(|text| text.parse().ok())
                .ok_or((400, "Content-Length is no number"))?
        }
        (Some(_), Some(_)) => return Err((400, "Content-Length is there twice")),
    };
    Ok((length, named("expect").next().is_some()))
}

/// Whether a Host header is the address that the peer connected to.
fn is_own_address(socket: &Socket, host: &[u8]) -> bool {
    let own = socket.local_addr().ok().and_then(|own| own.as_socket());
    let text = std::str::from_utf8(host).unwrap_or_default();
    let named = text
        .parse::<std::net::SocketAddr>()
        .map(|address| address.ip());
    let bare = text.trim_matches(['[', ']']).parse::<IpAddr>();
    own.is_some_and(|own| {
        named
            .or(bare)
            .is_ok_and(|ip| ip.to_canonical() == own.ip().to_canonical())
    })
}

fn write_before(socket: &Socket, mut bytes: &[u8], deadline: Instant) -> io::Result<()> {
    while !bytes.is_empty() {
        socket.set_write_timeout(Some(remaining(deadline)?))?;
        let mut out = socket;
        bytes = &bytes[out.write(bytes)?..];
    }
    Ok(())
}

/// Reads once, and appends.
fn read_some(socket: &Socket, bytes: &mut Vec<u8>, deadline: Instant) -> io::Result<usize> {
    socket.set_read_timeout(Some(remaining(deadline)?))?;
    let mut part = [0; 4096];
    let mut from = socket;
    let count = from.read(&mut part)?;
    bytes.extend_from_slice(&part[..count]);
    Ok(count)
}

fn remaining(deadline: Instant) -> io::Result<Duration> {
    let remaining = deadline.saturating_duration_since(Instant::now());
    if remaining.is_zero() {
        Err(io::ErrorKind::TimedOut.into())
    } else {
        Ok(remaining)
    }
}

fn is_late(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock
    )
}

fn drop_what_comes(socket: &Socket, deadline: Instant) {
    let mut waste = Vec::new();
    while read_some(socket, &mut waste, deadline).is_ok_and(|count| count > 0) {
        waste.clear();
    }
}

fn find(bytes: &[u8], wanted: &[u8], from: usize) -> Option<usize> {
    bytes
        .get(from..)?
        .windows(wanted.len())
        .position(|window| window == wanted)
        .map(|at| from + at)
}

/// Returns head and body of a refusal.
fn refusal((status, error): HttpError) -> (Vec<u8>, String) {
    let (status, kind, body) = refuse(status, error);
    (head(status, kind, body.len(), None), body)
}

/// Status and headers of an answer that comes in one piece, with its length,
/// however large: simple for simple clients. tiny_http writes them; its server,
/// whose threads, queues and times have no bounds, is not used.
fn head(status: u16, kind: &str, length: usize, allow: Option<&str>) -> Vec<u8> {
    let headers = [
        ("Server", "mb-server"),
        ("Content-Type", kind),
        ("Cache-Control", "no-store"),
        ("X-Content-Type-Options", "nosniff"),
        ("X-Frame-Options", "DENY"),
        ("Referrer-Policy", "no-referrer"),
        ("Content-Security-Policy", POLICY),
    ];
    let headers = headers
        .into_iter()
        .chain(allow.map(|methods| ("Allow", methods)))
        .map(|(name, value)| Header::from_bytes(name, value).expect("ASCII of our own"));
    let mut head = Vec::new();
    tiny_http::Response::new(
        StatusCode(status),
        headers.collect(),
        io::empty(),
        Some(length),
        None,
    )
    .with_chunked_threshold(usize::MAX)
    .raw_print(&mut head, HTTPVersion(1, 1), &[], true, None)
    .expect("memory takes it all");
    // It sets this header only where its server does.
    head.truncate(head.len() - 2);
    head.extend(b"Connection: close\r\n\r\n");
    head
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use proptest::prelude::*;

    use super::{super::tests::admin, *};

    /// What the front makes of these bytes and the end of the stream.
    fn read(bytes: &[u8]) -> Result<Option<Request>, HttpError> {
        let (inside, mut outside) = UnixStream::pair().unwrap();
        outside.write_all(bytes).unwrap();
        outside.shutdown(std::net::Shutdown::Write).unwrap();
        Gateway::new(admin()).read(&Socket::from(inside), Instant::now() + READ_WITHIN)
    }

    #[test]
    fn a_body_takes_memory_before_it_comes() {
        let gateway = Gateway::new(Admin {
            memory: 100_000,
            ..admin()
        });
        let ask = |length: usize| {
            let (inside, mut outside) = UnixStream::pair().unwrap();
            write!(
                outside,
                "POST / HTTP/1.1\r\nContent-Length: {length}\r\n\r\n"
            )
            .unwrap();
            outside.write_all(&vec![b'x'; length]).unwrap();
            gateway.read(&Socket::from(inside), Instant::now() + READ_WITHIN)
        };
        let first = ask(60_000).unwrap();
        assert_eq!(ask(60_000).err().map(|(status, _)| status), Some(503));
        assert!(ask(1000).is_ok(), "a small one always comes");
        drop(first);
        assert!(ask(60_000).is_ok());
    }

    #[test]
    fn a_request_is_read_to_its_end_and_no_further() {
        let request = read(
            b"POST /a?b HTTP/1.1\r\nhost: x\r\nX-Name: \xfcber\r\nContent-Length: 2\r\n\r\nab, and more",
        );
        let request = request.unwrap().unwrap();
        assert_eq!(
            (
                &*request.method,
                &*request.url,
                request.path(),
                &*request.body
            ),
            ("POST", "/a?b", "/a", &b"ab"[..])
        );
        assert_eq!(request.header("Host"), Some("x"));
        assert_eq!(request.header("X-Name"), None, "it is no UTF-8");
        assert!(
            read(b"GET / HTTP/1.1\r\nhost: x\r\n").unwrap().is_none(),
            "it went before it had sent a request"
        );
    }

    proptest! {
        #[test]
        fn no_bytes_panic(
            lines in proptest::collection::vec("(?i)(host|expect|content-length|[a-z:]{0,9}): ?[ -~\\x00\\r\\n]{0,20}", 0..6),
            rest in proptest::collection::vec(any::<u8>(), 0..60),
        ) {
            let _ = read(&rest);
            let whole = [b"GET / HTTP/1.1\r\n", lines.join("\r\n").as_bytes(), b"\r\n\r\n", &rest].concat();
            if let Ok(Some(request)) = read(&whole) {
                prop_assert!(request.body.len() <= rest.len() + whole.len());
                prop_assert_eq!(request.method, "GET");
            }
        }
    }

    #[test]
    fn bodies() {
        let check = |lines: &[(&'static str, &'static str)],
                     expected: Result<(usize, bool), u16>| {
            let headers: Vec<_> = lines
                .iter()
                .map(|(name, value)| httparse::Header {
                    name,
                    value: value.as_bytes(),
                })
                .collect();
            assert_eq!(
                framing(&headers).map_err(|(status, _)| status),
                expected,
                "{lines:?}"
            );
        };
        check(&[], Ok((0, false)));
        check(
            &[("content-LENGTH", "12"), ("Expect", "100-continue")],
            Ok((12, true)),
        );
        check(&[("Content-Length", "99999999999999999999")], Err(400));
        check(&[("Content-Length", "+1")], Err(400));
        check(
            &[("Content-Length", "1"), ("Content-Length", "1")],
            Err(400),
        );
        check(&[("Transfer-Encoding", "chunked")], Err(411));
    }
}
