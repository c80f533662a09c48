#!/usr/bin/env python3
"""What a stopped call leaves behind where the machine swaps: nothing may reach
the next instance.

    cargo build --release && sudo python3 tests/load/swap.py [--server PROGRAM] [--require] [tables|memory]...

A service fills its table, or its memory, and loops until its deadline stops
it. While it loops, the server's pages are sent to swap, where the kernel's
bits of written pages do not show them any more. Then others look: tables and
memory must be as new, and calling what stands in a table must not end the
server. It counts only if the filled pages were seen in swap at that moment.

Needs Linux and root, and turns on 96 MiB of swap in a file for half a minute.
Ctrl-C and SIGTERM turn it off too; after kill -9, `swapoff` the file that
/proc/swaps names. Exits 1 where something was left, the server ended, or
nothing was swapped. Where swap can't be had it says `skipped: WHY` and exits 0,
with --require 1.

The services are one component under two names; its text and its bytes are
both below. After a change of the text, `pip install wasmtime` and
`python3 tests/load/swap.py --encode` prints the new bytes, and exits 1 where
they differ from those here. Nothing else needs more than Python.
"""
import argparse
import base64
import collections
import contextlib
import ctypes
import json
import mmap
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import zlib

import soak
from soak import ask

SWAP = 96 * 1024 * 1024
LIMIT = 150  # seconds for everything, but for cleaning up
START = 30  # seconds until a server is ready
DEADLINE = 1500  # milliseconds until a filling call is stopped
LOOKS = 3  # calls that look after each stopped one
ENTRIES = 30_000
BYTES = 300 * 1024
PAGE = mmap.PAGESIZE
PROCESS_MADVISE, MADV_PAGEOUT = 440, 21
NAMES = ["left", "next"]

