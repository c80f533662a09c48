//! The head of a request: what RFC 9110 and 9112 let through, and what of it is
//! asked of this server. Whatever could be read in two ways is refused.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use super::{
    mcp::McpFields,
    response::{Asks, Refusal},
    upgrade::{Handshake, Upgrade},
};
use crate::wire::{
    Code, Topic, Version,
    header::{MAX_TIMEOUT, is_request_id},
};

/// Longest head, with its empty line, in bytes.
pub const MAX_HEAD_SIZE: usize = 16 * 1024;
/// Fields of a head at most.
pub const MAX_FIELDS: usize = 64;

/// Path of requests of MCP.
const MCP: &str = "/mcp";

/// Method of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// GET.
    Get,
    /// HEAD.
    Head,
    /// POST.
    Post,
    /// OPTIONS.
    Options,
    /// Any other.
    Other,
}

/// What is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Route {
    /// A call, or a message without an answer, of a topic.
    Message {
        /// The topic, which follows the grammar.
        topic: Box<str>,
        /// The version; none for the highest that is loaded.
        version: Option<Version>,
        /// PUBLISH.
        is_publish: bool,
    },
    /// `system.services`.
    Services,
    /// The same as an OpenAPI document.
    OpenApi,
    /// What the body says, a request of MCP.
    Mcp,
    /// Whether the process lives.
    Health,
    /// Whether it serves.
    Ready,
    /// WebSocket.
    WebSocket(Upgrade),
}

/// How the body is delimited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Framing {
    /// So many bytes.
    Length(u64),
    /// The chunked transfer coding.
    Chunked,
}

/// What the body is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// No Content-Type.
    Unnamed,
    /// JSON in UTF-8.
    Json,
    /// Opaque bytes.
    Binary,
    /// Anything else.
    Other,
}

/// A head that follows the rules of HTTP. Whether what it asks for exists is
/// in `asked`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Head {
    /// What is asked for, or why it is refused.
    pub asked: Result<Route, Refusal>,
    /// Method.
    pub method: Method,
    /// HTTP/1.0.
    pub is_http10: bool,
    /// The client does not want the connection to stay.
    pub closes: bool,
    /// Body.
    pub framing: Framing,
    /// The client waits for 100 before it sends the body.
    pub expects_continue: bool,
    /// Authority: of the target, else of Host; none with HTTP/1.0 alone.
    pub host: Option<Box<str>>,
    /// Origin of the page that asks.
    pub origin: Option<Box<str>>,
    /// A browser says that another site asks.
    pub is_cross_site: bool,
    /// Bearer token; an empty one stands for credentials of another scheme.
    pub token: Option<Box<str>>,
    /// Addresses that proxies have passed it on from, the last one first, up to
    /// one that is none; none of it where two fields give such addresses, one of
    /// which may be the client's.
    pub forwarded: Option<Vec<IpAddr>>,
    /// Its request id.
    pub request_id: Option<Box<str>>,
    /// The request that caused it.
    pub parent_request_id: Option<Box<str>>,
    /// How long the client waits.
    pub timeout: Option<Duration>,
    /// What the body is.
    pub content: Content,
    /// What it repeats of a request of MCP; none on other paths.
    pub mcp: Option<McpFields>,
}

fn malformed(message: &'static str) -> Refusal {
    Refusal::new(Code::MalformedMessage, message)
}

/// Finds the end of a head, its empty line included, and refuses bytes that no
/// head may have. `scanned` bytes were looked at before.
pub(super) fn find_end(bytes: &[u8], scanned: &mut usize) -> Result<Option<usize>, Refusal> {
    let from = *scanned;
    let mut before = from.checked_sub(1).map_or(0, |at| bytes[at]);
    for (at, &byte) in bytes.iter().enumerate().skip(from) {
        match byte {
            b'\n' if before == b'\r' => {
                if at < 2 {
                    return Err(malformed("an empty line stands before the request line"));
                }
                if bytes[..at - 1].ends_with(b"\r\n") {
                    *scanned = 0;
                    return Ok(Some(at + 1));
                }
            }
            b'\n' => return Err(malformed("a line ends with LF alone")),
            _ if before == b'\r' => return Err(malformed("a CR without LF")),
            b'\r' => {}
            b' ' | b'\t' if before == b'\n' => {
                return Err(malformed("a line begins with white space"));
            }
            b'\t' => {}
            ..b' ' | 0x7f => return Err(malformed("a control character in the head")),
            _ => {}
        }
        if at >= MAX_HEAD_SIZE {
            return Err(too_large());
        }
        before = byte;
    }
    *scanned = bytes.len();
    Ok(None)
}

