#!/usr/bin/env python3
"""Holds a real server against what services that compute do to each other.

    cargo build --release && python3 tests/load/fairness.py [PART]...

Parts: `quick` (the latency of quick calls beside loops and a flood), `core`
(the same on one processor), `half` (the same in a cgroup with half of one: the
kernel stops the whole process for up to 75 of 100 ms, so the bound is 200 ms;
left out where no cgroup can be made), `shares` (who gets how much of the
processors), `principals` (the same within one service), `deadlines`, `kill`, `reset` (whether calls end in time under all of it), `compile` (quick calls meanwhile), `cost`
(whether what is counted is what the process used), `cpu` (the settings of that
name). Without any, all. Starts its own servers on free loopback ports, prints
figures, exits 1 where a bound is broken. `--seconds N` for each latency, 20
without, 60 for an acceptance run; `--server FILE` for another server, `--heavy FILE` for what is compiled. Needs Linux and nothing but Python.
"""
import argparse
import contextlib
import json
import multiprocessing
import os
import pathlib
import select
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time

import soak
from soak import ROOT, exactly

BINARY = 2
PROCESSORS = len(os.sched_getaffinity(0))
# Quick calls a second.
RATE = 500
failed = []


def frame(topic, request_id="1", payload=b"", timeout=2000, binary=False):
    body = f"REQUEST:{topic}:1.0.0:{request_id}::{timeout}\n".encode() + payload
    return struct.pack(">II", len(body), BINARY if binary else 0) + body


def bound(what, holds):
    print(f"  {'ok' if holds else 'NO'}  {what}", flush=True)
    if not holds:
        failed.append(what)


def renamed(name):
    """The guest that misbehaves, under another name of the same length."""
    code = (ROOT / "tests/guests/dist/hostile.wasm").read_bytes()
    described = code.rindex(b"hostile")
    return code[:described] + name.encode() + code[described + 7:]


class Server(soak.Server):
    """With `echo`, `checksum` and services of loops."""

    def __init__(self, folder, loops, settings, on_one_core, group=None):
        services = self.services = folder / "services"
        services.mkdir()
        shutil.copyfile(ROOT / "services/dist/echo.wasm", services / "echo.wasm")
        shutil.copyfile(ROOT / "services/dist/granted/checksum.wasm", services / "checksum.wasm")
        for name in loops:
            (services / f"{name}.wasm").write_bytes(renamed(name))
        (folder / "mb.toml").write_text(settings + "\n[services.checksum.grants]\nkeyvalue = true\nconfig = { remember = \"false\" }\n")
        os.environ["MB_CONFIG"] = str(folder / "mb.toml")
        before = os.sched_getaffinity(0)
        if on_one_core:
            os.sched_setaffinity(0, {min(before)})
        try:
            with group.entered() if group else contextlib.nullcontext():
                super().__init__(services, state_dir=folder / "state")
        finally:
            os.sched_setaffinity(0, before)
            del os.environ["MB_CONFIG"]
        token = folder / "state/admin.token"
        self.token = token.read_text().strip() if token.is_file() else ""

    def admin_json(self, path, method="GET"):
        with socket.create_connection(self.admin) as admin:
            head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {self.token}\r\n"
            admin.sendall((head + "Content-Length: 0\r\nConnection: close\r\n\r\n").encode())
            answer = b"".join(iter(lambda: admin.recv(65536), b""))
        body = answer.split(b"\r\n\r\n", 1)[1]
        return body if path == "/metrics" else json.loads(body or b"null")

    def cpu(self, label="service"):
        """Processor time by service or principal."""
        prefix = f"mb_{'' if label == 'service' else 'principal_'}cpu_seconds_total{{"
        lines = self.admin_json("/metrics").decode().splitlines()
        found = (line for line in lines if line.startswith(prefix))
        return {line.split('"')[1]: float(line.rsplit(" ", 1)[1]) for line in found}

    def used(self):
        """Processor time of the process outside of the kernel: of guests, and of
        the little that the server does around them."""
        fields = open(f"/proc/{self.process.pid}/stat").read().rsplit(")", 1)[1].split()
        return int(fields[11]) / os.sysconf("SC_CLK_TCK")


