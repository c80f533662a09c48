//! What stands before `tiny_http`, which knows no timeouts, takes a header
//! line of any length, and ends its accept loop on any error.
//!
//! Whoever comes in gets a thread here, within a bound, and a time in which
//! to ask; those who have not asked yet make room for newcomers. A request
//! goes on when it is whole, over a Unix socket that only this program knows
//! the name of. Each connection is for one request.

use std::{
    collections::BTreeMap,
    io::{self, Read as _, Write as _},
    net::{IpAddr, TcpListener},
    os::{
        linux::net::SocketAddrExt as _,
        unix::net::{SocketAddr as UnixAddr, UnixListener, UnixStream},
    },
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use serde_json::json;
use socket2::Socket;

use super::{LINES, token};

/// Connections at the same time.
const MAX_GUESTS: usize = 64;
/// Largest request line and header lines together, in bytes.
const MAX_HEAD: usize = 16 * 1024;
/// Most header lines.
const MAX_HEADERS: usize = 64;
/// Largest body of a request, in bytes.
pub(super) const MAX_BODY: usize = 1024 * 1024;
/// For a request to arrive as a whole.
const ASK_WITHIN: Duration = Duration::from_secs(10);
/// For the answer to begin: as long as a change may take that compiles.
const ANSWER_WITHIN: Duration = Duration::from_secs(900);
/// For an answer to be taken as a whole; of a stream without end, for each
/// part of it.
const TAKE_WITHIN: Duration = Duration::from_secs(10);
/// For a peer that was refused to read why, while what it still sends is
/// dropped.
const LINGER: Duration = Duration::from_secs(2);
/// Pause after an error of the accept call.
const PAUSE: Duration = Duration::from_millis(100);
/// How long a request may have been handed over and not arrived.
const PATIENCE: Duration = Duration::from_secs(5);
/// Stack of a guest's thread: its buffers are on the heap.
const STACK: usize = 256 * 1024;

/// The header that proves that a request came through here, and numbers it.
pub(super) const MARK: &str = "X-Front";
/// Header lines that are about one connection, not about the request.
const OF_A_CONNECTION: [&str; 7] = [
    "connection",
    "keep-alive",
    "upgrade",
    "expect",
    "te",
    "proxy-connection",
    "content-length",
];

/// A way in.
pub enum Door {
    /// TCP. Peers of other machines must show the token to read, too.
    Tcp(TcpListener),
    /// A Unix socket: who may open its file may read.
    Unix(UnixListener),
}

/// The front, as its threads and the one behind it share it.
pub(super) struct Front {
    token: Option<String>,
    /// Known to this program alone.
    key: String,
    /// Where `tiny_http` listens at present.
    behind: Mutex<Option<UnixAddr>>,
    guests: Mutex<Guests>,
    /// A guest has left.
    left: Condvar,
    /// Requests that were handed over and have not arrived, and since when.
    on_the_way: Mutex<BTreeMap<u64, Instant>>,
    requests: AtomicU64,
}

#[derive(Default)]
struct Guests {
    next: u64,
    /// By number, so the longest here first.
    here: BTreeMap<u64, Guest>,
}

struct Guest {
    socket: Arc<Socket>,
    /// Its request has not come yet.
    asking: bool,
    /// Its answer has no end.
    endless: bool,
}

/// A guest's place; given back when dropped.
struct Place<'a> {
    front: &'a Front,
    number: u64,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.front.guests().here.remove(&self.number);
        self.front.left.notify_all();
    }
}

