//! HTTP/1.1: one request again and again, over connections that stay.

use std::{ops::Range, sync::Arc};

use super::protocol::{ParsedReply, Protocol, code_of};
use crate::wire::Payload;

/// Fields of a response at most.
const MAX_FIELDS: usize = 64;

/// A POST of one payload. Answers come in order.
#[derive(Debug, Clone)]
pub struct Http {
    request: Arc<[u8]>,
}

impl Http {
    /// One payload for one path, with a token where the server demands one.
    #[must_use]
    pub fn post(host: &str, path: &str, token: Option<&str>, payload: Payload<'_>) -> Self {
        let (media_type, body) = match payload {
            Payload::Json(text) => ("application/json", text.as_bytes()),
            Payload::Binary(bytes) => ("application/octet-stream", bytes),
        };
        let authorization = token.map(|token| format!("Authorization: Bearer {token}\r\n"));
        let head = format!(
            "POST {path} HTTP/1.1\r\nHost: {host}\r\n{}Content-Type: {media_type}\r\n\
             Content-Length: {}\r\n\r\n",
            authorization.unwrap_or_default(),
            body.len()
        );
        Self {
            request: [head.as_bytes(), body].concat().into(),
        }
    }
}

impl Protocol for Http {
    const IN_ORDER: bool = true;

    fn write_request(&mut self, _slot: usize, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.request);
    }

    fn parse_reply(&mut self, read: &[u8]) -> Result<Option<ParsedReply>, String> {
        let mut fields = [httparse::EMPTY_HEADER; MAX_FIELDS];
        let mut response = httparse::Response::new(&mut fields);
        let head = match response.parse(read) {
            Ok(httparse::Status::Complete(size)) => size,
            Ok(httparse::Status::Partial) => return Ok(None),
            Err(error) => return Err(format!("no response of HTTP: {error}")),
        };
        let status = response.code.unwrap_or_default();
        let Some(body) = body(response.headers, read, head)? else {
            return Ok(None);
        };
        let bytes = body.end;
        let refused = (!(200..300).contains(&status))
            .then(|| code_of(&read[body]).unwrap_or_else(|| format!("status {status}")));
        let closes = field(response.headers, "connection")
            .is_some_and(|value| value.eq_ignore_ascii_case(b"close"));
        match refused {
            Some(code) if closes => Err(format!("the server says {code}")),
            None if closes => Err("the server closes a connection".into()),
            refused => Ok(Some(ParsedReply {
                bytes,
                slot: None,
                refused,
            })),
        }
    }
}

fn field<'a>(fields: &[httparse::Header<'a>], name: &str) -> Option<&'a [u8]> {
    let field = fields
        .iter()
        .find(|field| field.name.eq_ignore_ascii_case(name));
    field.map(|field| field.value)
}

/// Where the body lies, with its coding; none if it is not whole.
fn body(
    fields: &[httparse::Header<'_>],
    read: &[u8],
    head: usize,
) -> Result<Option<Range<usize>>, String> {
    let is_whole = |end: usize| (end <= read.len()).then_some(head..end);
    if let Some(length) = field(fields, "content-length") {
        let length = std::str::from_utf8(length).ok();
        let end = length
            .and_then(|length| length.parse().ok())
            .and_then(|length| head.checked_add(length))
            .ok_or("a Content-Length that is no number")?;
        return Ok(is_whole(end));
    }
    if field(fields, "transfer-encoding").is_none() {
        return Err("a response without a length".into());
    }
    let mut at = head;
    while let Some(rest) = read.get(at..) {
        let (line, size) = match httparse::parse_chunk_size(rest) {
            Ok(httparse::Status::Complete(chunk)) => chunk,
            Ok(httparse::Status::Partial) => return Ok(None),
            Err(_) => return Err("a chunk without a size".into()),
        };
        // Behind a chunk, and behind the last one without trailers, is CR LF.
        let chunk = usize::try_from(size).ok();
        at = chunk
            .and_then(|chunk| at.checked_add(line)?.checked_add(chunk)?.checked_add(2))
            .ok_or("a chunk that is too large")?;
        if size == 0 {
            return Ok(is_whole(at));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn responses_are_found_in_any_pieces() {
        let ok = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n";
        let refusal = "HTTP/1.1 404 Not Found\r\n";
        for (response, refused) in [
            (format!("{ok}content-length: 3\r\n\r\n{{ }}"), None),
            (format!("{ok}Content-Length: 0\r\n\r\n"), None),
            (
                format!(
                    "{ok}Transfer-Encoding: chunked\r\n\r\n2;a=b\r\n{{}}\r\nA\r\n          \r\n0\r\n\r\n"
                ),
                None,
            ),
            (
                format!("{refusal}Content-Length: 25\r\n\r\n{{\"code\":\"NO_ROUTE_FOUND\"}}"),
                Some("NO_ROUTE_FOUND"),
            ),
            (
                format!("{refusal}Content-Length: 4\r\n\r\ngone"),
                Some("status 404"),
            ),
        ] {
            let mut http = Http::post("a", "/call/a.b", None, Payload::Json("1"));
            for cut in 0..response.len() {
                let reply = http.parse_reply(&response.as_bytes()[..cut]);
                assert_eq!(reply, Ok(None), "{response:?} up to {cut}");
            }
            let reply = http.parse_reply(format!("{response}rest").as_bytes());
            let expected = ParsedReply {
                bytes: response.len(),
                slot: None,
                refused: refused.map(str::to_owned),
            };
            assert_eq!(reply, Ok(Some(expected)), "{response:?}");
        }
    }

    #[test]
    fn what_ends_a_measurement_is_an_error() {
        for (response, expected) in [
            ("\0\0\0\x05ERROR", "no response of HTTP"),
            ("HTTP/1.1 200 OK\r\n\r\n", "without a length"),
            ("HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", "no number"),
            (
                "HTTP/1.1 401 Unauthorized\r\nConnection: close\r\nContent-Length: 23\r\n\r\n{\"code\":\"UNAUTHORIZED\"}",
                "UNAUTHORIZED",
            ),
            (
                "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n",
                "closes a connection",
            ),
            (
                "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nz\r\n",
                "without a size",
            ),
        ] {
            let mut http = Http::post("a", "/", None, Payload::Json("1"));
            let error = http.parse_reply(response.as_bytes()).unwrap_err();
            assert!(error.contains(expected), "{response:?}: {error}");
        }
    }
}