class HalfOfOne:
    """A cgroup whose processes get half of a processor. OSError where none can
    be made."""

    def __init__(self):
        root = pathlib.Path("/sys/fs/cgroup")
        is_unified = (root / "cgroup.controllers").is_file()
        root = root if is_unified else root / "cpu"
        own = next(line.rstrip().split(":", 2) for line in open("/proc/self/cgroup")
                   if is_unified or "cpu" in line.split(":")[1].split(","))[2]
        self.before = root / own.lstrip("/") / "cgroup.procs"
        self.folder = root / f"mb-half-{os.getpid()}"
        self.folder.mkdir()
        limits = {"cpu.max": "50000 100000"} if is_unified else {
            "cpu.cfs_period_us": "100000", "cpu.cfs_quota_us": "50000"}
        try:
            for name, value in limits.items():
                (self.folder / name).write_text(value)
        except OSError:
            self.folder.rmdir()
            raise

    @contextlib.contextmanager
    def entered(self):
        """This process is in it meanwhile, and what it starts stays there."""
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))
        try:
            yield
        finally:
            self.before.write_text(str(os.getpid()))

    def close(self):
        # The last process may not have left it.
        for _ in range(50):
            try:
                return self.folder.rmdir()
            except OSError:
                time.sleep(0.1)


@contextlib.contextmanager
def serving(*loops, settings="", on_one_core=False, group=None):
    with tempfile.TemporaryDirectory() as folder:
        server = Server(pathlib.Path(folder), loops, settings, on_one_core, group)
        try:
            yield server
        finally:
            server.process.kill()
            server.process.wait()


def load(address, plan, ended):
    """Keeps so many requests open, each asked again when it is answered. A plan
    is tuples of a request, connections, how many are open on each, and a token
    if they show one."""
    poll = select.epoll()
    open_ones = {}
    for request, connections, depth, *token in plan:
        for _ in range(connections):
            connection = socket.create_connection(address)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for secret in token:
                soak.ask(connection, "system.hello", json.dumps({"token": secret}).encode())
            connection.sendall(request * depth)
            open_ones[connection.fileno()] = (connection, bytearray(), request)
            poll.register(connection.fileno(), select.EPOLLIN)
    while not ended.is_set():
        for number, _ in poll.poll(0.1):
            connection, data, request = open_ones[number]
            data += connection.recv(1 << 16)
            answers = 0
            while len(data) >= 8 and len(data) >= 8 + struct.unpack(">I", data[:4])[0]:
                del data[:8 + struct.unpack(">I", data[:4])[0]]
                answers += 1
            if answers:
                connection.sendall(request * answers)


@contextlib.contextmanager
def under(server, plan, settles=0.5):
    """Meanwhile, from so many seconds after its begin, the load runs."""
    ended = multiprocessing.Event()
    process = multiprocessing.Process(target=load, args=(server.address, plan, ended), daemon=True)
    process.start()
    time.sleep(settles)
    try:
        yield
        assert process.is_alive(), "the load ended early"
    finally:
        ended.set()
        process.join(5)
        process.kill()


