#!/usr/bin/env python3
"""Deliberate defects of the server's core and of the scheduler, each of which the simulation must find.

    python3 tests/simulation/mutants.py [NUMBER ...]

Copies the tree to `target/mutants/simulation`, gives the simulation copies of
`src/server` and `src/scheduler` of its own, plants one defect at a time there, and runs 40,000
seeds (or MB_SEEDS); without NUMBER none first. Prints a row for each: number, file, what it is, the
message that found it, seed, seconds with compilation. Exits 1 where a defect
is not found, or its text is no longer in the source. Some twelve minutes; the
first run compiles all that the server needs.
"""

import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
COPY = ROOT / "target/mutants/simulation"
SERVER = COPY / "tests/simulation/server"
SEEDS = os.environ.get("MB_SEEDS", "40000")
# Seconds for the seeds of one.
TIMEOUT = 180

# File, what it is, text, what replaces it. Each text is there once.
MUTANTS = [
    # Events.
    ("poller.rs", "events of its owner's time are ignored when it is parked",
     "let goes_on = goes_on || !inner.events.is_none();", "let goes_on = goes_on && true;"),
    ("poller.rs", "events are dropped while somebody has the connection",
     "        inner.events.add(events);\n        let connection = inner.connection.take()?;",
     "        let connection = inner.connection.take()?;\n        inner.events.add(events);"),
    ("poller.rs", "who delivers an event from elsewhere wakes nobody",
     "            self.queue.push(slot);\n            self.epoll.wake();", "            self.queue.push(slot);"),
    ("poller.rs", "who is parked with something to do is not queued",
     "        if goes_on {\n            self.queue.push(slot);\n        }\n        if is_new",
     "        if is_new"),
    # Deadlines.
    ("poller.rs", "the deadline is not laid",
     "        parking_slot.due.store(due, SeqCst);\n", ""),
    ("poller.rs", "a sooner deadline is not the earliest",
     "due < self.earliest.load(SeqCst) && due < self.earliest.fetch_min(due, SeqCst)",
     "due < self.earliest.load(SeqCst)"),
    ("poller.rs", "a sweep loses the earliest of those that remain",
     "                earliest = earliest.min(due);\n", ""),
    ("poller.rs", "a sweep overwrites what was laid meanwhile",
     "self.earliest.fetch_min(earliest, SeqCst);", "self.earliest.store(earliest, SeqCst);"),
    ("poller.rs", "a sweep forgets to queue whom it has found",
     "                drop(inner);\n                self.queue.push(slot);\n            }\n        }\n        self.earliest",
     "            }\n        }\n        self.earliest"),
    # What is postponed.
    ("poller.rs", "what is postponed is not queued",
     "            self.postponed.push(slot);\n", ""),
    ("poller.rs", "what was postponed once is never queued again",
     "            inner.is_postponed = false;\n", ""),
    ("poller.rs", "capacity for a call is notified to nobody",
     "        if !self.postponed.is_empty() {\n            self.wake();\n        }", ""),
    ("workers.rs", "a call that has begun counts as one that waits",
     "            self.shared.waiting.fetch_sub(1, SeqCst);\n", ""),
    ("connection/machine/deadlines.rs", "a postponed call has no deadline",
     "return postponed.map(|postponed| (postponed.until, Late::Postponed));", "return postponed.and(None);"),
    ("connection/machine.rs", "a message that was postponed is begun twice",
     "if let Some(message) = self.postponed.take()", "if let Some(message) = self.postponed.clone()"),
    ("connection/machine.rs", "a postponed message is forgotten behind a write",
     "        if self.postponed.is_some() {\n            self.state = State::Postponed;\n        } else if matches!",
     "        if matches!"),
    # Who polls.
    ("poller.rs", "the reserve is not woken",
     "            self.reserve.wake();\n", ""),
    ("workers.rs", "a worker that is back counts as absent",
     "            self.is_absent.store(false, Relaxed);\n            self.shared.poller.is_back();\n",
     "            self.is_absent.store(false, Relaxed);\n"),
    ("workers.rs", "who goes into a call passes no wake-up on",
     "        if !is_replaced && (wake || has_become_absent) {\n            self.shared.poller.wake();\n        }",
     "        let _ = (is_replaced, wake, has_become_absent);"),
    ("workers.rs", "the reserve leaves behind what it has queued",
     "                // A worker that is back takes what the reserve has left.\n                poller.wake();\n", ""),
    ("workers.rs", "who ends after parking wakes nobody",
     "self.park(connection?) && !self.goes_on()",
     "self.park(connection?) && false"),
    # Answers.
    ("workers.rs", "the connection is not notified of a late answer",
     "        self.shared.poller.take_with(peer.slot(), Events::ANSWER)\n    }\n\n    /// Whether the connection",
     "        None\n    }\n\n    /// Whether the connection"),
    ("connection/mod.rs", "late answers are not collected",
     "            self.machine.collect_late(&self.peer, now);\n", ""),
    ("connection/machine.rs", "a late answer is dropped while the peer takes none",
     "        peer.collect_late(&mut self.outbox);\n        self.active = now;",
     "        peer.collect_late(&mut self.outbox);\n"
     "        if matches!(self.state, State::Writing { .. }) {\n            self.outbox.clear();\n        }\n"
     "        self.active = now;"),
    ("peer.rs", "a call that has answered counts as left behind",
     "        self.left.fetch_sub(1, SeqCst);\n", ""),
    ("peer.rs", "a call is over before its answer is there",
     "        let mut late = lock(&self.late);\n        put(&mut late, &self.traffic);\n"
     "        // Under the lock: whoever sees no call left finds all answers.\n        self.left.fetch_sub(1, SeqCst);\n",
     "        self.left.fetch_sub(1, SeqCst);\n        put(&mut lock(&self.late), &self.traffic);\n"),
    ("connection/machine/closing.rs", "the ERROR that closes does not wait for calls",
     "if left == 0 && !self.closing_said {", "if !self.closing_said {"),
    ("connection/machine/closing.rs", "the last late answers are not collected before the ERROR that closes",
     "        let left = peer.calls_left();\n        if self.closing.as_ref()",
     "        if self.closing.as_ref()"),
    ("connection/machine/closing.rs", "it closes before the late answers",
     "if left > 0 { Step::Wait } else { Step::Close }", "Step::Close"),
    # What is read.
    ("connection/machine.rs", "messages behind one that is in a call are left lying",
     "self.unread = decoder.is_midway();", "self.unread = false;"),
    ("connection/machine.rs", "what others were served before is left lying",
     "&& (self.readable && decoder.may_read() || self.unread", "&& (self.unread"),
    ("connection/machine.rs", "the end behind the last bytes is not read",
     "self.readable = more || self.peer_ended;", "self.readable = more;"),
    # Turns.
    ("../scheduler/mod.rs", "who gives its permit back wakes nobody",
     "            let granted = inner.queue.leave(now, id);\n            inner.pass_on(&granted);\n        }\n    }",
     "            inner.queue.leave(now, id);\n        }\n    }"),
    ("../scheduler/mod.rs", "whose slice is over wakes nobody",
     "        inner.pass_on(&granted);\n        if inner.queue.holds(id) {", "        if inner.queue.holds(id) {"),
    ("../scheduler/mod.rs", "a call that ends while it waits keeps its place",
     "        let now = scheduler.now();\n        inner.queue.leave(now, id)\n", "        Vec::new()\n"),
    ("../scheduler/mod.rs", "nobody can wake a call that waits",
     "        inner.waiting.0.insert(id, system::current());\n", ""),
    ("../scheduler/mod.rs", "a call that waits is not stopped",
     "attendant.look().map(PermitError::Stopped)", "attendant.look().filter(|_| false).map(PermitError::Stopped)"),
    ("../scheduler/mod.rs", "the deadline of a call that waits is not looked at",
     "stop.or_else(|| (now >= deadline).then_some(PermitError::Deadline))", "stop.or_else(|| None)"),
    # HTTP.
    ("connection/requests.rs", "a request behind a call that was left is served at once",
     "            is_busy: true,\n", "            is_busy: false,\n"),
    ("connection/decoder.rs", "requests behind a call that was left are left lying",
     "requests.is_busy = false;", "requests.is_busy |= false;"),
    ("connection/machine.rs", "the connection stays after the last response",
     "        if self.outbox.said_close() {\n            self.close_with(CloseReason::Answered);\n        }\n", ""),
    ("connection/machine/http.rs", "a head is refused, and its body read as the next request",
     "        exchange.closes |= closes;\n", "        let _ = closes;\n"),
    ("connection/requests.rs", "a request that was begun is closed without a word",
     "if exchange.is_none() && !self.incoming.is_midway() {", "if exchange.is_none() {"),
    ("connection/requests.rs", "a response that closes does not say so to a request that waits",
     "            exchange.closes = true;\n            return Some", "            return Some"),
    # What is given back.
    ("workers.rs", "the permit of a connection that is over is kept",
     "                    self.shared.linger(channel);\n                    drop(connection);\n",
     "                    self.shared.linger(channel);\n                    std::mem::forget(connection);\n"),
    # Answers that were deferred.
    ("workers.rs", "who makes an answer due wakes nobody",
     "        if !more {\n            self.poller.wake();\n        }", "        let _ = more;"),
    ("workers.rs", "more calls are deferred than may be left",
     "&& !self.may_leave() {", "&& false {"),
    ("poller.rs", "who does not wait takes the wake-up of one who does",
     "            self.epoll.wake();\n        }\n        let now = system::now();\n        let mut first",
     "        }\n        let now = system::now();\n        let mut first"),
    ("workers.rs", "a call that is deferred does not count as left",
     "                    same.leave_call();\n                    let peer", "                    let peer"),
]

