//! The end of a connection: what the peer still sends is read and dropped
//! for a while, because closing a socket with unread bytes resets it, and
//! the peer would see the reset instead of the ERROR before it.

use std::{
    io::{self, Read as _},
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        mpsc::{Receiver, SyncSender, TryRecvError, sync_channel},
    },
    thread,
    time::{Duration, Instant},
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::transport::Socket;

/// How long a peer's bytes are dropped.
pub(super) const LINGER: Duration = Duration::from_secs(2);

/// Sockets that end at the same time; one more is closed at once.
const MAX_SOCKETS: usize = 1024;

/// How long a new socket may wait until it is looked at.
const ROUND: Timespec = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };

/// One thread that ends sockets, so that no other has to wait for it.
pub(super) struct Linger {
    sender: SyncSender<Socket>,
    open: Arc<Open>,
}

/// Sockets that were taken and have not ended.
#[derive(Default)]
struct Open {
    count: Mutex<usize>,
    none: Condvar,
}

impl Linger {
    /// Starts the thread. It ends with the handle.
    pub(super) fn start() -> io::Result<Self> {
        let (sender, receiver) = sync_channel(MAX_SOCKETS);
        let open = Arc::new(Open::default());
        let ending = Arc::clone(&open);
        thread::Builder::new().name("mb-linger".into()).spawn(move || run(&receiver, &ending))?;
        Ok(Self { sender, open })
    }

    /// Takes a socket that was half-closed.
    pub(super) fn take(&self, socket: Socket) {
        self.open.add(1);
        if self.sender.try_send(socket).is_err() {
            self.open.add(-1);
        }
    }

    /// Waits for all sockets to end.
    pub(super) fn wait_until_empty(&self, deadline: Instant) {
        let remaining = deadline.saturating_duration_since(Instant::now());
        let count = self.open.count.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = self.open.none.wait_timeout_while(count, remaining, |count| *count > 0);
    }
}

impl Open {
    fn add(&self, change: isize) {
        let mut count = self.count.lock().unwrap_or_else(PoisonError::into_inner);
        *count = count.saturating_add_signed(change);
        if *count == 0 {
            self.none.notify_all();
        }
    }
}

fn run(receiver: &Receiver<Socket>, open: &Open) {
    let mut sockets: Vec<(Socket, Instant)> = Vec::new();
    loop {
        if sockets.is_empty() {
            let Ok(socket) = receiver.recv() else { return };
            sockets.push(begin(socket));
        }
        while sockets.len() < MAX_SOCKETS {
            match receiver.try_recv() {
                Ok(socket) => sockets.push(begin(socket)),
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => return,
            }
        }
        let before = sockets.len();
        wait(&sockets);
        let now = Instant::now();
        sockets.retain(|(socket, deadline)| now < *deadline && drop_bytes(socket));
        open.add(-isize::try_from(before - sockets.len()).unwrap_or(0));
    }
}

fn begin(socket: Socket) -> (Socket, Instant) {
    let _ = socket.stream().set_nonblocking(true);
    (socket, Instant::now() + LINGER)
}

fn wait(sockets: &[(Socket, Instant)]) {
    let mut polled: Vec<_> = sockets.iter().map(|(socket, _)| PollFd::new(socket.stream(), PollFlags::IN)).collect();
    let _ = poll(&mut polled, Some(&ROUND));
}

/// Drops a bounded amount, so that no peer keeps the others waiting. False at
/// the end of the stream.
fn drop_bytes(socket: &Socket) -> bool {
    let mut waste = [0; 64 * 1024];
    for _ in 0..16 {
        match socket.stream().read(&mut waste) {
            Ok(0) => return false,
            Ok(_) => {}
            Err(error) => return matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted),
        }
    }
    true
}