def quick_calls(server, seconds):
    """Milliseconds of each quick call, counted from when it was due; asked on
    one connection whether the one before is answered or not."""
    with server.connect() as connection:
        begun = time.perf_counter()
        waits, sent, data = [], 0, bytearray()
        while len(waits) < seconds * RATE:
            now = time.perf_counter()
            if now - begun > 1.5 * seconds:
                waits += [(now - begun - number / RATE) * 1000 for number in range(len(waits), seconds * RATE)]
                break
            while sent < seconds * RATE and begun + sent / RATE <= now:
                connection.sendall(frame("echo.say", sent, b"1", timeout=30_000))
                sent += 1
            due = begun + sent / RATE if sent < seconds * RATE else now + 1
            if select.select([connection], [], [], max(0, due - time.perf_counter()))[0]:
                piece = connection.recv(1 << 16)
                assert piece, "the stream ended"
                data += piece
                now = time.perf_counter()
                while len(data) >= 8 and len(data) >= 8 + struct.unpack(">I", data[:4])[0]:
                    size = 8 + struct.unpack(">I", data[:4])[0]
                    assert data[8:17] == b"RESPONSE:", bytes(data[8:size])
                    number = int(data[8:size].split(b"\n")[0].split(b":")[3])
                    del data[:size]
                    waits.append((now - begun - number / RATE) * 1000)
    return sorted(waits)


def checksum_request(server):
    """A request that takes 1.5 ms of the processor."""
    with server.connect() as connection:
        def took(size):
            request = frame("checksum.of", payload=b"x" * size, binary=True)
            best = []
            for _ in range(20):
                begun = time.perf_counter()
                connection.sendall(request)
                length, _ = struct.unpack(">II", exactly(connection, 8))
                exactly(connection, length)
                best.append(time.perf_counter() - begun)
            return sorted(best)[5]
        took(1000)
        size = int(200_000 * 0.0015 / took(200_000))
        print(f"  a call of {size // 1024} KiB takes {took(size) * 1000:.2f} ms")
        return frame("checksum.of", payload=b"x" * size, binary=True)


def loop(name, timeout=2000):
    return frame(f"{name}.spin", timeout=timeout)


LOOPS = ["loop-aa", "loop-bb", "loop-cc", "loop-dd"]


