//! A helper process that starts compile workers, so that the server itself
//! need not be able to start a program.
//!
//! The server starts `mb-server compile-helper` before its first thread and
//! before it gives up the right to start programs. Both hold one end of a
//! socket pair that keeps packets apart. The server sends a [`Request`] as
//! JSON, together with the three pipes of a worker; the helper starts the
//! worker on them, waits for its end and answers with an [`JobOutcome`]. There
//! is one request at a time. The helper reads nothing that comes from a
//! component. It ends, and with it a worker that runs, when the server's end of
//! the socket is closed.

use std::{
    io::{self, IoSlice, IoSliceMut, PipeReader, Read as _, Write as _},
    mem::MaybeUninit,
    os::unix::process::{CommandExt as _, ExitStatusExt as _},
    path::Path,
    process::{Child, Command, Stdio},
    sync::{Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fd::{AsFd, BorrowedFd, OwnedFd},
    io::Errno,
    net::{
        AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
        SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, send, sendmsg,
        socketpair,
        sockopt::{Timeout, set_socket_timeout},
    },
    process::{DumpableBehavior, Pid, PidfdFlags, pidfd_open, set_dumpable_behavior},
};
use serde::{Deserialize, Serialize};

use super::worker::CompileJob;
use crate::locks::lock;

/// This program, also where its file was replaced by a newer version.
pub const PROGRAM: &str = "/proc/self/exe";
/// Largest packet, in bytes.
const MAX_PACKET: usize = 4096;
/// Longest complaint of a worker that is read, in bytes.
const MAX_COMPLAINT: u64 = 2000;
/// How much later than the worker's deadline the helper's answer is given up.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often a worker is looked at where the kernel can't say that it ended.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// Asks for a worker.
#[derive(Debug, Serialize, Deserialize)]
struct Request {
    job: CompileJob,
    /// For the worker to end.
    timeout: Duration,
}

/// How a worker ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum JobOutcome {
    /// By itself, with this exit code.
    Exited(i32),
    /// By this signal.
    Killed(i32),
    /// It did not end in time.
    TimedOut,
    /// It could not be started, for this reason.
    NotStarted(String),
}

/// What came of a worker.
pub(super) struct JobResult {
    pub(super) outcome: JobOutcome,
    /// Its standard output, up to a limit.
    pub(super) output: Vec<u8>,
    /// Its standard error, up to a limit.
    pub(super) complaint: String,
}

/// The server's end.
#[derive(Debug)]
pub(super) struct Helper {
    /// None once the helper did not answer as it should.
    socket: Mutex<Option<OwnedFd>>,
    child: Child,
}

impl Helper {
    /// Starts the helper. What it inherits is the socket and nothing else that
    /// this program has opened.
    pub(super) fn start(program: &Path) -> io::Result<Self> {
        let kind = SocketType::SEQPACKET;
        let (own, other) = socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)?;
        let command = || -> io::Result<Command> {
            let mut command = Command::new(program);
            command.arg("compile-helper").env_clear().current_dir("/");
            command
                .stdin(Stdio::from(other.try_clone()?))
                .stdout(Stdio::null())
                .stderr(Stdio::null());
            Ok(command)
        };
        // Ctrl-C is for the server, which ends in order.
        let child = command()?.process_group(0).spawn().or_else(|error| {
            let child = command()?.spawn()?;
            tracing::warn!(
                "the processes that compile are in the process group of the server, so Ctrl-C ends them too: {error}"
            );
            Ok::<_, io::Error>(child)
        })?;
        Ok(Self {
            socket: Mutex::new(Some(own)),
            child,
        })
    }

    /// Has a worker do a job: gives it the input and takes what it writes, up
    /// to this many bytes.
    ///
    /// # Errors
    /// `NotConnected` if there is no helper any more; likewise if the system
    /// refuses a pipe or a thread.
    pub(super) fn work(
        &self,
        job: &CompileJob,
        input: &[u8],
        max_output: u64,
        timeout: Duration,
    ) -> io::Result<JobResult> {
        let mut socket = lock(&self.socket);
        run_worker(&mut socket, job, input, max_output, timeout)
    }
}

