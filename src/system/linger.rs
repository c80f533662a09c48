//! The end of a connection: what the peer still sends is read and dropped
//! for a while, because closing a socket with unread bytes resets it, and
//! the peer would see the reset instead of the ERROR before it.

use std::{
    io::{self, Read as _},
    net::TcpStream,
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        mpsc::{Receiver, SyncSender, TryRecvError, sync_channel},
    },
    thread,
    time::{Duration, Instant},
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::transport::Channel;

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
    sender: SyncSender<TcpStream>,
    open: Arc<Open>,
}

/// Sockets that were taken and have not ended.
struct Open {
    limit: usize,
    count: Mutex<usize>,
    none: Condvar,
}

impl Linger {
    /// Starts the thread, for so many sockets at the same time. It ends with
    /// the handle.
    ///
    /// # Errors
    /// If the system refuses a thread.
    pub fn start(limit: usize) -> io::Result<Self> {
        let (sender, receiver) = sync_channel(limit);
        let open = Arc::new(Open {
            limit,
            count: Mutex::default(),
            none: Condvar::new(),
        });
        let ending = Arc::clone(&open);
        thread::Builder::new()
            .name("mb-linger".into())
            .spawn(move || run(&receiver, &ending))?;
        Ok(Self { sender, open })
    }

    /// Ends a connection whose last bytes were written.
    pub fn take(&self, mut channel: Channel) {
        channel.half_close();
        let socket = channel.into_socket();
        // Those in the channel count as well, so it is never full.
        if self.open.begin() && self.sender.try_send(socket).is_err() {
            self.open.end(1);
        }
    }

    /// Waits for all sockets to end.
    pub fn wait_until_empty(&self, deadline: Instant) {
        let remaining = deadline.saturating_duration_since(Instant::now());
        let count = self
            .open
            .count
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let _ = self
            .open
            .none
            .wait_timeout_while(count, remaining, |count| *count > 0);
    }
}

impl Open {
    /// One more, if there is room.
    fn begin(&self) -> bool {
        let mut count = self.count.lock().unwrap_or_else(PoisonError::into_inner);
        let has_slot = *count < self.limit;
        *count += usize::from(has_slot);
        has_slot
    }

    fn end(&self, ended: usize) {
        let mut count = self.count.lock().unwrap_or_else(PoisonError::into_inner);
        *count = count.saturating_sub(ended);
        if *count == 0 {
            self.none.notify_all();
        }
    }
}

fn run(receiver: &Receiver<TcpStream>, open: &Open) {
    let mut sockets: Vec<(TcpStream, Instant)> = Vec::new();
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
        let before = sockets.len();
        let mut ready = wait(&sockets).into_iter();
        let now = Instant::now();
        sockets.retain(|(socket, deadline)| {
            let ready = ready.next().unwrap_or(false);
            now < *deadline && (!ready || drop_bytes(socket, &mut waste))
        });
        open.end(before - sockets.len());
    }
}

fn begin(socket: TcpStream) -> (TcpStream, Instant) {
    (socket, Instant::now() + LINGER)
}

/// Waits for a round at most; says of each socket whether there is something
/// to read, its end included.
fn wait(sockets: &[(TcpStream, Instant)]) -> Vec<bool> {
    let mut polled: Vec<_> = sockets
        .iter()
        .map(|(socket, _)| PollFd::new(socket, PollFlags::IN))
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
