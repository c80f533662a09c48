//! Writing messages: frame header, header line, payload, in one buffer.

use std::{borrow::Cow, io::Write as _, time::SystemTime};

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::{
    codes::Code,
    frame::{FRAME_HEADER_SIZE, FrameHeader},
    header::Header,
};

/// Largest payload of a message, in bytes: the most that `max_message_size` may
/// be.
pub const MAX_PAYLOAD_SIZE: usize = 64 * 1024 * 1024;
/// Largest message, in bytes: such a payload, and more than a header line.
pub const MAX_MESSAGE_SIZE: usize = MAX_PAYLOAD_SIZE + 1024 * 1024;

/// A payload without a copy of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Payload<'a> {
    /// One JSON text.
    Json(&'a str),
    /// Opaque bytes; the frame has BINARY set.
    Binary(&'a [u8]),
}

impl<'a> Payload<'a> {
    /// The bytes, whatever they are.
    #[must_use]
    pub fn as_bytes(&self) -> &'a [u8] {
        match self {
            Self::Json(text) => text.as_bytes(),
            Self::Binary(bytes) => bytes,
        }
    }

    /// Whether the frame has BINARY set.
    #[must_use]
    pub fn is_binary(&self) -> bool {
        matches!(self, Self::Binary(_))
    }
}

/// Appends a message with its whole payload.
pub fn write_message(out: &mut Vec<u8>, header: &Header<'_>, payload: Payload<'_>) {
    let bytes = payload.as_bytes();
    write_head(out, Some(header), bytes.len(), payload.is_binary());
    out.extend_from_slice(bytes);
}

/// Appends a message up to its payload, which is so many bytes and follows;
/// without a header, it is all of the message.
///
/// # Panics
/// If the whole would be 4 GiB or more, which the limits on answers exclude.
pub fn write_head(out: &mut Vec<u8>, header: Option<&Header<'_>>, payload: usize, binary: bool) {
    let start = out.len();
    out.extend_from_slice(&[0; FRAME_HEADER_SIZE]);
    if let Some(header) = header {
        append_line(out, header);
    }
    patch(out, start, payload, binary);
}

/// Fills in the frame header of a message that begins at `start`, of whose
/// body so many bytes are to come.
fn patch(out: &mut [u8], start: usize, to_come: usize, binary: bool) {
    let length = out.len() - start - FRAME_HEADER_SIZE + to_come;
    let length = u32::try_from(length).expect("messages are bounded far below 4 GiB");
    let frame = FrameHeader {
        length,
        keep_alive: false,
        binary,
        more: false,
    };
    out[start..start + FRAME_HEADER_SIZE].copy_from_slice(&frame.encode());
}

/// Appends the header line of a message, without a frame header.
pub fn append_line(out: &mut Vec<u8>, header: &Header<'_>) {
    header.append_to(out);
    out.push(b'\n');
}

/// Whose code an ERROR carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Origin {
    /// One of [`Code`].
    Server,
    /// The service's own.
    Service,
}

/// Payload of an ERROR, but for its timestamp.
#[derive(Debug, Clone)]
pub struct ErrorBody<'a> {
    /// What went wrong, for a program.
    pub code: Cow<'a, str>,
    /// What went wrong, for a person: the fact and the limit.
    pub message: Cow<'a, str>,
    /// Whose code it is.
    pub origin: Origin,
    /// More of it, as JSON.
    pub details: Option<Box<RawValue>>,
}

impl<'a> ErrorBody<'a> {
    /// An error of the server's without details.
    pub fn server(code: Code, message: impl Into<Cow<'a, str>>) -> Self {
        Self {
            code: Cow::Borrowed(code.as_str()),
            message: message.into(),
            origin: Origin::Server,
            details: None,
        }
    }

    /// Adds details.
    #[must_use]
    pub fn with_details(mut self, details: &serde_json::Value) -> Self {
        self.details = serde_json::value::to_raw_value(details).ok();
        self
    }
}