# Each action is known by its first letter. `table` and `memory` fill and loop,
# `entries` and `bytes` count what is there, `use` calls an entry that is there.
DESCRIBE = (
    '{"name":"left","version":"1.0.0","actions":[{"name":"table"},{"name":"entries"},{"name":"use"},'
    '{"name":"memory"},{"name":"bytes"}]}'
)
TEXT = r"""
(component
  (import "mb:service/types@1.0.0" (instance $types
    (type $p (variant (case "json" string) (case "binary" (list u8))))
    (export "payload" (type $payload (eq $p)))
    (type $f (record (field "code" string) (field "message" string) (field "details" (option string))))
    (export "failure" (type $failure (eq $f)))))
  (alias export $types "payload" (type $payload))
  (alias export $types "failure" (type $failure))
  (core module $main
    (type $number (func (result i32)))
    (table $t ENTRIES ENTRIES funcref)
    (memory (export "memory") 16)
    (global $heap (mut i32) (i32.const 4096))
    (data (i32.const 1024) "DESCRIBE")
    (elem declare func $seven)
    (func $seven (type $number) (i32.const 7))
    ;; What is at 65536 and above is only filled and counted.
    (func (export "realloc") (param i32 i32 i32 i32) (result i32)
      (global.get $heap)
      (global.set $heap
        (i32.and (i32.add (global.get $heap) (i32.add (local.get 3) (i32.const 7))) (i32.const -8))))
    (func (export "describe") (result i32)
      (i32.store (i32.const 16) (i32.const 1024)) (i32.store (i32.const 20) (i32.const LENGTH)) (i32.const 16))
    (func $answer (param $n i32) (result i32) (local $at i32)
      (local.set $at (i32.const 600))
      (loop $digit
        (local.set $at (i32.sub (local.get $at) (i32.const 1)))
        (i32.store8 (local.get $at) (i32.add (i32.const 48) (i32.rem_u (local.get $n) (i32.const 10))))
        (br_if $digit (local.tee $n (i32.div_u (local.get $n) (i32.const 10)))))
      (i32.store (i32.const 32) (i32.const 0)) (i32.store (i32.const 36) (i32.const 0))
      (i32.store (i32.const 40) (local.get $at))
      (i32.store (i32.const 44) (i32.sub (i32.const 600) (local.get $at)))
      (i32.const 32))
    (func $forever (loop $l (br $l)))
    (func $entries (result i32) (local $i i32) (local $n i32)
      (loop $l
        (local.set $n (i32.add (local.get $n) (i32.eqz (ref.is_null (table.get $t (local.get $i))))))
        (local.set $i (i32.add (local.get $i) (i32.const 1)))
        (br_if $l (i32.lt_u (local.get $i) (i32.const ENTRIES))))
      (local.get $n))
    (func $bytes (result i32) (local $i i32) (local $n i32)
      (loop $l
        (local.set $n (i32.add (local.get $n)
          (i32.ne (i32.load8_u (i32.add (local.get $i) (i32.const 65536))) (i32.const 0))))
        (local.set $i (i32.add (local.get $i) (i32.const 1)))
        (br_if $l (i32.lt_u (local.get $i) (i32.const BYTES))))
      (local.get $n))
    (func $use (result i32) (local $i i32)
      (loop $l
        (if (i32.eqz (ref.is_null (table.get $t (local.get $i))))
          (then (return (call_indirect $t (type $number) (local.get $i)))))
        (local.set $i (i32.add (local.get $i) (i32.const 1)))
        (br_if $l (i32.lt_u (local.get $i) (i32.const ENTRIES))))
      (i32.const 0))
    (func (export "handle") (param $action i32) (param i32 i32 i32 i32) (result i32) (local $first i32)
      (local.set $first (i32.load8_u (local.get $action)))
      (if (i32.eq (local.get $first) (i32.const 0x74))
        (then (table.fill $t (i32.const 0) (ref.func $seven) (i32.const ENTRIES)) (call $forever)))
      (if (i32.eq (local.get $first) (i32.const 0x6d))
        (then (memory.fill (i32.const 65536) (i32.const 83) (i32.const BYTES)) (call $forever)))
      (if (i32.eq (local.get $first) (i32.const 0x65)) (then (return (call $answer (call $entries)))))
      (if (i32.eq (local.get $first) (i32.const 0x75)) (then (return (call $answer (call $use)))))
      (call $answer (call $bytes))))
  (core instance $m (instantiate $main))
  (alias core export $m "memory" (core memory $memory))
  (alias core export $m "realloc" (core func $realloc))
  (func $describe (result string) (canon lift (core func $m "describe") (memory $memory)))
  (func $handle (param "action" string) (param "payload" $payload) (result (result $payload (error $failure)))
    (canon lift (core func $m "handle") (memory $memory) (realloc $realloc)))
  (instance $handler (export "describe" (func $describe)) (export "handle" (func $handle)))
  (export "mb:service/handler@1.0.0" (instance $handler)))
"""
# TEXT as a component, in zlib, in base64: what --encode prints.
ENCODED = """
eNplVM1vE0cUf28+bU8gThQBFVK0cYMUiRDChUNOnkptVfXYGwgpa3sC6+yH2dkELBTZEkcu/Bkc+VcoUsWRSy+VuNEbh75Zb4yjeq15b37ze1
+z7y3EPrsGCPoP/Enh5AKfMzH2RY4e1CDJ43KKAAL0JJ6mRTzigHjqseRiWIyc15nzPn5KyshVcZJ6TtQTUs5Kx0F0biPcyAZH3pXnydDdr6YT
5/sPDg4PDiWom4zDiuOlIb5VQFlRXMBteQw4OxYz+pHEsAAcy9kC4J025R78gBBtnOD7f8JfcoSu0sS288joPaEylxXllIEuXZymxRCwRekPy2
TggKlncT5KHbTaEqlA6PzF2gKsNhvwIz0Rt3o8ti+f74LZAtu189ZDBnbLvsYgu+Z3xJn9JHaQ9yO0eLqDJA4jsJ3J+AggKHkProGxkYVgsrsQ
e1HtYJ9sIzwNKiULvL8GxuwimwV3EdyBDz+PySVYHO8EZ1Tgb+QsQnN3SbLzuRjfA7Dw6xXu/PNmw92jJIlbuxMkNwDWzf+cWjCPiBgB+dqRkb
Rf4RfRt/Bnzfi2AV1hCP1SoxTTfqxjfDPNwd/hoCu7fD3s/q13Ouy6qsuNeYNI/JZ5ja96eZy53lEvdSdVb7937kqfFDkBdXsQEg8rAnzv6PGS
W8WD1PUu9peAy6sycX4VOvNXGIsXv4oMplWweHIB71AEDKTI4iTHAwXSu3OXcxXn/oUrhT4pSgJKqZtAStbWmlMUdig5A8yRxZUkJUHMVSM1km
wxUIsipDxJSl/x7dCYcpQ8TSpBjFSGRYUlGKTUwaDys2xAEcN5pQkWz1w8YSJMg7rFgBFlUROEqW3aWUvsA3h1HQO6bO1WK+ypp7m+zcaIyPqs
SclfDh5FUGu1WTMGrQ7tGM2UACl/IJvv/uigISGabYRbK7O9wMtmuol5cX1YZJMip6u7F64Z11YzRrNSCrZhg/Ko34KCTSo9w60rgS/DbnGGl5
mz5Qdjk+5f1h8X1E0e/wFHOg0w
"""


