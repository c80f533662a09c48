//! Writing responses, and which status goes with which code.

use std::{borrow::Cow, io::Write as _, time::SystemTime};

use super::{
    mcp::{McpFields, McpReply},
    upgrade::{SUBPROTOCOL, Upgrade},
};
use crate::wire::{Code, ErrorBody, Version, message::error_document, version::append_number};

/// Most responses have a head that is no longer, in bytes.
const HEAD_SIZE: usize = 320;

/// What a request asks for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Asks {
    /// Its topic.
    #[default]
    Topic,
    /// The services as an OpenAPI document.
    Services,
    /// What its body says, a request of MCP.
    Mcp(McpFields),
    /// Its topic, as a tool of MCP.
    Tool(McpReply),
}

/// What is known of a request while it is answered.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Exchange {
    /// Its id, named by the client or by the server.
    pub request_id: Box<str>,
    /// The origin that may read the response, a browser's page.
    pub origin: Option<Box<str>>,
    /// What it asks for, if not for a topic.
    pub asks: Asks,
    /// The response has no body: HEAD.
    pub is_head: bool,
    /// 202 instead of 200: what was published has no result.
    pub is_publish: bool,
    /// HTTP/1.0: the response says that the connection stays.
    pub is_http10: bool,
    /// The connection closes after the response.
    pub closes: bool,
}

/// A request that is refused before anything runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// Status.
    pub status: u16,
    /// Code of the ERROR object.
    pub code: Code,
    /// Its message.
    pub message: Cow<'static, str>,
    /// Methods that the path takes, with 405.
    pub allow: Option<&'static str>,
}

impl Refusal {
    /// Creates one with the status of its code.
    pub fn new(code: Code, message: impl Into<Cow<'static, str>>) -> Self {
        Self::with_status(status_of(Some(code)), code, message)
    }

    /// Creates one with a status of its own.
    pub fn with_status(status: u16, code: Code, message: impl Into<Cow<'static, str>>) -> Self {
        Self {
            status,
            code,
            message: message.into(),
            allow: None,
        }
    }
}

/// Returns the status of a code; none is a service's own.
#[must_use]
pub fn status_of(code: Option<Code>) -> u16 {
    match code {
        None => 422,
        Some(code) => match code {
            Code::MalformedMessage
            | Code::InvalidRequest
            | Code::InvalidRequestId
            | Code::InvalidPayload
            | Code::InvalidFrame => 400,
            Code::Unauthorized => 401,
            Code::Forbidden => 403,
            Code::NoRouteFound | Code::TopicNotSupported | Code::VersionNotSupported => 404,
            Code::ReadTimeout | Code::IdleTimeout => 408,
            Code::MessageTooLarge => 413,
            Code::RateLimited => 429,
            Code::InternalError => 500,
            Code::ServiceFailed => 502,
            Code::ServiceUnavailable | Code::ServerBusy | Code::ShuttingDown => 503,
            Code::Timeout => 504,
        },
    }
}

/// With 101, and with 426.
const UPGRADE: &str = "Upgrade: websocket\r\nConnection: Upgrade\r\n";

fn reason(status: u16) -> &'static str {
    match status {
        101 => "Switching Protocols",
        200 => "OK",
        202 => "Accepted",
        204 => "No Content",
        400 => "Bad Request",
        401 => "Unauthorized",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        408 => "Request Timeout",
        413 => "Content Too Large",
        415 => "Unsupported Media Type",
        421 => "Misdirected Request",
        422 => "Unprocessable Content",
        426 => "Upgrade Required",
        429 => "Too Many Requests",
        431 => "Request Header Fields Too Large",
        500 => "Internal Server Error",
        501 => "Not Implemented",
        502 => "Bad Gateway",
        503 => "Service Unavailable",
        504 => "Gateway Timeout",
        505 => "HTTP Version Not Supported",
        _ => "-",
    }
}