fn too_large() -> Refusal {
    Refusal::with_status(
        431,
        Code::MessageTooLarge,
        "the head is larger than 16 KiB, or has more than 64 fields",
    )
}

impl Head {
    /// Reads a whole head.
    ///
    /// # Errors
    /// What HTTP forbids; the connection is to close after the refusal.
    pub fn parse(bytes: &[u8]) -> Result<Self, Refusal> {
        let mut fields = [httparse::EMPTY_HEADER; MAX_FIELDS];
        let mut request = httparse::Request::new(&mut fields);
        match request.parse(bytes) {
            Ok(httparse::Status::Complete(length)) if length == bytes.len() => {}
            Ok(_) => return Err(malformed("the request line is malformed")),
            Err(httparse::Error::TooManyHeaders) => return Err(too_large()),
            Err(httparse::Error::Version) => {
                let message = "only HTTP/1.1 and HTTP/1.0 are spoken here";
                return Err(Refusal::with_status(505, Code::InvalidRequest, message));
            }
            Err(httparse::Error::HeaderName) => {
                return Err(malformed("the name of a field is malformed"));
            }
            Err(httparse::Error::HeaderValue) => {
                return Err(malformed("the value of a field is malformed"));
            }
            Err(_) => return Err(malformed("the request line is malformed")),
        }
        let (Some(method), Some(target), Some(minor)) =
            (request.method, request.path, request.version)
        else {
            return Err(malformed("the request line is malformed"));
        };
        let method = match method {
            "GET" => Method::Get,
            "HEAD" => Method::Head,
            "POST" => Method::Post,
            "OPTIONS" => Method::Options,
            _ => Method::Other,
        };
        let is_http10 = minor == 0;
        let mut fields = Fields::read(request.headers)?;
        // HTTP/1.0 has no upgrade.
        fields.handshake.is_upgrade &= !is_http10;
        let framing = fields.framing(is_http10)?;
        let (authority, path) = split(target)?;
        if !is_http10 && fields.host.is_none() {
            return Err(malformed("HTTP/1.1 needs the field Host"));
        }
        if let Some(host) = fields.host.or(authority)
            && !is_authority(host)
        {
            return Err(malformed("Host is no host"));
        }
        if authority.is_some_and(|authority| !is_authority(authority)) {
            return Err(malformed("the target's host is no host"));
        }
        let ids = [fields.request_id, fields.parent_request_id];
        let mut asked = route(path, method, &fields.handshake);
        if framing != Framing::Length(0) && method != Method::Post {
            asked = asked.and(Err(malformed("only POST has a body here")));
        }
        if !ids.into_iter().flatten().all(is_request_id) {
            let message = "a request id is 1 to 64 letters, digits, '.', '_' and '-'";
            asked = asked.and(Err(Refusal::new(Code::InvalidRequestId, message)));
        }
        let timeout = fields.timeout.map(parse_timeout);
        if timeout == Some(None) {
            let message = "Request-Timeout is 1 to 3600000 milliseconds";
            asked = asked.and(Err(Refusal::new(Code::InvalidRequest, message)));
        }
        let content = fields.content();
        let is_mcp = path == MCP;
        let fits = match content {
            Content::Json => true,
            Content::Binary => !is_mcp,
            Content::Unnamed => framing == Framing::Length(0),
            Content::Other => false,
        };
        if method == Method::Post && !fits {
            let message = match is_mcp {
                true => "Content-Type must be application/json",
                false => "Content-Type must be application/json or application/octet-stream",
            };
            asked = asked.and(Err(Refusal::with_status(
                415,
                Code::InvalidRequest,
                message,
            )));
        }
        if fields.expect.is_some() && !fields.expects_continue() {
            let message = "only 100-continue can be expected";
            asked = asked.and(Err(Refusal::with_status(
                417,
                Code::InvalidRequest,
                message,
            )));
        }
        let boxed = |text: Option<&str>| text.map(Into::into);
        Ok(Self {
            asked,
            method,
            is_http10,
            closes: fields.closes || is_http10 && !fields.keeps_alive,
            framing,
            expects_continue: fields.expects_continue() && !is_http10,
            host: boxed(authority.or(fields.host)),
            origin: boxed(fields.origin),
            is_cross_site: fields
                .fetch_site
                .is_some_and(|site| matches!(site, "cross-site" | "same-site")),
            token: fields.authorization.map(|value| bearer(value).into()),
            forwarded: fields.forwarded,
            request_id: boxed(fields.request_id),
            parent_request_id: boxed(fields.parent_request_id),
            timeout: timeout.flatten(),
            content,
            mcp: is_mcp.then(|| McpFields {
                revision: boxed(fields.mcp_revision),
                method: boxed(fields.mcp_method),
                name: boxed(fields.mcp_name),
            }),
        })
    }