/// The helper can't be started again: the server has given that up.
fn gone() -> io::Error {
    let problem = "the process that starts compilers has ended; restart";
    io::Error::new(io::ErrorKind::NotConnected, problem)
}

impl Drop for Helper {
    fn drop(&mut self) {
        *self
            .socket
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner) = None;
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Takes the socket away from the request until its outcome: one that comes
/// late would be taken for the next one's. What fails before the request is
/// sent leaves the socket as it was.
fn run_worker(
    socket: &mut Option<OwnedFd>,
    job: &CompileJob,
    input: &[u8],
    max_output: u64,
    timeout: Duration,
) -> io::Result<JobResult> {
    let asked = socket.as_ref().ok_or_else(gone)?;
    let (stdin, mut give) = io::pipe()?;
    let (take, stdout) = io::pipe()?;
    let (stderr_reader, stderr) = io::pipe()?;
    let request = Request {
        job: job.clone(),
        timeout,
    };
    let request = serde_json::to_vec(&request)?;
    let patience = Some(timeout.saturating_add(PATIENCE));
    set_socket_timeout(asked, Timeout::Recv, patience)?;
    set_socket_timeout(asked, Timeout::Send, Some(PATIENCE))?;
    // It owns the worker's ends of the pipes: where a thread can't be started,
    // they are closed, and the threads before it end.
    thread::scope(move |scope| {
        let thread = |name: &str| thread::Builder::new().name(name.into());
        // A worker that ends early does not read to the end.
        thread("mb-compile-in").spawn_scoped(scope, move || give.write_all(input))?;
        let output =
            thread("mb-compile-out").spawn_scoped(scope, move || read(take, max_output))?;
        let complaint = thread("mb-compile-err")
            .spawn_scoped(scope, move || read(stderr_reader, MAX_COMPLAINT))?;
        let asked = socket.take().ok_or_else(gone)?;
        let pipes = [stdin.as_fd(), stdout.as_fd(), stderr.as_fd()];
        let sent = send_with(&asked, &request, pipes);
        // The worker alone holds the other ends, so that all of it ends with it.
        drop((stdin, stdout, stderr));
        let outcome = sent
            .and_then(|()| receive_outcome(&asked))
            .map_err(|error| io::Error::new(gone().kind(), format!("{}: {error}", gone())))?;
        *socket = Some(asked);
        let joined = |thread: thread::ScopedJoinHandle<'_, io::Result<Vec<u8>>>| {
            thread
                .join()
                .unwrap_or_else(|_| Err(io::ErrorKind::Other.into()))
        };
        let (output, complaint) = (joined(output)?, joined(complaint)?);
        Ok(JobResult {
            outcome,
            output,
            complaint: String::from_utf8_lossy(&complaint).trim().to_owned(),
        })
    })
}

/// Reads to the end, or to a limit; whoever writes more is ended by the pipe
/// that nobody reads any longer.
fn read(from: PipeReader, limit: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    from.take(limit).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn send_with(socket: &OwnedFd, packet: &[u8], pipes: [BorrowedFd<'_>; 3]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(&pipes)) {
        return Err(io::Error::other("no space for three pipes"));
    }
    let data = [IoSlice::new(packet)];
    sendmsg(socket, &data, &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

fn receive_outcome(socket: &OwnedFd) -> io::Result<JobOutcome> {
    let mut packet = [0; MAX_PACKET];
    let mut data = [IoSliceMut::new(&mut packet)];
    let mut nothing = RecvAncillaryBuffer::default();
    let got = retry(|| recvmsg(socket, &mut data, &mut nothing, RecvFlags::empty()))?.bytes;
    if got == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(serde_json::from_slice(&packet[..got])?)
}

fn retry<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> rustix::io::Result<T> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            result => return result,
        }
    }
}