/// What a response says.
pub enum Response<'a> {
    /// JSON of the server.
    Json(&'a [u8]),
    /// A payload, of which only the length is written here; the bytes follow.
    Payload {
        /// JSON, or opaque bytes.
        binary: bool,
        /// Bytes of it.
        size: usize,
    },
    /// JSON, or nothing, with this status.
    Status(u16, &'a str),
    /// A failure.
    Error(Option<Code>, &'a ErrorBody<'a>),
    /// A refusal.
    Refusal(&'a Refusal),
    /// Leave for a page of another origin to ask.
    Preflight,
    /// The body may follow.
    Continue,
    /// WebSocket follows.
    SwitchingProtocols(&'a Upgrade),
}

impl Response<'_> {
    /// Appends it, with the version that served the request, if any did.
    pub fn write(&self, out: &mut Vec<u8>, exchange: &Exchange, served: Option<Version>) {
        let json = "application/json";
        let success = if exchange.is_publish { 202 } else { 200 };
        match self {
            Self::Continue => out.extend_from_slice(b"HTTP/1.1 100 Continue\r\n\r\n"),
            Self::Json(text) => {
                head(out, success, exchange, served);
                body(out, json, text, exchange);
            }
            Self::Payload { binary, size } => {
                head(out, success, exchange, served);
                let media_type = if *binary {
                    "application/octet-stream"
                } else {
                    json
                };
                content(out, media_type, *size);
            }
            Self::SwitchingProtocols(upgrade) => {
                head(out, 101, exchange, None);
                let _ = write!(out, "{UPGRADE}Sec-WebSocket-Accept: {}\r\n", upgrade.accept);
                if upgrade.names_subprotocol {
                    let _ = write!(out, "Sec-WebSocket-Protocol: {SUBPROTOCOL}\r\n");
                }
                out.extend_from_slice(b"\r\n");
            }
            Self::Status(status, text) => {
                head(out, *status, exchange, served);
                if text.is_empty() {
                    out.extend_from_slice(b"Content-Length: 0\r\n\r\n");
                } else {
                    body(out, json, text.as_bytes(), exchange);
                }
            }
            Self::Preflight => {
                head(out, 204, exchange, None);
                out.extend_from_slice(
                    b"Access-Control-Allow-Methods: GET, POST\r\n\
                      Access-Control-Allow-Headers: Content-Type, Authorization, Request-Id, \
                      Parent-Request-Id, Request-Timeout, MCP-Protocol-Version, Mcp-Method, \
                      Mcp-Name\r\nAccess-Control-Max-Age: 600\r\n\r\n",
                );
            }
            Self::Error(code, error) => {
                let status = status_of(*code);
                head(out, status, exchange, served);
                if status == 401 {
                    out.extend_from_slice(b"WWW-Authenticate: Bearer\r\n");
                }
                if matches!(status, 429 | 503) {
                    let _ = write!(out, "Retry-After: {}\r\n", retry_after(error));
                }
                body(
                    out,
                    json,
                    &error_document(error, SystemTime::now()),
                    exchange,
                );
            }
            Self::Refusal(refusal) => {
                head(out, refusal.status, exchange, None);
                if refusal.status == 401 {
                    out.extend_from_slice(b"WWW-Authenticate: Bearer\r\n");
                }
                if refusal.status == 503 {
                    out.extend_from_slice(b"Retry-After: 1\r\n");
                }
                if refusal.status == 426 {
                    let _ = write!(out, "{UPGRADE}Sec-WebSocket-Version: 13\r\n");
                }
                if let Some(allow) = refusal.allow {
                    let _ = write!(out, "Allow: {allow}\r\n");
                }
                let error = ErrorBody::server(refusal.code, refusal.message.clone());
                body(
                    out,
                    json,
                    &error_document(&error, SystemTime::now()),
                    exchange,
                );
            }
        }
    }
}

/// Seconds, rounded up, of `retryAfterMs`; one where an error names none.
fn retry_after(error: &ErrorBody<'_>) -> u64 {
    #[derive(serde::Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Details {
        retry_after_ms: u64,
    }
    let details = error.details.as_deref();
    details
        .and_then(|details| serde_json::from_str::<Details>(details.get()).ok())
        .map_or(1, |details| details.retry_after_ms.div_ceil(1000).max(1))
}

/// Status line and the fields that every response has.
fn head(out: &mut Vec<u8>, status: u16, exchange: &Exchange, served: Option<Version>) {
    let Exchange {
        request_id,
        origin,
        is_http10,
        closes,
        ..
    } = exchange;
    out.reserve(HEAD_SIZE);
    push(out, ["HTTP/1.1 "]);
    append_number(out, status.into());
    push(out, [" ", reason(status), "\r\n"]);
    if !request_id.is_empty() {
        push(out, ["Request-Id: ", request_id, "\r\n"]);
    }
    if let Some(version) = served {
        push(out, ["Service-Version: "]);
        version.append_to(out);
        push(out, ["\r\n"]);
    }
    if *closes {
        out.extend_from_slice(b"Connection: close\r\n");
    } else if *is_http10 {
        out.extend_from_slice(b"Connection: keep-alive\r\n");
    }
    if let Some(origin) = origin {
        let _ = write!(
            out,
            "Access-Control-Allow-Origin: {origin}\r\n\
             Access-Control-Expose-Headers: Request-Id, Service-Version, Retry-After\r\n"
        );
    }
    out.extend_from_slice(
        b"Vary: Origin\r\nX-Content-Type-Options: nosniff\r\nCache-Control: no-store\r\n",
    );
}

/// The last fields, and the end of the head.
fn content(out: &mut Vec<u8>, media_type: &str, size: usize) {
    push(out, ["Content-Type: ", media_type, "\r\nContent-Length: "]);
    append_number(out, size as u64);
    push(out, ["\r\n\r\n"]);
}

/// Appends texts. The formatting machinery would take longer than the rest of
/// a response.
fn push<const N: usize>(out: &mut Vec<u8>, texts: [&str; N]) {
    for text in texts {
        out.extend_from_slice(text.as_bytes());
    }
}

fn body(out: &mut Vec<u8>, media_type: &str, bytes: &[u8], exchange: &Exchange) {
    content(out, media_type, bytes.len());
    if !exchange.is_head {
        out.extend_from_slice(bytes);
    }
}
