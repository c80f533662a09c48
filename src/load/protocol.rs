//! The protocol of a connection: this project's, and a trait for others that it
//! is compared with.

use crate::wire::{
    Payload, Version,
    frame::{FRAME_HEADER_SIZE, FrameHeader},
    message::write_message,
    {Header, Kind, Topic},
};

/// A whole answer at the beginning of what was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParsedReply {
    /// How many bytes it takes.
    pub bytes: usize,
    /// Which request it answers; none where answers come in order.
    pub slot: Option<usize>,
    /// The code of an ERROR.
    pub refused: Option<String>,
}

/// A protocol of requests and answers, all requests of one connection alike.
pub trait Protocol: Send {
    /// Answers come in the order of their requests and name none.
    const IN_ORDER: bool;

    /// Appends the request of a slot.
    fn write_request(&mut self, slot: usize, out: &mut Vec<u8>);

    /// Takes the first answer out of what was read; none if it is not whole.
    ///
    /// # Errors
    /// If this is no answer of this protocol.
    fn parse_reply(&mut self, read: &[u8]) -> Result<Option<ParsedReply>, String>;
}

/// This project's protocol.
#[derive(Debug, Clone)]
pub struct Frames {
    /// One request by slot, whose id is the slot's number.
    requests: Vec<Vec<u8>>,
}

impl Frames {
    /// One action with one payload, in so many slots.
    #[must_use]
    pub fn new(topic: Topic<'_>, version: Version, payload: Payload<'_>, depth: usize) -> Self {
        let request = |slot: usize| {
            let id = slot.to_string();
            let header = Header {
                kind: Kind::Request,
                topic,
                version,
                request_id: Some(&id),
                parent_request_id: None,
                timeout: None,
            };
            let mut frame = Vec::new();
            write_message(&mut frame, &header, payload);
            frame
        };
        Self {
            requests: (0..depth).map(request).collect(),
        }
    }
}

impl Protocol for Frames {
    const IN_ORDER: bool = false;

    fn write_request(&mut self, slot: usize, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.requests[slot]);
    }

    fn parse_reply(&mut self, read: &[u8]) -> Result<Option<ParsedReply>, String> {
        let Some((&head, rest)) = read.split_first_chunk::<FRAME_HEADER_SIZE>() else {
            return Ok(None);
        };
        let frame = FrameHeader::parse(head).map_err(|error| error.to_string())?;
        if frame.more {
            return Err("an answer in pieces is not measured".into());
        }
        let Some(body) = rest.get(..frame.length as usize) else {
            return Ok(None);
        };
        let line = body
            .iter()
            .position(|&byte| byte == b'\n')
            .map_or(body, |end| &body[..end]);
        let mut fields = line.split(|&byte| byte == b':');
        let kind = fields.next().unwrap_or_default();
        let id = fields
            .nth(2)
            .and_then(|id| std::str::from_utf8(id).ok()?.parse().ok());
        let refused =
            (kind == b"ERROR").then(|| code_of(&body[(line.len() + 1).min(body.len())..]));
        let refused = refused.map(|code| code.unwrap_or_else(|| "an ERROR without a code".into()));
        match (id, refused) {
            (None, Some(code)) => Err(format!("the server says {code}")),
            (None, None) => Err("an answer without the id of a request".into()),
            (slot, refused) => Ok(Some(ParsedReply {
                bytes: FRAME_HEADER_SIZE + body.len(),
                slot,
                refused,
            })),
        }
    }
}

/// The code of an ERROR object.
pub(super) fn code_of(payload: &[u8]) -> Option<String> {
    let body: serde_json::Value = serde_json::from_slice(payload).ok()?;
    Some(body["code"].as_str()?.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_found_by_their_slot_in_any_pieces() {
        let topic = Topic::parse("echo.say").unwrap();
        let mut frames = Frames::new(
            topic,
            Version {
                major: 1,
                minor: 0,
                patch: 0,
            },
            Payload::Json("1"),
            12,
        );
        let mut out = Vec::new();
        frames.write_request(11, &mut out);
        for cut in 0..out.len() {
            assert_eq!(frames.parse_reply(&out[..cut]), Ok(None));
        }
        let whole = out.len();
        out.extend_from_slice(b"rest");
        assert_eq!(
            frames.parse_reply(&out),
            Ok(Some(ParsedReply {
                bytes: whole,
                slot: Some(11),
                refused: None
            }))
        );
        let mut refusal = Vec::new();
        let body = b"ERROR:echo.say:1.0.0:3\n{\"code\":\"TIMEOUT\"}";
        refusal.extend_from_slice(&(body.len() as u32).to_be_bytes());
        refusal.extend_from_slice(&[0; 4]);
        refusal.extend_from_slice(body);
        let reply = frames.parse_reply(&refusal).unwrap().unwrap();
        assert_eq!(
            (reply.slot, reply.refused.as_deref()),
            (Some(3), Some("TIMEOUT"))
        );
        assert!(frames.parse_reply(b"HTTP/1.1 400 Bad Request\r\n").is_err());
    }
}