def encoded():
    """The component of TEXT, by wasmtime."""
    import wasmtime
    values = {"ENTRIES": str(ENTRIES), "BYTES": str(BYTES), "LENGTH": str(len(DESCRIBE)),
              "DESCRIBE": DESCRIBE.replace('"', '\\"')}
    return bytes(wasmtime.wat2wasm(re.sub("|".join(values), lambda found: values[found[0]], TEXT)))


class Skipped(Exception):
    """Swap can't be had here."""


class Nothing(Exception):
    """The round proves nothing."""


class Ended(Exception):
    """The server is gone."""


libc = ctypes.CDLL(None, use_errno=True)


class Range(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]


def mappings(pid):
    """Where the process has private, writable pages, in memory or in swap."""
    found, here = [], None
    with open(f"/proc/{pid}/smaps") as file:
        for line in file:
            fields = line.split()
            if not fields[0].endswith(":"):
                first, last = (int(number, 16) for number in fields[0].split("-"))
                special = len(fields) > 5 and fields[5].startswith("[v")
                here = (first, last) if fields[1] == "rw-p" and not special else None
            elif here and fields[0] in ("Rss:", "Swap:") and fields[1] != "0":
                found.append(here)
                here = None
    return found


def page_out(pid):
    """Asks the kernel to send all of them to swap."""
    descriptor = os.pidfd_open(pid)
    failed, done = 0, False
    try:
        for first, last in mappings(pid):
            for base in range(first, last, 1 << 30):
                piece = Range(base, min(last - base, 1 << 30))
                if libc.syscall(PROCESS_MADVISE, descriptor, ctypes.byref(piece), 1, MADV_PAGEOUT, 0) < 0:
                    failed = ctypes.get_errno()
                else:
                    done = True
    finally:
        os.close(descriptor)
    if not done:
        raise OSError(failed, os.strerror(failed))