/// What the helper process does, until the server closes its end of the socket
/// on standard input.
///
/// # Errors
/// The socket or a packet is not as it should be.
pub fn help() -> io::Result<()> {
    // Other processes of this user, the server among them, can't trace it.
    let _ = set_dumpable_behavior(DumpableBehavior::NotDumpable);
    let socket = io::stdin();
    while let Some((request, pipes)) = receive_request(socket.as_fd())? {
        let Some(outcome) = run(&request, pipes, socket.as_fd())? else {
            return Ok(());
        };
        let packet = serde_json::to_vec(&outcome)?;
        retry(|| send(&socket, &packet, SendFlags::NOSIGNAL))?;
    }
    Ok(())
}

/// None once the server has closed its end.
fn receive_request(socket: BorrowedFd<'_>) -> io::Result<Option<(Request, [OwnedFd; 3])>> {
    let mut packet = [0; MAX_PACKET];
    let mut data = [IoSliceMut::new(&mut packet)];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC;
    let got = retry(|| recvmsg(socket, &mut data, &mut control, flags))?.bytes;
    if got == 0 {
        return Ok(None);
    }
    let mut pipes = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            pipes.extend(rights);
        }
    }
    let pipes = <[OwnedFd; 3]>::try_from(pipes)
        .map_err(|_| io::Error::other("a request without its three pipes"))?;
    Ok(Some((serde_json::from_slice(&packet[..got])?, pipes)))
}

/// Starts a worker and waits for its end; none if the server has ended.
fn run(
    request: &Request,
    [stdin, stdout, stderr]: [OwnedFd; 3],
    socket: BorrowedFd<'_>,
) -> io::Result<Option<JobOutcome>> {
    let deadline = Instant::now() + request.timeout;
    let mut command = Command::new(PROGRAM);
    let job = serde_json::to_string(&request.job)?;
    command.args(["compile-worker", &job]);
    command.env_clear().current_dir("/");
    command.stdin(stdin).stdout(stdout).stderr(stderr);
    let started = command.spawn();
    // It holds the pipes, which are the worker's.
    drop(command);
    let child = match started {
        Ok(child) => ChildGuard(child),
        Err(error) => return Ok(Some(JobOutcome::NotStarted(error.to_string()))),
    };
    child.wait_until(deadline, socket)
}

/// A process that does not outlive the wait for it.
struct ChildGuard(Child);

impl ChildGuard {
    fn wait_until(
        mut self,
        deadline: Instant,
        socket: BorrowedFd<'_>,
    ) -> io::Result<Option<JobOutcome>> {
        // Old kernels and some containers have none.
        let end = pidfd_open(Pid::from_child(&self.0), PidfdFlags::empty()).ok();
        loop {
            if let Some(status) = self.0.try_wait()? {
                let killed = status.signal().map(JobOutcome::Killed);
                let exited = || JobOutcome::Exited(status.code().unwrap_or_default());
                return Ok(Some(killed.unwrap_or_else(exited)));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(Some(JobOutcome::TimedOut));
            }
            let pause = if end.is_some() {
                left
            } else {
                left.min(LOOK_EVERY)
            };
            let pause = Timespec::try_from(pause).map_err(io::Error::other)?;
            // There is one request at a time, so this is the server's end.
            let closed = PollFd::from_borrowed_fd(socket, PollFlags::IN);
            let mut events = vec![closed];
            events.extend(end.as_ref().map(|end| PollFd::new(end, PollFlags::IN)));
            if retry(|| poll(&mut events, Some(&pause))).is_err() {
                thread::sleep(LOOK_EVERY);
            } else if !events[0].revents().is_empty() {
                return Ok(None);
            }
        }
    }
}

impl Drop for ChildGuard {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