# Some need more than one place.
AND_ALSO = {
    "the last late answers are not collected before the ERROR that closes": [
        ("            peer.collect_late(&mut self.outbox);\n            if left == 0 &&",
         "            peer.collect_late(&mut self.outbox);\n            let left = peer.calls_left();\n            if left == 0 &&"),
        ("        self.state = State::Ending;\n        if left > 0 {",
         "        self.state = State::Ending;\n        let left = peer.calls_left();\n        if left > 0 {"),
    ],
}

ENVIRONMENT = {**os.environ, "CARGO_TARGET_DIR": str(ROOT / "target/mutants"), "RUST_BACKTRACE": "0",
               "MB_SEEDS": SEEDS}
ENVIRONMENT.pop("MB_SEED", None)
RUN = ["cargo", "test", "--quiet", "--release", "--test", "simulation"]


def copy():
    """The tree as it is, with what git does not know yet."""
    names = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                           check=True, capture_output=True, text=True).stdout.split("\0")
    for name in filter(None, names):
        to = COPY / name
        to.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_file():
            # With its time: what has not changed is not compiled again.
            shutil.copy2(ROOT / name, to)
    for part, user in (("server", "main.rs"), ("scheduler", "turns.rs")):
        own = SERVER.parent / part
        shutil.rmtree(own, ignore_errors=True)
        # With the time of now, because one before may have had a defect.
        shutil.copytree(ROOT / "src" / part, own, copy_function=shutil.copyfile)
        # The library keeps the parts without a defect, and so is compiled once.
        place = f'#[path = "../../src/{part}/mod.rs"]'
        file = SERVER.parent / user
        text = file.read_text()
        assert place in text
        file.write_text(text.replace(place, f'#[path = "{part}/mod.rs"]'))


