//! A peer: what it has sent, what came back, and what should have.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use crate::{
    guests::Guests,
    http_peer,
    machine::LONGEST_WAIT,
    system::{self, Wire},
    wire::{
        Header, Incoming, Reassembly,
        frame::{FrameHeader, KEEPALIVE_FRAME},
    },
};

/// What closed a connection that speaks nothing yet.
const FRAME: &str = "a frame";

/// A peer, and what it knows.
pub struct Client {
    pub wire: Arc<Wire>,
    pub number: u64,
    /// What it has yet to send.
    pub unsent: Vec<u8>,
    /// Requests that were sent whole, by id; whether they are quick.
    pub asked: HashMap<String, bool>,
    pub order: Vec<String>,
    /// With the place in the stream where each ends.
    pub ends: Vec<(usize, String, bool)>,
    pub sent: usize,
    pub received: Received,
    /// What it has of WebSocket; none if it speaks frames or HTTP.
    pub websocket: Option<WebSocket>,
    pub answered: HashSet<String>,
    pub quick_answers: Vec<String>,
    pub keep_alives: (usize, usize),
    /// The code of the ERROR that closed it.
    pub closing: Option<String>,
    pub over: bool,
    /// It has ended its side, or is gone.
    pub shut: bool,
    pub gone: bool,
    /// It has sent what is no message.
    pub broken: bool,
}

/// What a peer has read and not understood yet, in the protocol that it speaks.
pub enum Received {
    Frames(Reassembly),
    Http {
        unread: Vec<u8>,
        /// Where in the stream each request begins, with its id.
        begins: Vec<(usize, String)>,
        /// The status of requests that call nobody, by id.
        statuses: HashMap<String, u16>,
    },
}

/// What a peer has received over WebSocket.
#[derive(Default)]
pub struct WebSocket {
    pub unread: Vec<u8>,
    pub is_open: bool,
    /// A close frame has come, or a response that opens none.
    pub is_closed: bool,
}

impl WebSocket {
    /// A masked frame; the mask is all zeros.
    pub fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![first];
        match u8::try_from(payload.len()) {
            Ok(length @ ..126) => frame.push(0x80 | length),
            _ => {
                frame.push(0xfe);
                frame.extend((payload.len() as u16).to_be_bytes());
            }
        }
        frame.extend([0; 4]);
        frame.extend(payload);
        frame
    }

    /// What has come, as frames of the wire protocol would have it.
    pub fn translate(&mut self, bytes: &[u8]) -> Vec<u8> {
        self.unread.extend(bytes);
        let mut frames = Vec::new();
        if !self.is_open {
            let head = self.unread.windows(4).position(|four| four == b"\r\n\r\n");
            let Some(end) = head else { return frames };
            self.is_open = self.unread.starts_with(b"HTTP/1.1 101 ");
            self.is_closed = !self.is_open;
            self.unread.drain(..end + 4);
        }
        while self.is_open {
            let (length, start) = match self.unread[..] {
                [_, 126, high, low, ..] => (usize::from(u16::from_be_bytes([high, low])), 4),
                [_, length @ ..126, ..] => (usize::from(length), 2),
                _ => break,
            };
            if self.unread.len() < start + length {
                break;
            }
            assert!(!self.is_closed, "something comes behind the close frame");
            let frame: Vec<_> = self.unread.drain(..start + length).collect();
            match frame[0] {
                0x81 => {
                    let header = FrameHeader {
                        length: length as u32,
                        binary: false,
                        more: false,
                        keep_alive: false,
                    };
                    frames.extend(header.encode());
                    frames.extend(&frame[start..]);
                }
                0x8a => frames.extend(KEEPALIVE_FRAME),
                0x88 => self.is_closed = true,
                first => panic!("{first:#x}"),
            }
        }
        frames
    }
}

impl Client {
    /// Whatever is whole.
    pub fn read(&mut self) {
        let Received::Frames(received) = &mut self.received else {
            return;
        };
        while let Some(incoming) = received.next().expect("frames") {
            assert!(
                self.closing.is_none(),
                "something comes behind the ERROR that closes"
            );
            let Incoming::Message { body, .. } = incoming else {
                self.keep_alives.1 += 1;
                continue;
            };
            let (header, payload) = Header::parse(body).expect("a header");
            let Some(id) = header.request_id else {
                let text = String::from_utf8_lossy(payload);
                self.closing = Some(text.into_owned());
                continue;
            };
            let id = id.to_owned();
            let quick = match self.asked.get(&id) {
                Some(quick) => *quick,
                // There was no memory for the rest of it.
                None => {
                    assert!(self.ends.iter().any(|(_, asked, _)| *asked == id));
                    assert!(String::from_utf8_lossy(payload).contains("nothing ran"));
                    continue;
                }
            };
            if quick {
                self.quick_answers.push(id.clone());
            }
            assert!(self.answered.insert(id.clone()), "{id} is answered twice");
        }
    }

