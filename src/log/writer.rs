//! Standard error behind a bounded queue, so that logging never waits for the
//! reader of the log.

use std::{
    collections::VecDeque,
    io::{self, Write},
    os::fd::AsFd as _,
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, poll},
    io::Errno,
};

use crate::locks::lock;

/// Lines that wait to be written.
const MAX_LINES: usize = 8192;
/// Bytes of all lines that wait to be written.
const MAX_BYTES: usize = 1024 * 1024;
/// Longest line, in bytes; the rest of a longer one is cut off.
const MAX_LINE: usize = 64 * 1024;
/// Bytes that are handed to the system at once, unless one line is longer.
const MAX_WRITE: usize = 64 * 1024;
/// How a line that was cut off ends.
const CUT_OFF: &[u8] = b" ... cut off\n";

/// Lines on their way to a sink that may block. One thread writes them, in
/// order; what finds the queue full is dropped and counted.
#[derive(Default)]
pub(super) struct Writer {
    queue: Mutex<Queue>,
    /// A line came.
    filled: Condvar,
    /// All lines were written.
    drained: Condvar,
    /// Lines that were never written, since the start.
    dropped: AtomicU64,
}

#[derive(Default)]
struct Queue {
    lines: VecDeque<Vec<u8>>,
    /// Of `lines`.
    bytes: usize,
    /// The thread is writing what it took from `lines`.
    writing: bool,
    /// Lines that were dropped since the last note.
    unreported: u64,
}

impl Writer {
    /// Starts the thread that writes to `sink` for as long as the process
    /// runs. After lines were dropped, and once the sink takes lines again,
    /// `report` gets their number.
    ///
    /// # Errors
    /// If the thread can't be started.
    pub(super) fn start(
        mut sink: impl Write + Send + 'static,
        report: impl Fn(u64) + Send + 'static,
    ) -> io::Result<Arc<Self>> {
        let writer = Arc::new(Self::default());
        let writing = Arc::clone(&writer);
        let run = move || {
            loop {
                let (bytes, lines) = writing.take();
                let result = sink.write_all(&bytes).and_then(|()| sink.flush());
                if let Some(dropped) = writing.written(lines, result.is_ok()) {
                    report(dropped);
                }
            }
        };
        thread::Builder::new().name("mb-log".into()).spawn(run)?;
        Ok(writer)
    }

    /// Queues a line, which ends with a line feed, or drops it. Never waits.
    pub(super) fn push(&self, line: &[u8]) {
        let mut queue = lock(&self.queue);
        let length = line.len().min(MAX_LINE);
        if queue.lines.len() >= MAX_LINES || queue.bytes + length > MAX_BYTES {
            queue.unreported += 1;
            self.dropped.fetch_add(1, Relaxed);
            return;
        }
        let line = if line.len() > MAX_LINE {
            [&line[..MAX_LINE - CUT_OFF.len()], CUT_OFF].concat()
        } else {
            line.to_vec()
        };
        queue.bytes += length;
        queue.lines.push_back(line);
        drop(queue);
        self.filled.notify_one();
    }

    /// Waits until everything that was queued is written, no longer than
    /// `within`.
    pub(super) fn flush(&self, within: Duration) {
        let pending = |queue: &mut Queue| queue.writing || !queue.lines.is_empty();
        drop(
            self.drained
                .wait_timeout_while(lock(&self.queue), within, pending),
        );
    }

    /// Lines that were dropped since the start.
    pub(super) fn dropped(&self) -> u64 {
        self.dropped.load(Relaxed)
    }

    /// Waits for lines and takes as many as are written at once.
    fn take(&self) -> (Vec<u8>, u64) {
        let mut queue = self
            .filled
            .wait_while(lock(&self.queue), |queue| queue.lines.is_empty())
            .unwrap_or_else(PoisonError::into_inner);
        let (mut bytes, mut lines) = (Vec::new(), 0);
        while let Some(line) = queue
            .lines
            .pop_front_if(|line| lines == 0 || bytes.len() + line.len() <= MAX_WRITE)
        {
            queue.bytes -= line.len();
            bytes.extend(line);
            lines += 1;
        }
        queue.writing = true;
        (bytes, lines)
    }