    /// What it asks for, unless that is refused.
    #[must_use]
    pub fn asks(&self) -> Asks {
        match (&self.asked, &self.mcp) {
            (Ok(Route::OpenApi), _) => Asks::Services,
            (Ok(Route::Mcp), Some(fields)) => Asks::Mcp(fields.clone()),
            _ => Asks::Topic,
        }
    }
}

impl Route {
    /// The topic that stands for it where it names none.
    pub(super) fn system_topic(&self) -> &'static str {
        match self {
            Self::Mcp => "system.mcp",
            Self::OpenApi => "system.openapi",
            _ => "system.services",
        }
    }
}

/// The fields that are looked at.
#[derive(Default)]
struct Fields<'a> {
    length: Option<&'a str>,
    coding: Option<&'a str>,
    host: Option<&'a str>,
    origin: Option<&'a str>,
    fetch_site: Option<&'a str>,
    authorization: Option<&'a str>,
    content_type: Option<&'a str>,
    request_id: Option<&'a str>,
    parent_request_id: Option<&'a str>,
    timeout: Option<&'a str>,
    expect: Option<&'a str>,
    mcp_revision: Option<&'a str>,
    mcp_method: Option<&'a str>,
    mcp_name: Option<&'a str>,
    closes: bool,
    keeps_alive: bool,
    forwarded: Option<Vec<IpAddr>>,
    handshake: Handshake<'a>,
}

/// The elements of a list.
pub(super) fn tokens(value: &[u8]) -> impl Iterator<Item = &[u8]> {
    value.split(|&byte| byte == b',').map(<[u8]>::trim_ascii)
}

