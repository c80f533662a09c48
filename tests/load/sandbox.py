#!/usr/bin/env python3
"""Holds a real server against what guests do to it.

    cargo build --release && python3 tests/load/sandbox.py [harm|loops|kill|mutated|memory|small|modes]...

`harm` and `loops` compare a fixed rate of quick calls beside hostile guests
with the same beside native busy loops, in pairs. Starts its own servers on
free loopback ports, prints figures, exits 1 where a bound is broken.
"""
import contextlib
import json
import os
import pathlib
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time

import soak
from soak import ROOT, ask

PAIRS = 5
SECONDS = 6
# Quick calls per second, over so many connections.
RATE, CONNECTIONS = 200, 4
GRANTS = """
[services.greedy.grants]
keyvalue = true
quota = "1MiB"
calls = ["greedy.call", "echo.*", "hostile.spin"]
[services.counter.grants]
keyvalue = true
"""
HOSTILE = [
    "hostile." + verb for verb in "spin allocate trap panic recurse answer-too-large invalid-json empty-json bad-code".split()
] + [
    "greedy." + verb
    for verb in "host-loop wasi-sleep wasi-poll random-bomb exit log-string kv-list handles log-flood log-long kv-quota kv-keys".split()
]


@contextlib.contextmanager
def serving(*components, settings="", **more):
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        (folder / "services").mkdir()
        for component in components:
            found = next(path for base in ("services/dist", "services/dist/granted", "tests/guests/dist")
                         if (path := ROOT / base / component).is_file())
            shutil.copyfile(found, folder / "services" / component)
        (folder / "mb.toml").write_text(settings)
        os.environ["MB_CONFIG"] = str(folder / "mb.toml")
        server = soak.Server(folder / "services", state_dir=folder / "state", **more)
        server.folder = folder
        try:
            yield server
        finally:
            server.process.kill()
            server.process.wait()
            del os.environ["MB_CONFIG"]


def resident(server):
    status = open(f"/proc/{server.process.pid}/status").read()
    return int(status.split("VmRSS:")[1].split()[0]) // 1024