def latencies(seconds, most, on_one_core=False, group=None):
    with serving(*LOOPS, on_one_core=on_one_core, group=group) as server:
        alone = quick_calls(server, min(seconds, 5))
        print(f"  alone: p50 {alone[len(alone) // 2]:.2f} ms, p99 {alone[len(alone) * 99 // 100]:.2f} ms")
        plans = {
            "64 loops over 1 connection": [(loop(LOOPS[0]), 1, 64)],
            "64 loops over 64 connections": [(loop(LOOPS[0]), 64, 1)],
            "4 services of 64 loops": [(loop(name), 64, 1) for name in LOOPS],
            "64 connections of 1.5 ms calls": [(checksum_request(server), 64, 1)],
        }
        for name, plan in plans.items():
            # Until hundreds of instances are made, with little of a processor.
            with under(server, plan, 4 if group else 0.5):
                waits = quick_calls(server, seconds)
            p = [waits[len(waits) * share // 1000] for share in (500, 990, 999)]
            bound(f"{name}: p50 {p[0]:.2f} ms, p99 {p[1]:.2f} ms of {most}, p99.9 {p[2]:.1f} ms, "
                  f"most {waits[-1]:.0f} ms", p[1] <= most)
            time.sleep(2.5)


def quick(options):
    latencies(options.seconds, 10)


def core(options):
    latencies(options.seconds, 20, on_one_core=True)


def half(options):
    try:
        group = HalfOfOne()
    except (OSError, StopIteration) as error:
        print(f"  left out: no cgroup can be made: {error}")
        return
    try:
        latencies(options.seconds, 200, group=group)
    finally:
        group.close()


def split(server, plan, wanted, what, label="service"):
    with under(server, plan):
        time.sleep(1)
        before = server.cpu(label)
        time.sleep(5)
        after = server.cpu(label)
    spent = {name: after.get(name, 0) - before.get(name, 0) for name in wanted}
    total = sum(spent.values()) or 1
    shares = {name: 100 * seconds / total for name, seconds in spent.items()}
    text = ", ".join(f"{name} {share:.1f} % of {wanted[name]}" for name, share in shares.items())
    bound(f"{what}: {text}; {total / 5:.2f} processors", all(
        abs(share - wanted[name]) <= 5 for name, share in shares.items()))
    time.sleep(2.2)


def shares(_):
    one, other = LOOPS[:2]
    with serving(*LOOPS) as server:
        split(server, [(loop(one), 64, 1), (loop(other), 1, 1)], {one: 50, other: 50}, "64 loops, 1 loop")
        three = LOOPS[:3]
        plan = [(loop(name), count, 1) for name, count in zip(three, (64, 8, 2))]
        split(server, plan, dict.fromkeys(three, 33.3), "64, 8 and 2 loops")
    for weights, wanted in (((3, 1), (75, 25)), ((1, 3), (25, 75))):
        settings = "".join(f"[services.{n}]\nweight = {w}\n" for n, w in zip(LOOPS, weights))
        with serving(one, other, settings=settings) as server:
            split(server, [(loop(one), 64, 1), (loop(other), 8, 1)], dict(zip(LOOPS, wanted)),
                  f"64 and 8 loops, weights {weights[0]} : {weights[1]}")


def principals(_):
    name = LOOPS[0]
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "tokens.json"
        tokens = {principal: subprocess.run(
            [soak.SERVER, "token", "new", principal, "--file", file], check=True, capture_output=True, text=True
        ).stdout.strip() for principal in ("ann", "bob", "cleo")}
        # With fewer, calls wait in the order in which they came, whoever asks.
        settings = f"tokens = \"{file}\"\n[services.{name}]\nconcurrency = 128\n"
        with serving(name, settings=settings) as server:
            plan = [(loop(name), count, 1, token) for token, count in zip(tokens.values(), (64, 8, 1))]
            split(server, plan, dict.fromkeys(tokens, 33.3), "64, 8 and 1 loops of one service", "principal")


def ends_in(connection):
    """What an answer says, and when it came."""
    length, _ = struct.unpack(">II", exactly(connection, 8))
    body = exactly(connection, length)
    return json.loads(body.split(b"\n", 1)[1]), time.perf_counter()


def deadlines(_):
    with serving(*LOOPS) as server, under(server, [(loop(name), 64, 1) for name in LOOPS[:2]]):
        late = []
        with server.connect() as connection:
            for turn in range(100):
                timeout = 100 + turn
                begun = time.perf_counter()
                connection.sendall(loop(LOOPS[2], timeout))
                answer, now = ends_in(connection)
                assert answer["code"] == "TIMEOUT", answer
                late.append((now - begun) * 1000 - timeout)
        late.sort()
        bound(f"100 deadlines: {late[50]:.1f} ms late, at most {late[-1]:.1f} ms of 10", late[-1] <= 10)
        print(f"  details of the last: {json.dumps(answer['details'])}")


def kill(_):
    with serving(*LOOPS) as server, under(server, [(loop(LOOPS[0]), 60, 1)]):
        took = []
        with server.connect() as connection:
            for turn in range(20):
                connection.sendall(frame(f"{LOOPS[0]}.spin", f"k{turn}", timeout=30_000))
                time.sleep(0.05)
                call = next(call for call in server.admin_json("/calls")["calls"]
                            if call["requestId"] == f"k{turn}")
                begun = time.perf_counter()
                answer = server.admin_json(f"/calls/{call['id']}", "DELETE")
                told = time.perf_counter()
                answer, now = ends_in(connection)
                assert answer["details"]["reason"] == "killed", answer
                took.append((max(0, now - told), now - begun))
        after = sorted(1000 * one for one, _ in took)
        whole = sorted(1000 * both for _, both in took)
        bound(f"20 killed calls of 61: {after[-1]:.1f} ms after the answer to the kill, {whole[-1]:.1f} ms from "
              f"when it was asked", after[-1] <= 10)


def reset(_):
    with serving(*LOOPS) as server, under(server, [(loop(LOOPS[0]), 40, 1)]):
        took = []
        for turn in range(20):
            connection = server.connect()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.sendall(frame(f"{LOOPS[0]}.spin", f"r{turn}", timeout=20_000))
            time.sleep(0.05)
            connection.close()
            begun = time.time()
            while True:
                past = server.admin_json(f"/calls/past?requestId=r{turn}")["calls"]
                if past or time.time() - begun > 3:
                    break
            took.append(past[0]["ended"] if past else None)
            if past:
                import datetime
                ended = datetime.datetime.fromisoformat(past[0]["ended"].replace("Z", "+00:00")).timestamp()
                took[-1] = (ended - begun) * 1000
        missed = took.count(None)
        most = max((one for one in took if one is not None), default=float("inf"))
        bound(f"20 calls whose client has reset: {20 - missed} ended, the last after {most:.1f} ms of 10",
              not missed and most <= 10)


def cost(options):
    with serving(*LOOPS) as server:
        # Little of what the process does is not for guests: small payloads, and
        # quick calls that compute a while.
        plan = [(loop(LOOPS[0]), 8, 1), (frame(f"{LOOPS[1]}.digest"), 2, 1)]
        with under(server, plan):
            before, used = server.cpu(), server.used()
            quick_calls(server, 10)
            after, now = server.cpu(), server.used()
        counted, spent = sum(after.values()) - sum(before.values()), now - used
        parts = {name: round(after[name] - before.get(name, 0), 2) for name in after}
        bound(f"counted {counted:.2f} s of {spent:.2f} s that the process used outside of the kernel, {counted / spent:.3f}: {parts}",
              0.9 <= counted / spent <= 1.1)


def cpu(_):
    one, other = LOOPS[:2]
    with serving(one, other, settings=f"[services.{one}]\ncpu = 0.5\n") as server:
        with under(server, [(loop(one), 8, 1)]):
            time.sleep(1)
            before = server.cpu()[one]
            time.sleep(5)
            share = (server.cpu()[one] - before) / 5
        time.sleep(2.5)
        bound(f"8 loops with cpu = 0.5: {share:.3f} of a processor", abs(share - 0.5) <= 0.05)
        answers = []
        with server.connect() as connection, under(server, [(loop(one), 60, 1)]):
            for _ in range(10):
                connection.sendall(loop(one, 200))
                answers.append(ends_in(connection)[0])
        waited = sum(answer["details"].get("phase") == "scheduling" for answer in answers)
        bound(f"{waited} of 10 calls beyond it got TIMEOUT in the phase scheduling; the last: {answers[-1]['details']}",
              waited >= 8)


def compile(options):
    if not options.heavy.is_file():
        print("  left out: services/build --heavy services/heavy makes the component")
        return
    with tempfile.TemporaryDirectory() as cache:
        # What was compiled before would not be compiled again.
        os.environ["XDG_CACHE_HOME"] = cache
        with serving() as server:
            alone = quick_calls(server, 10)
            # Under a name that the server does not look at, then at once.
            shutil.copyfile(options.heavy, server.services / ".stats")
            (server.services / ".stats").rename(server.services / "stats.wasm")
            waits = quick_calls(server, 10)
            rows = server.admin_json("/services")["services"]
            loading = not any(row["name"] == "stats" for row in rows)
        del os.environ["XDG_CACHE_HOME"]
    p = [calls[len(calls) * 99 // 100] for calls in (alone, waits)]
    bound(f"while a large component compiles{' still' if loading else ''}: p99 {p[1]:.2f} ms, alone {p[0]:.2f} ms",
          p[1] <= 3 * p[0])


PARTS = {part.__name__: part for part in (quick, core, half, shares, principals, deadlines, kill, reset, compile, cost, cpu)}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS])
    parser.add_argument("--seconds", type=int, default=20)
    parser.add_argument("--heavy", type=pathlib.Path, default=ROOT / "services/heavy/stats.wasm")
    parser.add_argument("--server", type=pathlib.Path)
    options = parser.parse_args()
    if options.server:
        soak.SERVER = options.server
    for part in options.parts or PARTS:
        print(part, flush=True)
        PARTS[part](options)
    sys.exit(f"{len(failed)} bounds are broken" if failed else 0)