impl<'a> Fields<'a> {
    fn read(fields: &[httparse::Header<'a>]) -> Result<Self, Refusal> {
        let mut read = Self::default();
        for field in fields {
            let is = |name: &str| field.name.eq_ignore_ascii_case(name);
            let once = match field.name.len() {
                14 if is("content-length") => &mut read.length,
                17 if is("transfer-encoding") => &mut read.coding,
                4 if is("host") => &mut read.host,
                6 if is("origin") => &mut read.origin,
                14 if is("sec-fetch-site") => &mut read.fetch_site,
                13 if is("authorization") => &mut read.authorization,
                12 if is("content-type") => &mut read.content_type,
                10 if is("request-id") => &mut read.request_id,
                17 if is("parent-request-id") => &mut read.parent_request_id,
                15 if is("request-timeout") => &mut read.timeout,
                6 if is("expect") => &mut read.expect,
                17 if is("sec-websocket-key") => &mut read.handshake.key,
                21 if is("sec-websocket-version") => &mut read.handshake.version,
                20 if is("mcp-protocol-version") => &mut read.mcp_revision,
                10 if is("mcp-method") => &mut read.mcp_method,
                8 if is("mcp-name") => &mut read.mcp_name,
                10 if is("connection") => {
                    for token in tokens(field.value) {
                        read.closes |= token.eq_ignore_ascii_case(b"close");
                        read.keeps_alive |= token.eq_ignore_ascii_case(b"keep-alive");
                        read.handshake.is_upgrade |= token.eq_ignore_ascii_case(b"upgrade");
                    }
                    continue;
                }
                7 if is("upgrade") => {
                    let mut names = tokens(field.value);
                    let is_it = |name: &[u8]| name.eq_ignore_ascii_case(b"websocket");
                    read.handshake.is_websocket |= names.any(is_it);
                    continue;
                }
                22 if is("sec-websocket-protocol") => {
                    read.handshake.offers(field.value);
                    continue;
                }
                _ => continue,
            };
            let value = std::str::from_utf8(field.value)
                .map_err(|_| malformed("the value of a field is not UTF-8"))?;
            if once.replace(value).is_some() {
                return Err(malformed("a field stands there twice that may only once"));
            }
        }
        read.forwarded = forwarded(fields);
        Ok(read)
    }

    fn framing(&self, is_http10: bool) -> Result<Framing, Refusal> {
        match (self.length, self.coding) {
            (Some(_), Some(_)) => Err(malformed(
                "Content-Length and Transfer-Encoding stand beside each other",
            )),
            (None, Some(_)) if is_http10 => Err(malformed("HTTP/1.0 has no Transfer-Encoding")),
            (None, Some(coding)) if coding.eq_ignore_ascii_case("chunked") => Ok(Framing::Chunked),
            (None, Some(_)) => Err(malformed("the one transfer coding here is chunked")),
            (None, None) => Ok(Framing::Length(0)),
            (Some(length), None) => {
                let is_number = !length.is_empty()
                    && length.len() <= 18
                    && length.bytes().all(|byte| byte.is_ascii_digit());
                let length = is_number.then(|| length.parse().ok()).flatten();
                length
                    .map(Framing::Length)
                    .ok_or_else(|| malformed("Content-Length is no number"))
            }
        }
    }

    fn content(&self) -> Content {
        let Some(value) = self.content_type else {
            return Content::Unnamed;
        };
        let mut parts = value.split(';').map(str::trim);
        let media_type = parts.next().unwrap_or_default();
        let is_utf8 = parts.all(|parameter| {
            parameter.split_once('=').is_none_or(|(name, value)| {
                !name.trim().eq_ignore_ascii_case("charset")
                    || value.trim().trim_matches('"').eq_ignore_ascii_case("utf-8")
            })
        });
        if media_type.eq_ignore_ascii_case("application/json") && is_utf8 {
            Content::Json
        } else if media_type.eq_ignore_ascii_case("application/octet-stream") {
            Content::Binary
        } else {
            Content::Other
        }
    }

    fn expects_continue(&self) -> bool {
        self.expect
            .is_some_and(|expected| expected.eq_ignore_ascii_case("100-continue"))
    }
}

/// The addresses of `Forwarded` or `X-Forwarded-For`, from the right, until one
/// that is none.
fn forwarded(fields: &[httparse::Header<'_>]) -> Option<Vec<IpAddr>> {
    let entries = |name: &'static str| {
        let named = move |field: &&httparse::Header<'_>| field.name.eq_ignore_ascii_case(name);
        let text = |field: &httparse::Header<'_>| String::from_utf8_lossy(field.value).into_owned();
        let values: Vec<_> = fields.iter().filter(named).map(text).collect();
        values.join(",")
    };
    let (standard, other) = (entries("forwarded"), entries("x-forwarded-for"));
    let is_standard = !standard.is_empty();
    if is_standard && !other.is_empty() {
        return None;
    }
    let text = standard + &other;
    let address = |entry: &str| {
        let entry = match is_standard {
            false => entry,
            true => entry.split(';').find_map(|pair| {
                let (name, value) = pair.split_once('=')?;
                name.trim().eq_ignore_ascii_case("for").then_some(value)
            })?,
        };
        let entry = entry.trim().trim_matches('"');
        let bare = entry
            .strip_prefix('[')
            .and_then(|rest| rest.strip_suffix(']'));
        let bare = bare.unwrap_or(entry);
        let with_port = || entry.parse().map(|address: SocketAddr| address.ip()).ok();
        bare.parse().ok().or_else(with_port)
    };
    Some(text.rsplit(',').map_while(address).collect())
}

fn bearer(value: &str) -> &str {
    match value.split_once(' ') {
        Some((scheme, token)) if scheme.eq_ignore_ascii_case("bearer") => token.trim(),
        _ => "",
    }
}

fn parse_timeout(text: &str) -> Option<Duration> {
    let is_number = text.len() <= 7 && text.bytes().all(|byte| byte.is_ascii_digit());
    let timeout = Duration::from_millis(is_number.then(|| text.parse().ok()).flatten()?);
    (!timeout.is_zero() && timeout <= MAX_TIMEOUT).then_some(timeout)
}

/// A host or an address, with a port or without.
fn is_authority(text: &str) -> bool {
    let allowed = |byte: u8| {
        byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_' | b':' | b'[' | b']')
    };
    !text.is_empty() && text.bytes().all(allowed)
}

/// Splits a target into the authority that it may name, and its path without a
/// query.
fn split(target: &str) -> Result<(Option<&str>, &str), Refusal> {
    // Bytes beyond ASCII may stand in no target, and have no place to be cut at.
    if !target.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(malformed("the target holds bytes that a path may not"));
    }
    let scheme = ["http://", "https://"].into_iter().find(|scheme| {
        target.len() >= scheme.len() && target[..scheme.len()].eq_ignore_ascii_case(scheme)
    });
    let (authority, path) = match scheme {
        Some(scheme) => {
            let rest = &target[scheme.len()..];
            let end = rest.find(['/', '?']).unwrap_or(rest.len());
            (Some(&rest[..end]), &rest[end..])
        }
        None if target.starts_with('/') || target == "*" => (None, target),
        None => return Err(malformed("the target must be a path")),
    };
    let path = path.split('?').next().unwrap_or_default();
    Ok((authority, path))
}