def entries_of(pagemap, address, count):
    pagemap.seek(address // PAGE * 8)
    return memoryview(pagemap.read(count * 8)).cast("Q")


def filled(pid):
    """Addresses of the pages that hold the fill: the largest number of pages
    in memory that are, each and all, one word again and again, but not zeros."""
    groups = collections.defaultdict(list)
    with open(f"/proc/{pid}/pagemap", "rb", 0) as pagemap, open(f"/proc/{pid}/mem", "rb", 0) as memory:
        for first, last in mappings(pid):
            for base in range(first, last, 1 << 26):
                for number, entry in enumerate(entries_of(pagemap, base, min(last - base, 1 << 26) // PAGE)):
                    if not entry >> 63:
                        continue
                    try:
                        memory.seek(base + number * PAGE)
                        page = memory.read(PAGE)
                    except OSError:
                        continue
                    if page[:8] != bytes(8) and page == page[:8] * (PAGE // 8):
                        groups[page[:8]].append(base + number * PAGE)
    return max(groups.values(), key=len, default=[])


def in_swap(pid, pages):
    with open(f"/proc/{pid}/pagemap", "rb", 0) as pagemap:
        return sum(entries_of(pagemap, page, 1)[0] >> 62 & 1 for page in pages)


def swapped_kib(pid):
    status = dict(line.split(":", 1) for line in open(f"/proc/{pid}/status"))
    return int(status["VmSwap"].split()[0])


def tool(*command):
    """Runs it out of reach of Ctrl-C; what it said where it failed, or none."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=60, start_new_session=True)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return None if run.returncode == 0 else (run.stderr or run.stdout).strip() or f"{command[0]} failed"


def can_page_out():
    with subprocess.Popen(["sleep", "60"]) as other:
        try:
            time.sleep(0.1)
            page_out(other.pid)
        except (OSError, AttributeError) as error:
            raise Skipped(f"process_madvise does not work: {error}") from error
        finally:
            other.kill()


@contextlib.contextmanager
def swap(folder):
    file = folder / "swap"
    try:
        with open(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as opened:
            for _ in range(SWAP >> 20):  # no holes: swapon takes none
                opened.write(bytes(1 << 20))
            opened.flush()
            os.fsync(opened.fileno())
    except OSError as error:
        raise Skipped(f"no room for the swap file: {error}") from error
    try:
        if said := tool("mkswap", str(file)) or tool("swapon", "-p", "32767", str(file)):
            raise Skipped(f"swap can't be turned on: {said}")
        yield
    finally:
        for _ in range(3):
            if folder.name not in open("/proc/swaps").read() or not (said := tool("swapoff", str(file))):
                break
            time.sleep(1)
        else:
            print(f"SWAP IS STILL ON: swapoff {file} ({said})", flush=True)


class Server:
    def __init__(self, program, folder):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MB_")}
        environment.update(MB_PORT="0", MB_ADMIN__PORT="0", MB_LOG="off", MB_STATE_DIR=str(folder / "state"),
                           XDG_CACHE_HOME=str(folder / "cache"))
        self.process = subprocess.Popen(
            [program, "serve", "--services", folder / "services"], env=environment, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, start_new_session=True)
        late = threading.Timer(START, self.process.kill)
        late.start()
        try:
            (self.address, *_), _ = soak.addresses(self.process)
        except BaseException:
            self.stop()
            raise
        finally:
            late.cancel()
        threading.Thread(target=self.process.stdout.read, daemon=True).start()

    connect = soak.Server.connect

    def ask(self, topic, timeout=10_000):
        """The answer's JSON."""
        try:
            with self.connect() as connection:
                return json.loads(ask(connection, topic, timeout=timeout))
        except (OSError, AssertionError) as error:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = self.process.wait(5)
                raise Ended(f"signal {-code}" if code < 0 else f"exit code {code}") from error
            raise Nothing(f"{topic} was not answered: {error!r}") from error

    def number(self, topic):
        answer = self.ask(topic)
        if not isinstance(answer, int):
            raise Nothing(f"{topic} answered {answer}")
        return answer

    def stop(self):
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def stopped(server, action, size):
    """Has the action fill so many bytes, pages the server out, and waits until
    the action is stopped. Says how much was in swap."""
    pid, outcome = server.process.pid, []

    def fill():
        try:
            outcome.append(server.ask(f"{NAMES[0]}.{action}", DEADLINE))
        except (Ended, Nothing) as error:
            outcome.append(error)

    calling = threading.Thread(target=fill, daemon=True)
    calling.start()
    try:
        wanted, pages, swapped = size // PAGE - 2, [], 0
        while calling.is_alive() and len(pages) < wanted:
            pages = filled(pid)
        # Up to 31 pages that have just come may be held up by the guest's processor; the rest goes.
        for _ in range(3):
            if calling.is_alive() and swapped < len(pages):
                page_out(pid)
                swapped = in_swap(pid, pages)
        kib, in_time = swapped_kib(pid), calling.is_alive()
    except OSError as error:
        server.ask("left.bytes")  # says how it ended, if it did
        raise Nothing(f"the server's pages can't be seen: {error}") from error
    calling.join(DEADLINE / 1000 + 35)
    if not outcome:
        raise Nothing(f"{action} was not stopped")
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    if not isinstance(outcome[0], dict) or outcome[0].get("code") != "TIMEOUT":
        raise Nothing(f"{action} was to be stopped at its deadline, but answered {outcome[0]}")
    if len(pages) < wanted:
        raise Nothing(f"{len(pages)} filled pages were seen, wanted {wanted} or more")
    if not in_time:
        raise Nothing("the deadline passed before the pages were in swap")
    if kib == 0 or swapped <= len(pages) // 4:
        raise Nothing(f"nothing was swapped: proves nothing ({swapped} of {len(pages)} filled pages, VmSwap {kib} KiB)")
    return f"{swapped} of {len(pages)} pages, VmSwap {kib} KiB"


class Route:
    """One row: fill, page out, look; so many rounds."""

    def __init__(self, name, rounds, fills, size, looks):
        self.name, self.rounds, self.fills, self.size, self.looks = name, rounds, fills, size, looks

    def run(self, server):
        """The row, and whether all is well."""
        done, most, swapped = 0, 0, "-"
        try:
            for done in range(1, self.rounds + 1):
                swapped = stopped(server, self.fills, self.size)
                # The place of the stopped one need not be the first that is taken again.
                most = max(most, *(server.number(self.looks) for _ in range(LOOKS)))
            found, fine = str(most), most == 0
        except Ended as error:
            found, fine = f"the server ended: {error}", False
        except Nothing as error:
            found, fine = f"no proof: {error}", False
        if most and found != str(most):
            found = f"{most}; then {found}"
        return [self.name, f"{done} of {self.rounds}", swapped, found, "0"], fine


ROUTES = {
    "tables": [
        Route("table, another service counts entries", 5, "table", ENTRIES * 8, "next.entries"),
        Route("table, another service calls an entry", 5, "table", ENTRIES * 8, "next.use"),
    ],
    "memory": [Route("memory, the next call counts bytes", 4, "memory", BYTES, "left.bytes")],
}


def print_table(rows):
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def run(program, names, folder):
    (folder / "services").mkdir()
    component = zlib.decompress(base64.b64decode(ENCODED))
    for name in NAMES:
        renamed = component.replace(b'"name":"left"', b'"name":"%s"' % name.encode())
        (folder / "services" / f"{name}.wasm").write_bytes(renamed)
    rows, bad = [["route", "rounds", "in swap when stopped", "found", "wanted"]], []
    with swap(folder):
        for route in [route for name in names for route in ROUTES[name]]:
            server = Server(program, folder)
            try:
                row, fine = route.run(server)
            finally:
                server.stop()
            rows.append(row)
            if not fine:
                bad.append(f"{route.name}: {row[3]}, wanted 0")
    print_table(rows)
    print("\n".join(f"FAILED: {line}" for line in bad) or "nothing was left")
    return not bad


def end(number, _):
    # Once is enough: cleaning up is not interrupted.
    for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM):
        signal.signal(one, signal.SIG_IGN)
    sys.exit(f"not done after {LIMIT} s" if number == signal.SIGALRM else f"ended by {signal.Signals(number).name}")


def main():
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("routes", nargs="*", metavar="tables|memory", help="all of them, if none is named")
    asked.add_argument("--server", type=pathlib.Path, default=soak.SERVER,
                       help="the program, if not target/release/mb-server")
    asked.add_argument("--require", action="store_true", help="exit 1 where it has to be skipped")
    asked.add_argument("--dir", default="/var/tmp",
                       help="where the swap file is made; tmpfs can't hold one [default: /var/tmp]")
    asked.add_argument("--encode", action="store_true", help="print the bytes of the component's text, and end")
    asked = asked.parse_args()
    if unknown := set(asked.routes) - set(ROUTES):
        sys.exit(f"no such route: {' '.join(sorted(unknown))}")
    if asked.encode:
        made = encoded()
        print("\n".join(textwrap.wrap(base64.b64encode(zlib.compress(made, 9)).decode(), 110)))
        return made == zlib.decompress(base64.b64decode(ENCODED))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM):
        signal.signal(number, end)
    if not os.access(asked.server, os.X_OK):
        sys.exit(f"{asked.server} is not there; was it built?")
    signal.alarm(LIMIT)
    try:
        if sys.platform != "linux" or os.geteuid() != 0:
            raise Skipped("it needs Linux and root")
        can_page_out()
        with tempfile.TemporaryDirectory(prefix="mb-swap-", dir=asked.dir) as folder:
            return run(asked.server.resolve(), asked.routes or list(ROUTES), pathlib.Path(folder))
    except Skipped as why:
        print(f"skipped: {why}")
        return not asked.require


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
