//! The end of a connection: what the peer still sends is read and dropped
//! for a while, because closing a socket with unread bytes resets it, and
//! the peer would see the reset instead of the ERROR before it.

use std::{
    io::{self, Read as _},
    net::TcpStream,
    sync::{
        Arc,
        mpsc::{Receiver, SyncSender, TryRecvError, sync_channel},
    },
    thread,
    time::{Duration, Instant},
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::{
    budget::{Budget, Reservation},
    transport::Channel,
};

/// How long a peer's bytes are dropped.
pub const LINGER: Duration = Duration::from_secs(2);

/// Sockets that end at the same time; one more is closed at once. They are
/// open files besides those of the connections.
pub const MAX_ENDING: usize = 1024;

/// A pause where it fails, so that trying again does not keep a processor
/// busy.
const PAUSE: Duration = Duration::from_millis(10);

/// What is dropped in one read, in bytes, and how often one socket is read in
/// a round.
const WASTE_SIZE: usize = 64 * 1024;
const MAX_READS: usize = 16;

/// How long a new socket may wait until it is looked at.
const ROUND: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 20_000_000,
};

/// One thread that ends sockets, so that no other has to wait for it.
pub struct Linger {
    sender: SyncSender<(TcpStream, Reservation)>,
    open: Arc<Budget>,
}

/// A socket that ends, until when, and its part of what may.
type Ending = (TcpStream, Instant, Reservation);

impl Linger {
    /// Starts the thread, for so many sockets at the same time. It ends with
    /// the handle.
    ///
    /// # Errors
    /// If the system refuses a thread.
    pub fn start(limit: usize) -> io::Result<Self> {
        let (sender, receiver) = sync_channel(limit);
        thread::Builder::new()
            .name("mb-linger".into())
            .spawn(move || run(&receiver))?;
        let open = Budget::new(limit);
        Ok(Self { sender, open })
    }

    /// Ends a connection whose last bytes were written.
    pub fn take(&self, mut channel: Channel) {
        channel.half_close();
        let socket = channel.into_socket();
        let mut place = Reservation::empty(&self.open);
        // Those in the channel count as well, so it is never full.
        if place.raise_until(1, Instant::now()) {
            let _ = self.sender.try_send((socket, place));
        }
    }

    /// Waits for all sockets to end.
    pub fn wait_until_empty(&self, deadline: Instant) {
        let all = self.open.limit();
        Reservation::empty(&self.open).raise_until(all, deadline);
    }
}

fn run(receiver: &Receiver<(TcpStream, Reservation)>) {
    let mut sockets: Vec<Ending> = Vec::new();
    let mut waste = vec![0; WASTE_SIZE];
    loop {
        if sockets.is_empty() {
            let Ok(socket) = receiver.recv() else { return };
            sockets.push(begin(socket));
        }
        loop {
            match receiver.try_recv() {
                Ok(socket) => sockets.push(begin(socket)),
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => return,
            }
        }
        let mut ready = wait(&sockets).into_iter();
        let now = Instant::now();
        sockets.retain(|(socket, deadline, _)| {
            let ready = ready.next().unwrap_or(false);
            now < *deadline && (!ready || drop_bytes(socket, &mut waste))
        });
    }
}

fn begin((socket, place): (TcpStream, Reservation)) -> Ending {
    (socket, Instant::now() + LINGER, place)
}

/// Waits for a round at most; says of each socket whether there is something
/// to read, its end included.
fn wait(sockets: &[Ending]) -> Vec<bool> {
    let mut polled: Vec<_> = sockets
        .iter()
        .map(|(socket, ..)| PollFd::new(socket, PollFlags::IN))
        .collect();
    if poll(&mut polled, Some(&ROUND)).is_err() {
        thread::sleep(PAUSE);
    }
    polled
        .iter()
        .map(|socket| !socket.revents().is_empty())
        .collect()
}

/// Drops a bounded amount, so that no peer keeps the others waiting. False at
/// the end of the stream.
fn drop_bytes(mut socket: &TcpStream, waste: &mut [u8]) -> bool {
    for _ in 0..MAX_READS {
        match socket.read(waste) {
            Ok(0) => return false,
            Ok(_) => {}
            Err(error) => {
                return matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                );
            }
        }
    }
    true
}