    /// The same over HTTP.
    pub fn read_http(&mut self) {
        let Received::Http {
            unread, statuses, ..
        } = &mut self.received
        else {
            return;
        };
        // What closes a connection before its first byte is a frame.
        let is_frame = self.closing.as_deref() == Some(FRAME);
        if is_frame || unread.first() == Some(&0) && self.answered.is_empty() {
            self.closing = Some(FRAME.into());
            unread.clear();
        }
        while let Some(response) = http_peer::take(unread) {
            assert!(
                self.closing.is_none(),
                "something comes behind {:?}: {response:?}",
                self.closing
            );
            if response.status == 100 {
                continue;
            }
            if response.closes {
                self.closing = Some(format!("{response:?}"));
            }
            let Some(id) = response.id else {
                assert!(response.closes, "an answer to nobody: {response:?}");
                continue;
            };
            if let Some(status) = statuses.get(&id).filter(|_| response.status != 503) {
                assert_eq!(response.status, *status, "{id}");
            }
            if self.asked.contains_key(&id) {
                self.quick_answers.push(id.clone());
                assert!(self.answered.insert(id.clone()), "{id} is answered twice");
            } else {
                // It is refused before it was sent whole.
                assert!(self.ends.iter().any(|(_, asked, _)| *asked == id));
                assert!(response.closes, "{id} is answered before it was asked");
            }
        }
    }

    /// What is postponed is handled again in time.
    pub fn check_postponed(&self, guests: &Guests) {
        let now = system::now();
        for (id, until) in &*guests.postponed.lock().unwrap() {
            let is_late = *until + 2 * LONGEST_WAIT < now && self.asked.contains_key(id);
            assert!(!is_late, "{id} waits for too long");
        }
    }

    /// All that has arrived was handled, also behind slow calls; HTTP answers in
    /// order.
    pub fn check_handled(&self, guests: &Guests) {
        if !matches!(self.received, Received::Frames(_)) {
            return;
        }
        let handled = guests.handled.lock().unwrap();
        for id in self.asked.keys() {
            assert!(handled.contains(id), "{id} has arrived, and nobody looks");
        }
    }

    /// Requests over HTTP of which the server has read nothing.
    pub fn never_read(&self, id: &str) -> bool {
        let read = self.wire.read();
        let of = |(at, begun): &(usize, String)| begun == id && *at >= read;
        matches!(&self.received, Received::Http { begins, .. } if begins.iter().any(of))
    }

    /// A quiet connection of HTTP is closed without a word; one that was asked
    /// something is not.
    pub fn check_silence(&self, cut_off: bool) {
        let Received::Http { begins, .. } = &self.received else {
            return;
        };
        if self.over && self.closing.is_none() && !self.gone && !self.shut && !cut_off {
            let read = self.wire.read();
            let silent = begins
                .iter()
                .find(|(at, id)| *at < read && !self.answered.contains(id));
            assert!(
                silent.is_none(),
                "connection {}: closed without an answer to {silent:?}, {read} bytes read",
                self.number
            );
        }
    }

    /// What was asked is answered, unless one of the two has ended it.
    pub fn check(&self, guests: &Guests, cut_off: bool) {
        let quick: Vec<_> = self
            .order
            .iter()
            .filter(|id| self.asked[*id] && self.answered.contains(*id))
            .collect();
        assert!(
            quick.into_iter().eq(&self.quick_answers),
            "quick ones in another order: {:?}",
            self.quick_answers
        );
        self.check_silence(cut_off);
        let missing = self.missing(guests, cut_off);
        assert!(
            missing.is_empty(),
            "connection {}: not answered: {missing:?} of {:?}; {} unsent, {} unread, closing {:?}, {:?}",
            self.number,
            self.order,
            self.unsent.len(),
            self.wire.unread(),
            self.closing,
            (self.over, self.shut, self.broken)
        );
    }

    /// Requests that have no answer and should have one.
    pub fn missing(&self, guests: &Guests, cut_off: bool) -> Vec<String> {
        // One that was never opened, or is closed without an ERROR.
        let is_closed =
            |websocket: &WebSocket| websocket.is_closed || !websocket.is_open && self.over;
        let is_closed = self.websocket.as_ref().is_some_and(is_closed);
        if self.gone || cut_off && self.over && self.closing.is_none() {
            return Vec::new();
        }
        let begun = guests.begun.lock().unwrap();
        // Behind what closes, nothing was to begin.
        let waits = |id: &&String| {
            let is_due =
                self.closing.is_none() && !is_closed && !(self.over && self.never_read(id));
            (is_due || begun.contains(*id)) && !self.answered.contains(*id)
        };
        self.order.iter().filter(waits).cloned().collect()
    }
}
