//! Reads and writes of one system call, and waiting until one is worth it.

use std::{io, net::TcpStream, time::Instant};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::{Errno, retry_on_intr},
    net::{RecvFlags, SendFlags},
};

/// What a read has found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Received {
    /// So many bytes, and whether there may be more just now.
    Bytes {
        /// None where all that has come was not data.
        count: usize,
        /// False once all that had arrived was taken.
        more: bool,
    },
    /// Nothing for now.
    Nothing,
    /// The peer has ended the stream.
    End,
}

/// Writes never wait, and cause no signal where the peer is gone.
const SEND_FLAGS: SendFlags = SendFlags::NOSIGNAL.union(SendFlags::DONTWAIT);

/// Reads what is there. Without `DONTWAIT` among the flags it waits as the socket
/// is set to.
pub(super) fn receive(
    socket: &TcpStream,
    buf: &mut [u8],
    flags: RecvFlags,
) -> io::Result<Received> {
    match retry_on_intr(|| rustix::net::recv(socket, &mut *buf, flags)) {
        Ok((_, 0)) => Ok(Received::End),
        // A read that leaves room has taken all that was there.
        Ok((_, count)) => Ok(Received::Bytes {
            count,
            more: count == buf.len(),
        }),
        Err(Errno::AGAIN) => Ok(Received::Nothing),
        Err(error) => Err(error.into()),
    }
}

/// Writes what there is room for; 0 for none.
pub(super) fn send(socket: &TcpStream, buf: &[u8]) -> io::Result<usize> {
    match retry_on_intr(|| rustix::net::send(socket, buf, SEND_FLAGS)) {
        Err(Errno::AGAIN) => Ok(0),
        result => Ok(result?),
    }
}

/// Waits until a read or a write is worth trying.
///
/// # Errors
/// `TimedOut` at the deadline; else what the system says.
pub(super) fn wait(socket: &TcpStream, interest: PollFlags, deadline: Instant) -> io::Result<()> {
    let ready = retry_on_intr(|| {
        let remaining = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(remaining).map_err(|_| Errno::INVAL)?;
        poll(&mut [PollFd::new(socket, interest)], Some(&timeout))
    })?;
    if ready == 0 {
        return Err(io::ErrorKind::TimedOut.into());
    }
    Ok(())
}