def run(command, timeout=None):
    """Exit code (None after the timeout) and what it said."""
    process = subprocess.Popen(command, cwd=COPY, env=ENVIRONMENT, text=True, errors="replace",
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        said, _ = process.communicate(timeout=timeout)
        return process.returncode, said
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return None, process.communicate()[0]


def found_by(said):
    """The seed that fails, and the message of its panic."""
    seed = re.search(r"^seed (\d+) fails", said, re.MULTILINE)
    before = said[:seed.start()] if seed else said
    messages = re.findall(r"panicked at [^\n]*:\n([^\n]*)", before)
    return seed and seed[1], messages[-1] if messages else ""


def plant(number):
    file, what, text, instead = MUTANTS[number]
    path = SERVER / file
    original = changed = path.read_text()
    for text, instead in [(text, instead), *AND_ALSO.get(what, [])]:
        if changed.count(text) != 1:
            sys.exit(f"{number}: {file} holds {changed.count(text)} times: {text!r}")
        changed = changed.replace(text, instead)
    path.write_text(changed)
    return lambda: path.write_text(original)


def examine(number):
    """Whether the simulation finds it, and its row."""
    begun = time.monotonic()
    restore = plant(number) if number is not None else None
    try:
        code, said = run([*RUN, "--no-run"])
        if code:
            sys.exit(f"{number}: it does not compile, which is no find:\n{said[-3000:]}")
        code, said = run(RUN, TIMEOUT)
    finally:
        if restore:
            restore()
    seconds = time.monotonic() - begun
    if number is None:
        if code != 0:
            sys.exit(f"it fails without a defect:\n{said[-3000:]}")
        return True, f"without a defect {SEEDS} seeds pass; {seconds:.0f} s"
    seed, message = found_by(said)
    if code is None:
        message = f"no end within {TIMEOUT} s"
    found = code is None or code != 0 and seed is not None
    if code and seed is None:
        sys.exit(f"{number}: it ends without a seed that fails:\n{said[-3000:]}")
    file, what = MUTANTS[number][:2]
    by = message[:90] if found else "SURVIVED"
    return found, f"{number:2} | {file} | {what} | {by} | {seed or '-'} | {seconds:.0f} s"


def main():
    wanted = [int(number) for number in sys.argv[1:]] or list(range(len(MUTANTS)))
    copy()
    # Each text is found, before much is compiled.
    for number in wanted:
        plant(number)()
    survived = []
    if not sys.argv[1:]:
        print(examine(None)[1], flush=True)
    for number in wanted:
        found, row = examine(number)
        print(row, flush=True)
        if not found:
            survived.append(number)
    print(f"{len(wanted) - len(survived)} of {len(wanted)} found")
    sys.exit(1 if survived else 0)


main()