    /// Notes what became of the lines that were taken. Returns how many were
    /// dropped, if that is to be reported now.
    fn written(&self, lines: u64, succeeded: bool) -> Option<u64> {
        let mut queue = lock(&self.queue);
        queue.writing = false;
        if queue.lines.is_empty() {
            self.drained.notify_all();
        }
        if !succeeded {
            queue.unreported += lines;
            self.dropped.fetch_add(lines, Relaxed);
            return None;
        }
        // The note needs room too, and there is one for each half of a queue.
        let flows = queue.bytes <= MAX_BYTES / 2 && queue.lines.len() <= MAX_LINES / 2;
        let dropped = if flows {
            std::mem::take(&mut queue.unreported)
        } else {
            0
        };
        (dropped > 0).then_some(dropped)
    }
}

/// Standard error without the lock of [`io::stderr`], which a blocked write
/// would hold. Waits where somebody else made it non-blocking.
pub(super) struct StandardError;

impl Write for StandardError {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let stderr = io::stderr();
        loop {
            match rustix::io::write(stderr.as_fd(), bytes) {
                Err(Errno::AGAIN) => {
                    let _ = poll(&mut [PollFd::new(&stderr, PollFlags::OUT)], None);
                }
                result => return Ok(result?),
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read as _, pipe},
        sync::mpsc,
    };

    use super::*;

    /// What is written to the sink, and what is reported.
    fn start(sink: impl Write + Send + 'static) -> (Arc<Writer>, mpsc::Receiver<u64>) {
        let (sender, reports) = mpsc::channel();
        let writer = Writer::start(sink, move |dropped| {
            sender.send(dropped).unwrap_or_default()
        })
        .unwrap();
        (writer, reports)
    }

    #[test]
    fn lines_that_nobody_reads_are_dropped_counted_and_reported() {
        const LINES: usize = 20_000;
        let (mut reader, sink) = pipe().unwrap();
        let (writer, reports) = start(sink);
        for number in 0..LINES {
            writer.push(format!("{number:0>99}\n").as_bytes());
        }
        writer.flush(Duration::from_millis(1));
        let dropped = writer.dropped() as usize;
        // A pipe and two queues of 100 bytes each are less than half of them.
        assert!(dropped > LINES / 2, "{dropped}");
        let mut read = vec![0; (LINES - dropped) * 100];
        reader.read_exact(&mut read).unwrap();
        let text = String::from_utf8(read).unwrap();
        let numbers = text.lines().map(|line| line.parse::<usize>().unwrap());
        assert!(numbers.is_sorted(), "those that were kept are in order");
        assert_eq!(reports.recv().unwrap() as usize, dropped);
        assert!(reports.try_recv().is_err(), "they are reported once");
        writer.push(b"more\n");
        writer.flush(Duration::from_secs(30));
        let mut more = [0; 5];
        reader.read_exact(&mut more).unwrap();
        assert_eq!((&more, writer.dropped() as usize), (b"more\n", dropped));
    }

    #[test]
    fn a_sink_that_fails_drops_lines_and_reports_them_when_it_works_again() {
        struct Flaky(u32);
        impl Write for Flaky {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                self.0 += 1;
                if self.0 == 1 {
                    Err(io::ErrorKind::StorageFull.into())
                } else {
                    Ok(bytes.len())
                }
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let (writer, reports) = start(Flaky(0));
        for line in ["one\n", "two\n"] {
            writer.push(line.as_bytes());
            writer.flush(Duration::from_secs(30));
        }
        assert_eq!((reports.recv().unwrap(), writer.dropped()), (1, 1));
    }

    #[test]
    fn a_line_without_end_is_cut_off() {
        let (mut reader, sink) = pipe().unwrap();
        let (writer, _reports) = start(sink);
        writer.push(&vec![b'x'; MAX_BYTES * 2]);
        let mut line = vec![0; MAX_LINE];
        reader.read_exact(&mut line).unwrap();
        assert!(line.ends_with(b"x ... cut off\n"));
        writer.flush(Duration::from_secs(30));
        assert_eq!(writer.dropped(), 0);
    }
}
