//! Tells what happens to sockets.

use std::{
    io::{self, PipeReader, PipeWriter, Read as _, Write as _, pipe},
    thread,
    time::Duration,
};

use rustix::{
    event::{
        Timespec,
        epoll::{self, CreateFlags, Event, EventData, EventFlags},
    },
    fd::OwnedFd,
    io::{Errno, ioctl_fionbio},
};

use super::Channel;
use crate::log::Limiter;

/// Most events at once.
const MOST: usize = 4;
/// A pause where it fails, so that who tries again does not keep a processor
/// busy.
const PAUSE: Duration = Duration::from_millis(5);

/// Arrivals, ends and room for writing are each told once.
const INTEREST: EventFlags = EventFlags::IN
    .union(EventFlags::OUT)
    .union(EventFlags::RDHUP)
    .union(EventFlags::ET);

/// Told for a poke; slots are smaller.
const WAKE: u64 = u64::MAX;

const NOTHING: Event = Event {
    flags: EventFlags::empty(),
    data: EventData::new_u64(0),
};

/// What has happened to the socket of a slot.
#[derive(Debug, Clone, Copy)]
pub struct Ready {
    /// Its number.
    pub slot: usize,
    /// There may be something to read.
    pub readable: bool,
    /// There may be room to write.
    pub writable: bool,
    /// The peer has ended the stream, or the connection.
    pub ended: bool,
}

/// Tells what happens to sockets, each time once and to one who waits.
#[derive(Debug)]
pub struct Epoll {
    epoll: OwnedFd,
    /// There is no system without pipes.
    wake: (PipeReader, PipeWriter),
}

impl Epoll {
    /// # Errors
    /// If the system has none.
    pub fn new() -> io::Result<Self> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        let wake = pipe()?;
        ioctl_fionbio(&wake.0, true)?;
        ioctl_fionbio(&wake.1, true)?;
        let interest = EventFlags::IN | EventFlags::ET;
        epoll::add(&epoll, &wake.0, EventData::new_u64(WAKE), interest)?;
        // A system that refuses to wait is found out now, not by those who call.
        let mut none = [NOTHING];
        match epoll::wait(&epoll, &mut none, Some(&Timespec::default())) {
            Ok(_) | Err(Errno::INTR) => Ok(Self { epoll, wake }),
            Err(error) => Err(error.into()),
        }
    }

    /// Tells what happens to this socket from now on, and what has by now.
    ///
    /// # Errors
    /// If the system watches as many as it may.
    pub fn add(&self, channel: &Channel, slot: usize) -> io::Result<()> {
        let data = EventData::new_u64(slot as u64);
        Ok(epoll::add(&self.epoll, channel.socket(), data, INTEREST)?)
    }

    /// Tells nothing of a socket until [`Epoll::resume`], but for its failure.
    /// What it takes of the system stays, so that resuming can't be refused.
    pub fn pause(&self, channel: &Channel, slot: usize) {
        let data = EventData::new_u64(slot as u64);
        let _ = epoll::modify(&self.epoll, channel.socket(), data, EventFlags::ET);
    }

    /// Tells again, and what has happened by now.
    pub fn resume(&self, channel: &Channel, slot: usize) {
        let data = EventData::new_u64(slot as u64);
        let _ = epoll::modify(&self.epoll, channel.socket(), data, INTEREST);
    }

    /// Tells nothing more of a socket that somebody else goes on with.
    pub fn forget(&self, channel: &Channel) {
        let _ = epoll::delete(&self.epoll, channel.socket());
    }

    /// Waits until something has happened, or for so long. Appends up to `most`
    /// sockets, four at most. Says whether it was [woken](Epoll::wake).
    pub fn wait(&self, ready: &mut Vec<Ready>, most: usize, timeout: Duration) -> bool {
        let mut events = [NOTHING; MOST];
        let timeout = Timespec::try_from(timeout).ok();
        let count = epoll::wait(&self.epoll, &mut events[..most.min(MOST)], timeout.as_ref());
        let count = count.unwrap_or_else(|error| {
            // It worked at the start, so it may again.
            if error != Errno::INTR {
                static LINES: Limiter = Limiter::new();
                if LINES.allows("epoll fails") {
                    tracing::error!("connections are served late, epoll fails: {error}");
                }
                thread::sleep(PAUSE);
            }
            0
        });
        let mut is_woken = false;
        ready.extend(events[..count].iter().filter_map(|event| {
            let (flags, data) = (event.flags, event.data.u64());
            let ended = flags.intersects(EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR);
            if data == WAKE {
                is_woken = true;
                // So that there is room for more.
                while (&self.wake.0)
                    .read(&mut [0; 64])
                    .is_ok_and(|count| count > 0)
                {}
            }
            (data != WAKE).then_some(Ready {
                slot: data as usize,
                readable: ended || flags.contains(EventFlags::IN),
                writable: ended || flags.contains(EventFlags::OUT),
                ended,
            })
        }));
        is_woken
    }

    /// One of those who wait looks whether there is something else to do.
    pub fn wake(&self) {
        let _ = (&self.wake.1).write(&[0]);
    }
}