def quick_calls(server, seconds):
    """Milliseconds of each call, counted from when it was due."""
    waits = []

    def one(offset):
        with server.connect() as connection:
            begun = time.perf_counter() + offset / RATE
            for turn in range(seconds * RATE // CONNECTIONS):
                due = begun + turn * CONNECTIONS / RATE
                while (left := due - time.perf_counter()) > 0:
                    time.sleep(left)
                assert ask(connection, "echo.say", b"1", timeout=30_000) == b"1"
                waits.append((time.perf_counter() - due) * 1000)

    threads = [threading.Thread(target=one, args=(offset,)) for offset in range(CONNECTIONS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(waits) == seconds * RATE // CONNECTIONS * CONNECTIONS, "some calls failed"
    return waits


def p99(waits):
    return sorted(waits)[len(waits) * 99 // 100]


@contextlib.contextmanager
def busy(count):
    """Native loops that do nothing."""
    loops = [subprocess.Popen(["sh", "-c", "while :; do :; done"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


@contextlib.contextmanager
def guests(server, topics, threads):
    """So many connections that each call the topics in turn."""
    stop = threading.Event()
    outcomes = {}

    def call(start):
        with server.connect() as connection:
            turn = start
            while not stop.is_set():
                topic = topics[turn % len(topics)]
                answer = ask(connection, topic, timeout=500)
                code = json.loads(answer).get("code", "-") if answer.startswith(b"{") else "-"
                outcomes.setdefault(topic, set()).add(code)
                turn += 1

    running = [threading.Thread(target=call, args=(start,)) for start in range(threads)]
    for thread in running:
        thread.start()
    try:
        yield outcomes
    finally:
        stop.set()
        for thread in running:
            thread.join()


def pairs(name, server, topics, threads, bound):
    ratios = []
    for _ in range(PAIRS):
        with busy(threads):
            beside_native = p99(quick_calls(server, SECONDS))
        with guests(server, topics, threads) as outcomes:
            beside_guests = p99(quick_calls(server, SECONDS))
        ratios.append(beside_guests / beside_native)
        print(f"{name}: p99 {beside_guests:.1f} ms beside guests, {beside_native:.1f} ms beside native loops, "
              f"resident {resident(server)} MiB", flush=True)
    print(f"{name}: {len(outcomes)} verbs, median ratio {statistics.median(ratios):.2f}, bound {bound}", flush=True)
    return statistics.median(ratios) <= bound


def harm():
    with serving("echo.wasm", "hostile.wasm", "greedy.wasm", settings=GRANTS) as server:
        fine = pairs("harm", server, HOSTILE, 1, 1.5)
        return fine and resident(server) <= 256 * 1.1


def loops():
    with serving("echo.wasm", "hostile.wasm") as server:
        fine = pairs("loops", server, ["hostile.spin"], 8, 2.0)
        late = []

        def spin():
            with server.connect() as connection:
                begun = time.perf_counter()
                assert b"TIMEOUT" in ask(connection, "hostile.spin", timeout=1000)
                late.append((time.perf_counter() - begun) * 1000 - 1000)

        threads = [threading.Thread(target=spin) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print(f"loops: eight endless loops ended at most {max(late):.1f} ms after their deadline")
        return fine and len(late) == 8 and max(late) < 500


def kill():
    """kill -9 while four connections count, fifty times over one store."""
    acknowledged = sent = 0
    with tempfile.TemporaryDirectory() as state:
        for _ in range(50):
            with serving("counter.wasm", settings=GRANTS) as server:
                server.process.kill()
                server.process.wait()
                os.environ["MB_CONFIG"] = str(server.folder / "mb.toml")
                server = soak.Server(server.folder / "services", state_dir=state)
                counts = [[0, 0] for _ in range(4)]

                def count(mine):
                    with contextlib.suppress(OSError, AssertionError):
                        connection = server.connect()
                        while True:
                            mine[1] += 1
                            assert b"value" in ask(connection, "counter.add", b'{"name":"n"}')
                            mine[0] += 1

                with server.connect() as connection:
                    before = json.loads(ask(connection, "counter.get", b'{"name":"n"}'))["value"]
                if not acknowledged <= before <= sent:
                    print(f"kill: {before} counted, {acknowledged} acknowledged, {sent} sent")
                    return False
                threads = [threading.Thread(target=count, args=(mine,)) for mine in counts]
                for thread in threads:
                    thread.start()
                goal = random.randrange(5, 200)
                while sum(mine[0] for mine in counts) < goal:
                    time.sleep(0.001)
                server.process.kill()
                server.process.wait()
                for thread in threads:
                    thread.join()
                # Of what was found before, all counts as both.
                acknowledged = before + sum(mine[0] for mine in counts)
                sent = before + sum(mine[1] for mine in counts)
    print(f"kill: 50 kills, at last {acknowledged} acknowledged, {sent} sent")
    return True


def mutated():
    """A thousand broken files in the place of a good one."""
    with serving("echo.wasm", reload_interval="50ms") as server:
        path = server.folder / "services/echo.wasm"
        whole = path.read_bytes()
        answers, done = [0], threading.Event()

        def call():
            with server.connect() as connection:
                while not done.is_set():
                    assert ask(connection, "echo.say", b"[1,2]") == b"[1,2]"
                    answers[0] += 1

        caller = threading.Thread(target=call)
        caller.start()
        token = (server.folder / "state/admin.token").read_text().strip()
        refused = 0
        for seed in range(1000):
            rng = random.Random(seed)
            mutant = bytearray(whole)
            for _ in range(rng.randrange(1, 20)):
                mutant[rng.randrange(8, len(mutant))] = rng.randrange(256)
            part = path.with_name(".part")
            # A section that nobody knows: none of them can be valid by chance.
            # One in five is cut off besides, and may still be being copied.
            mutant += b"\x7f\x01\0"
            part.write_bytes(mutant[: -rng.randrange(4, 200)] if seed % 5 == 0 else mutant)
            part.rename(path)
            answer = post(server, "/services/reload", token)
            refused += "not served" in answer
        assert caller.is_alive(), "a call was answered otherwise"
        done.set()
        caller.join()
    print(f"mutated: 1,000 files, {refused} refused, the others cut off and waited for, {answers[0]} right answers meanwhile")
    return answers[0] > 1000


def post(server, path, token):
    with socket.create_connection(server.admin) as admin:
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 0\r\n"
        admin.sendall(f"{head}Authorization: Bearer {token}\r\n\r\n".encode())
        return b"".join(iter(lambda: admin.recv(65536), b"")).decode()


def memory():
    """Sixty connections take all the memory they can, for 15 s."""
    with serving("echo.wasm", "hostile.wasm") as server:
        with guests(server, ["hostile.allocate"], 60) as outcomes:
            waits = quick_calls(server, 15)
        status = open(f"/proc/{server.process.pid}/status").read()
        peak = int(status.split("VmHWM:")[1].split()[0]) // 1024
    print(f"memory: at most {peak} MiB resident of memory = 256 MiB, outcomes {sorted(outcomes['hostile.allocate'])}, "
          f"quick calls p99 {p99(waits):.1f} ms")
    return peak <= 256 * 1.1


def small():
    """Little memory, and no large reservations."""
    soak.SERVER, real = soak.ROOT / "target/release/small-server", soak.SERVER
    soak.SERVER.write_text(f'#!/bin/sh\nulimit -v 2000000\nexec {real} "$@"\n')
    soak.SERVER.chmod(0o755)
    try:
        with serving("echo.wasm", "hostile.wasm", memory="64MiB") as server:
            connections = [server.connect() for _ in range(100)]
            for turn in range(3000):
                assert ask(connections[turn % 100], "echo.say", b"1") == b"1"
            for _ in range(10):
                assert b'"memory"' in ask(connections[0], "hostile.allocate", timeout=60_000)
            assert ask(connections[0], "hostile.ok") == b'{"ok":true}'
            print(f"small: memory 64 MiB under ulimit -v 2000000: 100 connections served, resident {resident(server)} MiB")
            return resident(server) <= 64 * 1.1
    finally:
        soak.SERVER.unlink()
        soak.SERVER = real


def modes():
    """Time per call in each isolation mode, from the server's own histogram."""
    for size in (64, 4096, 65536):
        row = []
        for isolation in ("request", "shared"):
            settings = f'[services.default]\nisolation = "{isolation}"'
            with serving("echo.wasm", settings=settings) as server, server.connect() as connection:
                payload = b'"' + b"x" * (size - 2) + b'"'
                for _ in range(5000):
                    ask(connection, "echo.say", payload)
                latency = json.loads(get(server, "/services"))["services"][0]["latency"]
                row.append(f"{isolation} p50 {latency['p50Ms'] * 1000:.0f} p99 {latency['p99Ms'] * 1000:.0f}")
        print(f"modes: {size:6} B, microseconds: {', '.join(row)}", flush=True)
    return True


def get(server, path):
    with socket.create_connection(server.admin) as admin:
        admin.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        return b"".join(iter(lambda: admin.recv(65536), b"")).split(b"\r\n\r\n", 1)[1]


if __name__ == "__main__":
    scenarios = {"harm": harm, "loops": loops, "kill": kill, "mutated": mutated, "memory": memory, "small": small, "modes": modes}
    broken = [name for name in sys.argv[1:] or scenarios if not scenarios[name]()]
    sys.exit(f"bound broken: {', '.join(broken)}" if broken else 0)