/// The refusal of a path that there is not.
#[must_use]
pub fn no_such_path() -> Refusal {
    let message = "no such path: there are /call/SERVICE.ACTION, /publish/SERVICE.ACTION, \
                   /services, /openapi.json, /ws, /healthz and /readyz, and /mcp where http.mcp \
                   is on";
    Refusal::new(Code::NoRouteFound, message)
}

fn route(path: &str, method: Method, handshake: &Handshake<'_>) -> Result<Route, Refusal> {
    let message = |rest: &str, is_publish| {
        let (topic, version) = match rest.split_once('@') {
            Some((topic, version)) => (topic, Some(version)),
            None => (rest, None),
        };
        Topic::parse(topic)
            .map_err(|error| Refusal::new(Code::MalformedMessage, error.to_string()))?;
        let version = version
            .map(str::parse)
            .transpose()
            .map_err(|_| malformed("the version behind @ must be three numbers, such as 1.0.0"))?;
        Ok(Route::Message {
            topic: topic.into(),
            version,
            is_publish,
        })
    };
    let (route, takes) = match path {
        "/services" => (Ok(Route::Services), "GET, HEAD"),
        "/healthz" => (Ok(Route::Health), "GET, HEAD"),
        "/readyz" => (Ok(Route::Ready), "GET, HEAD"),
        "/openapi.json" => (Ok(Route::OpenApi), "GET, HEAD"),
        MCP => (Ok(Route::Mcp), "POST"),
        "/ws" => (handshake.check().map(Route::WebSocket), "GET"),
        _ => match (path.strip_prefix("/call/"), path.strip_prefix("/publish/")) {
            (Some(topic), _) => (message(topic, false), "POST"),
            (_, Some(topic)) => (message(topic, true), "POST"),
            _ => return Err(no_such_path()),
        },
    };
    let fits = match method {
        Method::Get => takes.starts_with("GET"),
        Method::Head => takes == "GET, HEAD",
        Method::Post => takes == "POST",
        Method::Options => true,
        Method::Other => false,
    };
    if fits {
        return route;
    }
    let message = format!("this path takes {takes}");
    Err(Refusal {
        allow: Some(takes),
        ..Refusal::with_status(405, Code::InvalidRequest, message)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_come_from_the_right() {
        for (fields, expected) in [
            ("", &[][..]),
            (
                "X-Forwarded-For: 1.2.3.4, 5.6.7.8\r\n",
                &["5.6.7.8", "1.2.3.4"],
            ),
            (
                "X-Forwarded-For: 1.1.1.1\r\nx-forwarded-for: [::2]:80,3.3.3.3:1\r\n",
                &["3.3.3.3", "::2", "1.1.1.1"],
            ),
            (
                "X-Forwarded-For: 1.1.1.1, unknown, 2.2.2.2\r\n",
                &["2.2.2.2"],
            ),
            (
                "Forwarded: for=1.1.1.1;proto=http, For=\"[::1]:9\"\r\n",
                &["::1", "1.1.1.1"],
            ),
            ("Forwarded: proto=http\r\n", &[]),
            ("Forwarded: for=_hidden, for=2.2.2.2\r\n", &["2.2.2.2"]),
        ] {
            let text = format!("GET /healthz HTTP/1.1\r\nHost: a\r\n{fields}\r\n");
            let head = Head::parse(text.as_bytes()).unwrap();
            let expected: Vec<IpAddr> = expected.iter().map(|ip| ip.parse().unwrap()).collect();
            assert_eq!(head.forwarded, Some(expected), "{fields}");
        }
        let both = "GET / HTTP/1.1\r\nHost: a\r\nX-Forwarded-For: 9.9.9.9\r\nForwarded: for=1.1.1.1\r\n\r\n";
        let head = Head::parse(both.as_bytes()).unwrap();
        assert_eq!(head.forwarded, None, "which is the proxy's?");
    }
}