/// Appends an ERROR. `request` is the header of what it answers, or none
/// where no request can be named; `now` is the time that it carries.
///
/// # Panics
/// As [`write_head`].
pub fn write_error(
    out: &mut Vec<u8>,
    request: Option<&Header<'_>>,
    body: &ErrorBody<'_>,
    now: SystemTime,
) {
    let start = out.len();
    out.extend_from_slice(&[0; FRAME_HEADER_SIZE]);
    append_error(out, request, body, now);
    patch(out, start, 0, false);
}

/// Appends header line and payload of an ERROR, without a frame header.
pub fn append_error(
    out: &mut Vec<u8>,
    request: Option<&Header<'_>>,
    body: &ErrorBody<'_>,
    now: SystemTime,
) {
    // Writing to a vector can't fail.
    let _ = match request.map(|header| (header.topic, header.version, header.request_id)) {
        None => out.write_all(b"ERROR:system.error:1.0.0\n"),
        Some((topic, version, None)) => {
            writeln!(out, "ERROR:{}:{version}", topic.as_str())
        }
        Some((topic, version, Some(id))) => {
            writeln!(out, "ERROR:{}:{version}:{id}", topic.as_str())
        }
    };
    append_document(out, body, now);
}

/// Returns the payload of an ERROR: a JSON object.
#[must_use]
pub fn error_document(body: &ErrorBody<'_>, now: SystemTime) -> Vec<u8> {
    let mut document = Vec::new();
    append_document(&mut document, body, now);
    document
}

fn append_document(out: &mut Vec<u8>, body: &ErrorBody<'_>, now: SystemTime) {
    #[derive(Serialize)]
    struct Document<'a> {
        code: &'a str,
        message: &'a str,
        timestamp: String,
        origin: Origin,
        #[serde(skip_serializing_if = "Option::is_none")]
        details: Option<&'a RawValue>,
    }
    let ErrorBody {
        code,
        message,
        origin,
        details,
    } = body;
    let timestamp = humantime::format_rfc3339_millis(now).to_string();
    let document = Document {
        code,
        message,
        timestamp,
        origin: *origin,
        details: details.as_deref(),
    };
    // Strings and a checked JSON text can't fail to serialise into memory.
    let _ = serde_json::to_writer(out, &document);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, UNIX_EPOCH};

    #[test]
    fn the_seeds_request_to_the_byte() {
        let (header, payload) =
            Header::parse(b"REQUEST:service.action:1.0.0:req-uuid\n{\"data\":\"test\"}").unwrap();
        let mut out = Vec::new();
        write_message(
            &mut out,
            &header,
            Payload::Json(std::str::from_utf8(payload).unwrap()),
        );
        let expected =
            b"\0\0\0\x35\0\0\0\0REQUEST:service.action:1.0.0:req-uuid\n{\"data\":\"test\"}";
        assert_eq!(out, expected);
    }

    #[test]
    fn errors() {
        let (header, _) = Header::parse(b"REQUEST:a.b:1.2.3:7:p:100\n").unwrap();
        let now = UNIX_EPOCH + Duration::from_millis(1_769_517_296_789);
        let body = ErrorBody::server(Code::Timeout, "stopped")
            .with_details(&serde_json::json!({"phase": "call"}));
        let mut out = Vec::new();
        write_error(&mut out, Some(&header), &body, now);
        let text = String::from_utf8_lossy(&out[8..]);
        assert_eq!(
            text,
            "ERROR:a.b:1.2.3:7\n{\"code\":\"TIMEOUT\",\"message\":\"stopped\",\
             \"timestamp\":\"2026-01-27T12:34:56.789Z\",\"origin\":\"server\",\"details\":{\"phase\":\"call\"}}"
        );
        assert_eq!(
            u32::from_be_bytes(out[..4].try_into().unwrap()) as usize,
            out.len() - 8
        );

        out.clear();
        write_error(
            &mut out,
            None,
            &ErrorBody::server(Code::ServerBusy, "full"),
            now,
        );
        assert!(out[8..].starts_with(b"ERROR:system.error:1.0.0\n{\"code\":\"SERVER_BUSY\""));
        assert!(!String::from_utf8_lossy(&out).contains("details"));
    }
}