/// Why a request goes no further: status, and what is said.
type Refused = (u16, &'static str);

/// A request that is whole.
struct Asked {
    bytes: Vec<u8>,
    /// Its answer has no end.
    endless: bool,
}

impl Front {
    pub(super) fn new(token: Option<String>) -> Arc<Self> {
        let key = uuid::Uuid::new_v4().simple().to_string();
        Arc::new(Self {
            token,
            key,
            behind: Mutex::default(),
            guests: Mutex::default(),
            left: Condvar::new(),
            on_the_way: Mutex::default(),
            requests: AtomicU64::new(1),
        })
    }

    /// Starts to let in, on a thread of its own.
    pub(super) fn open(self: &Arc<Self>, door: Door) -> io::Result<()> {
        let door: Socket = match door {
            Door::Tcp(listener) => listener.into(),
            Door::Unix(listener) => listener.into(),
        };
        // One that was inherited may be otherwise.
        door.set_nonblocking(false)?;
        let front = Arc::clone(self);
        let stand = move || {
            loop {
                match door.accept() {
                    Ok((socket, _)) => front.let_in(socket),
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => {
                        if LINES.allows("admin endpoint, accepting") {
                            tracing::warn!("admin endpoint can't accept, trying on: {error}");
                        }
                        thread::sleep(PAUSE);
                    }
                }
            }
        };
        thread::Builder::new()
            .name("mb-admin-door".into())
            .spawn(stand)
            .map(drop)
    }

    /// A new place for `tiny_http` to listen; what was on its way to the one
    /// before is lost.
    pub(super) fn listen_behind(&self) -> io::Result<UnixListener> {
        let name = format!("mb-server-{}", uuid::Uuid::new_v4().simple());
        let address = UnixAddr::from_abstract_name(name)?;
        let listener = UnixListener::bind_addr(&address)?;
        let before = self
            .behind
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .replace(address);
        self.on_the_way().clear();
        // The old one may still wait in its accept call.
        if let Some(before) = before {
            let _ = UnixStream::connect_addr(&before);
        }
        Ok(listener)
    }

    /// Whether a request with this mark came through here; it has arrived.
    pub(super) fn arrived(&self, mark: &str) -> bool {
        let Some((key, number)) = mark.split_once(' ') else {
            return false;
        };
        let known = token::is_same(&self.key, key);
        if let Ok(number) = number.parse()
            && known
        {
            self.on_the_way().remove(&number);
        }
        known
    }

    /// Whether something that was handed over has not arrived for long.
    pub(super) fn has_lost_one(&self, now: Instant) -> bool {
        self.on_the_way()
            .values()
            .any(|since| now.saturating_duration_since(*since) >= PATIENCE)
    }

    /// Waits until who has asked has the answer, as long as this at most:
    /// whoever asked for the end of the program wants to hear of it.
    pub(super) fn finish(&self, within: Duration) {
        let answering = |guests: &mut Guests| {
            guests
                .here
                .values()
                .any(|guest| !guest.asking && !guest.endless)
        };
        drop(
            self.left
                .wait_timeout_while(self.guests(), within, answering),
        );
    }

    fn guests(&self) -> MutexGuard<'_, Guests> {
        self.guests.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn on_the_way(&self) -> MutexGuard<'_, BTreeMap<u64, Instant>> {
        self.on_the_way
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn let_in(self: &Arc<Self>, socket: Socket) {
        let socket = Arc::new(socket);
        let Some(number) = self.place(&socket) else {
            // A few bytes always find room in a socket that is new.
            let _ = socket.set_nonblocking(true);
            let _ = (&*socket).write_all(&refusal((
                503,
                "too many requests at the same time; try again",
            )));
            return;
        };
        let front = Arc::clone(self);
        let serve = move || {
            let place = Place {
                front: &front,
                number,
            };
            front.serve(&socket, &place);
        };
        if let Err(error) = thread::Builder::new()
            .name("mb-admin-guest".into())
            .stack_size(STACK)
            .spawn(serve)
        {
            self.guests().here.remove(&number);
            if LINES.allows("admin endpoint, threads") {
                tracing::warn!("admin endpoint: {error}");
            }
        }
    }

    /// A place, if need be that of whoever is here longest and has not asked.
    fn place(&self, socket: &Arc<Socket>) -> Option<u64> {
        let mut guests = self.guests();
        if guests.here.len() >= MAX_GUESTS {
            let slow = guests
                .here
                .iter()
                .find(|(_, guest)| guest.asking)
                .map(|(number, _)| *number)?;
            let slow = guests.here.remove(&slow)?;
            // Its thread ends by that.
            let _ = slow.socket.shutdown(std::net::Shutdown::Both);
        }
        let number = guests.next;
        guests.next += 1;
        guests.here.insert(
            number,
            Guest {
                socket: Arc::clone(socket),
                asking: true,
                endless: false,
            },
        );
        Some(number)
    }

    fn serve(&self, socket: &Socket, place: &Place<'_>) {
        let asked = self.read(socket, Instant::now() + ASK_WITHIN);
        if let Some(guest) = self.guests().here.get_mut(&place.number) {
            guest.asking = false;
            guest.endless = matches!(&asked, Ok(Some(Asked { endless: true, .. })));
        }
        let refused = match asked {
            Ok(None) => return,
            Ok(Some(asked)) => match self.pass_on(socket, &asked) {
                Ok(()) => return,
                Err(refused) => refused,
            },
            Err(refused) => refused,
        };
        let _ = socket.set_write_timeout(Some(LINGER));
        let sent = (&*socket)
            .write_all(&refusal(refused))
            .and_then(|()| socket.shutdown(std::net::Shutdown::Write));
        if sent.is_ok() {
            drop_what_comes(socket, Instant::now() + LINGER);
        }
    }

    /// Reads a request to its end; none if the peer goes without asking.
    fn read(&self, socket: &Socket, deadline: Instant) -> Result<Option<Asked>, Refused> {
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
                _ => return Err((431, "the header is over 16 KiB")),
            }
        };
        let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
        let mut request = httparse::Request::new(&mut headers);
        let body = bytes.split_off(head);
        let mut body = match request.parse(&bytes) {
            Ok(status) if status.is_complete() => body,
            Err(httparse::Error::TooManyHeaders) => {
                return Err((431, "there are over 64 header lines"));
            }
            _ => return Err((400, "this is no HTTP/1.1 request")),
        };
        let (length, continues) = framing(request.headers)?;
        if !self.may_ask(socket, request.headers) {
            if LINES.allows("admin endpoint from other machines") {
                let peer = socket
                    .peer_addr()
                    .ok()
                    .and_then(|peer| peer.as_socket())
                    .map(|peer| peer.to_string());
                tracing::warn!(
                    security = "admin-token",
                    peer,
                    "another machine asked without the token"
                );
            }
            return Err((
                401,
                "from another machine, reading too takes the header Authorization: Bearer TOKEN",
            ));
        }
        if continues && body.is_empty() {
            let _ = (&*socket).write_all(b"HTTP/1.1 100 Continue\r\n\r\n");
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
        let path = request.path.unwrap_or_default();
        let endless = path.split('?').next() == Some("/events");
        Ok(Some(Asked {
            bytes: self.rewritten(socket, &request, &body),
            endless,
        }))
    }

    /// The request as `tiny_http` gets it, but for the mark.
    fn rewritten(
        &self,
        socket: &Socket,
        request: &httparse::Request<'_, '_>,
        body: &[u8],
    ) -> Vec<u8> {
        let (method, path) = (
            request.method.unwrap_or_default(),
            request.path.unwrap_or_default(),
        );
        let mut bytes = format!("{method} {path} HTTP/1.1\r\n").into_bytes();
        for header in request.headers.iter() {
            let is = |name: &str| header.name.eq_ignore_ascii_case(name);
            if OF_A_CONNECTION.iter().any(|name| is(name)) || is(MARK) {
                continue;
            }
            // A page of somebody else can't have an address for its name, so
            // the one that the peer has connected to is as good as loopback.
            let value = if is("host") && is_own_address(socket, header.value) {
                b"localhost"
            } else {
                header.value
            };
            bytes.extend([header.name.as_bytes(), b": ", value, b"\r\n"].concat());
        }
        bytes.extend(
            format!("Content-Length: {}\r\nConnection: close\r\n", body.len()).into_bytes(),
        );
        bytes.extend([b"\r\n", body].concat());
        bytes
    }

    /// Whoever is on this machine may read; what changes something takes the
    /// token in any case, further in.
    fn may_ask(&self, socket: &Socket, headers: &[httparse::Header<'_>]) -> bool {
        let peer = socket.peer_addr().ok().and_then(|peer| peer.as_socket());
        if peer.is_none_or(|peer| peer.ip().to_canonical().is_loopback()) {
            return true;
        }
        let shown = headers
            .iter()
            .find(|header| header.name.eq_ignore_ascii_case("authorization"));
        let shown = shown.and_then(|header| {
            std::str::from_utf8(header.value)
                .ok()?
                .strip_prefix("Bearer ")
        });
        self.token
            .as_ref()
            .zip(shown)
            .is_some_and(|(token, shown)| token::is_same(token, shown.trim()))
    }

    /// Hands a request over, and its answer back.
    fn pass_on(&self, socket: &Socket, asked: &Asked) -> Result<(), Refused> {
        const NOBODY: Refused = (503, "the admin endpoint is starting; try again");
        let behind = self
            .behind
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
            .ok_or(NOBODY)?;
        let stream = UnixStream::connect_addr(&behind).map_err(|_| NOBODY)?;
        let number = self.requests.fetch_add(1, Relaxed);
        let line = asked
            .bytes
            .iter()
            .position(|byte| *byte == b'\n')
            .map_or(0, |at| at + 1);
        let mark = format!("{MARK}: {} {number}\r\n", self.key);
        let whole = [&asked.bytes[..line], mark.as_bytes(), &asked.bytes[line..]].concat();
        self.on_the_way().insert(number, Instant::now());
        let result = stream
            .set_write_timeout(Some(ASK_WITHIN))
            .and_then(|()| stream.set_read_timeout(Some(ANSWER_WITHIN)))
            .and_then(|()| (&stream).write_all(&whole))
            .and_then(|()| {
                let mut first = vec![0; 16 * 1024];
                let count = (&stream).read(&mut first)?;
                first.truncate(count);
                Ok(first)
            });
        self.on_the_way().remove(&number);
        let first = result
            .ok()
            .filter(|first| !first.is_empty())
            .ok_or(NOBODY)?;
        // From here on it is the peer's loss if it does not take it.
        let _ = hand_back(socket, &stream, &first, asked.endless);
        Ok(())
    }
}

/// The body's length, and whether the peer waits to be told to send it.
fn framing(headers: &[httparse::Header<'_>]) -> Result<(usize, bool), Refused> {
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
    if length > MAX_BODY {
        return Err((413, "the body is over 1 MiB"));
    }
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

/// Passes an answer on, in time, and says that it is the only one.
fn hand_back(socket: &Socket, stream: &UnixStream, first: &[u8], endless: bool) -> io::Result<()> {
    let line = find(first, b"\r\n", 0).map_or(first.len(), |at| at + 2);
    let first = [&first[..line], b"Connection: close\r\n", &first[line..]].concat();
    let mut deadline = Instant::now() + TAKE_WITHIN;
    write_before(socket, &first, deadline)?;
    let mut part = vec![0; 16 * 1024];
    loop {
        let count = (&*stream).read(&mut part)?;
        if count == 0 {
            return socket.shutdown(std::net::Shutdown::Write);
        }
        if endless {
            deadline = Instant::now() + TAKE_WITHIN;
        }
        write_before(socket, &part[..count], deadline)?;
    }
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

/// A whole answer of the front's own.
fn refusal((status, error): Refused) -> Vec<u8> {
    let reason = match status {
        400 => "Bad Request",
        401 => "Unauthorized",
        408 => "Request Timeout",
        411 => "Length Required",
        413 => "Content Too Large",
        431 => "Request Header Fields Too Large",
        _ => "Service Unavailable",
    };
    let body = json!({"error": error}).to_string();
    let length = body.len();
    format!(
        "HTTP/1.1 {status} {reason}\r\nConnection: close\r\nContent-Type: application/json; charset=utf-8\r\n\
         Cache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\nContent-Length: {length}\r\n\r\n{body}"
    )
    .into_bytes()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What the front makes of these bytes and the end of the stream.
    fn read(bytes: &[u8]) -> Result<Option<Asked>, Refused> {
        let (inside, mut outside) = UnixStream::pair().unwrap();
        outside.write_all(bytes).unwrap();
        outside.shutdown(std::net::Shutdown::Write).unwrap();
        Front::new(None).read(&Socket::from(inside), Instant::now() + ASK_WITHIN)
    }

    #[test]
    fn a_request_goes_on_without_what_is_of_its_connection() {
        let asked = read(b"POST /a?b HTTP/1.1\r\nhost: x\r\nx-FRONT: k 1\r\nConnection: keep-alive\r\nTE: x\r\nContent-Length: 2\r\n\r\nab, and more");
        let expected =
            b"POST /a?b HTTP/1.1\r\nhost: x\r\nContent-Length: 2\r\nConnection: close\r\n\r\nab";
        assert_eq!(
            String::from_utf8_lossy(&asked.unwrap().unwrap().bytes),
            String::from_utf8_lossy(expected)
        );
        assert!(
            read(b"GET /events HTTP/1.1\r\n\r\n")
                .unwrap()
                .unwrap()
                .endless
        );
        assert!(
            read(b"GET / HTTP/1.1\r\nhost: x\r\n").unwrap().is_none(),
            "it went before it had asked"
        );
    }

    proptest! {
        #[test]
        fn no_bytes_panic_and_none_bring_a_mark(
            lines in proptest::collection::vec("(?i)(x-front|host|expect|content-length|[a-z:]{0,9}): ?[ -~\\x00\\r\\n]{0,20}", 0..6),
            rest in proptest::collection::vec(any::<u8>(), 0..60),
        ) {
            let _ = read(&rest);
            let whole = [b"GET / HTTP/1.1\r\n", lines.join("\r\n").as_bytes(), b"\r\n\r\n", &rest].concat();
            if let Ok(Some(asked)) = read(&whole) {
                let text = String::from_utf8_lossy(&asked.bytes).to_lowercase();
                let head = text.split("\r\n\r\n").next().unwrap_or_default();
                prop_assert!(!head.contains("\r\nx-front"), "{head}");
                prop_assert_eq!(head.matches("\r\ncontent-length:").count(), 1);
            }
        }
    }

    #[test]
    fn what_is_handed_over_and_does_not_arrive_is_missed() {
        let front = Front::new(None);
        let now = Instant::now();
        front.on_the_way().insert(7, now);
        assert!(!front.has_lost_one(now));
        assert!(front.has_lost_one(now + PATIENCE));
        assert!(
            !front.arrived(&format!("{} 7", "0".repeat(32))),
            "somebody else's mark"
        );
        assert!(front.has_lost_one(now + PATIENCE));
        assert!(front.arrived(&format!("{} 7", front.key)));
        assert!(!front.has_lost_one(now + PATIENCE));
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
        check(&[("Content-Length", "1048577")], Err(413));
        check(&[("Content-Length", "99999999999999999999")], Err(400));
        check(&[("Content-Length", "+1")], Err(400));
        check(
            &[("Content-Length", "1"), ("Content-Length", "1")],
            Err(400),
        );
        check(&[("Transfer-Encoding", "chunked")], Err(411));
    }
}
