//! The protocols of the others, as far as one request and its answer go.

use mb_server::load::{Frames, Http, ParsedReply, Protocol};

/// Any of them.
#[derive(Clone)]
pub enum Any {
    /// This project's.
    Frames(Frames),
    /// Redis: a function of Lua with the payload as its argument.
    Redis(Vec<u8>),
    /// NATS: a request with an inbox of its own for each slot.
    Nats {
        payload: Vec<u8>,
        connection: usize,
        greeted: bool,
    },
    /// HTTP/1.1 with connections that stay.
    Http(Http),
}

impl Any {
    pub fn redis(payload: &[u8]) -> Self {
        let mut request = format!(
            "*4\r\n$5\r\nFCALL\r\n$4\r\nwrap\r\n$1\r\n0\r\n${}\r\n",
            payload.len()
        )
        .into_bytes();
        request.extend_from_slice(payload);
        request.extend_from_slice(b"\r\n");
        Self::Redis(request)
    }

    fn take(&self, read: &[u8]) -> Result<Option<(usize, Option<usize>)>, String> {
        let said = || String::from_utf8_lossy(&read[..read.len().min(200)]).into_owned();
        match self {
            Self::Frames(_) | Self::Http(_) => Err("answered elsewhere".into()),
            Self::Redis(_) => {
                let Some(line) = line(read) else {
                    return Ok(None);
                };
                let size: usize = text(&read[..line])
                    .strip_prefix('$')
                    .and_then(|n| n.parse().ok())
                    .ok_or_else(said)?;
                Ok(Some((line + 2 + size + 2, None)))
            }
            // MSG _I.<connection>.<slot> <sid> <size>
            Self::Nats { .. } => {
                let Some(end) = line(read) else {
                    return Ok(None);
                };
                // Asked a moment after connecting, and let us off without an answer.
                if read.starts_with(b"PING") {
                    let next = self.take(&read[end + 2..])?;
                    return Ok(next.map(|(bytes, slot)| (bytes + end + 2, slot)));
                }
                let mut words = text(&read[..end]).split(' ');
                let inbox = words.nth(1).ok_or_else(said)?;
                let slot = inbox
                    .rsplit('.')
                    .next()
                    .and_then(|slot| slot.parse().ok())
                    .ok_or_else(said)?;
                let size: usize = words
                    .next_back()
                    .and_then(|size| size.parse().ok())
                    .ok_or_else(said)?;
                Ok(Some((end + 2 + size + 2, Some(slot))))
            }
        }
    }
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap_or_default()
}

/// Where the first line ends.
fn line(read: &[u8]) -> Option<usize> {
    read.windows(2).position(|pair| pair == b"\r\n")
}

/// In turn or not is a matter of the protocol, so there are two kinds.
#[derive(Clone)]
pub struct InOrder(pub Any);

/// Answers name their request.
#[derive(Clone)]
pub struct Named(pub Any);

impl Protocol for InOrder {
    const IN_ORDER: bool = true;

    fn write_request(&mut self, slot: usize, out: &mut Vec<u8>) {
        match &mut self.0 {
            Any::Redis(request) => out.extend_from_slice(request),
            Any::Http(http) => http.write_request(slot, out),
            Any::Frames(_) | Any::Nats { .. } => {}
        }
    }

    fn parse_reply(&mut self, read: &[u8]) -> Result<Option<ParsedReply>, String> {
        if let Any::Http(http) = &mut self.0 {
            return http.parse_reply(read);
        }
        reply(&self.0, read)
    }
}

impl Protocol for Named {
    const IN_ORDER: bool = false;

    fn write_request(&mut self, slot: usize, out: &mut Vec<u8>) {
        match &mut self.0 {
            Any::Frames(frames) => frames.write_request(slot, out),
            Any::Nats {
                payload,
                connection,
                greeted,
            } => {
                if !std::mem::replace(greeted, true) {
                    out.extend_from_slice(format!("SUB _I.{connection}.* 1\r\n").as_bytes());
                }
                out.extend_from_slice(
                    format!("PUB wrap _I.{connection}.{slot} {}\r\n", payload.len()).as_bytes(),
                );
                out.extend_from_slice(payload);
                out.extend_from_slice(b"\r\n");
            }
            Any::Redis(_) | Any::Http(_) => {}
        }
    }

    fn parse_reply(&mut self, read: &[u8]) -> Result<Option<ParsedReply>, String> {
        if let Any::Frames(frames) = &mut self.0 {
            return frames.parse_reply(read);
        }
        reply(&self.0, read)
    }
}

fn reply(any: &Any, read: &[u8]) -> Result<Option<ParsedReply>, String> {
    let Some((bytes, slot)) = any.take(read)? else {
        return Ok(None);
    };
    Ok((bytes <= read.len()).then_some(ParsedReply {
        bytes,
        slot,
        refused: None,
    }))
}
