#!/usr/bin/env python3
"""Durable writes a second: `counter.add` beside Redis that flushes each write.

    cargo build --release && python3 tests/load/store.py [--connections N]... [--seconds S] [--rounds N]
                                                         [--engine redb|redis] [--at-least RATIO] [--syscalls]
                                                         [--require]

Runs the server and `redis-server` with `appendfsync always` in turns, on one
disk (--folder), and asks each over loopback from the same number of
connections: `mb-server bench counter.add` here, `redis-benchmark -t incr`
there, both on one key. With `--engine redis` the server keeps its values in the
same Redis. Prints the rates, the flushes that each takes, and their
ratio; --syscalls counts system calls under strace afterwards. Exits 1 where a
ratio is below --at-least, or the counter is not what was answered. Without
Redis, it says `skipped: WHY` and exits 0, with --require 1.
"""
import argparse
import csv
import io
import json
import os
import pathlib
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time

import soak

ROOT = pathlib.Path(__file__).resolve().parents[2]
ADD = ("counter.add", '{"name":"n"}')


class Ours:
    name = "mb-server"

    def __init__(self, program, folder, url):
        self.program = program
        config, services = folder / "mb.toml", folder / "services"
        services.mkdir()
        shutil.copy(ROOT / "services/dist/granted/counter.wasm", services)
        config.write_text(f'services_dir = "{services}"\nstate_dir = "{folder}/state"\nport = 0\n'
                          f'reload_interval = 0\nlog = "error"\n[store]\nurl = "{url}"\n[admin]\nport = 0\n'
                          f'[services.counter.grants]\nkeyvalue = true\n')
        self.process = subprocess.Popen([program, "serve", "--config", config], stdout=subprocess.PIPE, text=True)
        ((host, port), *_), _ = soak.addresses(self.process)
        self.address, self.answered, self.sent = f"{host}:{port}", 0, 0

    def measure(self, connections, seconds=None, count=None):
        length = ["--duration", str(seconds)] if seconds else ["--count", str(count)]
        done = subprocess.run([self.program, "bench", *ADD, "--connections", str(connections), "--warm-up", "0",
                               *length, "--server", self.address, "--json"], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"bench: {done.stdout}{done.stderr}")
        result = json.loads(done.stdout)
        self.answered += result["answers"]
        # At the end, each connection has a request that is not waited for.
        self.sent += result["answers"] + connections
        return result["answersPerSecond"], result["micros"]["p50"] / 1e3, result["micros"]["p99"] / 1e3

    def counted(self):
        done = subprocess.run([self.program, "call", "counter.get", '{"name":"n"}', "--server", self.address],
                              capture_output=True, text=True, check=True)
        return json.loads(done.stdout)["value"]

    def stop(self):
        self.process.terminate()
        self.process.wait(20)


class Redis:
    name = "redis"

    def __init__(self, folder):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = str(free.getsockname()[1])
        self.rate = 1000
        self.process = subprocess.Popen(
            ["redis-server", "--port", self.port, "--bind", "127.0.0.1", "--dir", folder, "--save", "",
             "--appendonly", "yes", "--appendfsync", "always", "--daemonize", "no"],
            stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            try:
                return socket.create_connection(("127.0.0.1", int(self.port))).close()
            except OSError:
                time.sleep(0.05)
        sys.exit("redis-server did not start")

    def measure(self, connections, seconds=None, count=None):
        # It is told how many, and not how long.
        count = count or max(1000, int(self.rate * seconds))
        done = subprocess.run(["redis-benchmark", "-h", "127.0.0.1", "-p", self.port, "-c", str(connections),
                               "-n", str(count), "-t", "incr", "--csv"], capture_output=True, text=True)
        row = next((row for row in csv.DictReader(io.StringIO(done.stdout)) if row["test"].startswith("INCR")), None)
        if row is None:
            sys.exit(f"redis-benchmark: {done.stdout}{done.stderr}")
        self.rate = float(row["rps"])
        return self.rate, float(row["p50_latency_ms"]), float(row["p99_latency_ms"])

    def stop(self):
        self.process.terminate()
        self.process.wait(20)


def flushes(process):
    """Writes to the disk that a process has asked for so far, in bytes."""
    return int(dict(line.split(": ") for line in open(f"/proc/{process.pid}/io"))["write_bytes"])


def bare(folder):
    """Flushes a second of the disk itself, of one block that is appended and of
    one that is written over."""
    rates = []
    for offset in (lambda i: i * 4096, lambda i: i % 256 * 4096):
        file = os.open(folder / "bare", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        if rates:
            os.pwrite(file, bytes(256 * 4096), 0)
            os.fsync(file)
        begun, count = time.monotonic(), 0
        while time.monotonic() < begun + 1:
            os.pwrite(file, b"x" * 4096, offset(count))
            os.fdatasync(file)
            count += 1
        rates.append(count / (time.monotonic() - begun))
        os.close(file)
        os.unlink(folder / "bare")
    return rates


def trace(subject, connections, count):
    """System calls of a subject for each of so many writes."""
    with tempfile.NamedTemporaryFile("r") as out:
        strace = subprocess.Popen(["strace", "-f", "-c", "-U", "name,calls", "-S", "calls", "-p",
                                   str(subject.process.pid), "-o", out.name], stderr=subprocess.PIPE, text=True)
        strace.stderr.readline()
        time.sleep(0.5)
        subject.measure(connections, count=count)
        strace.send_signal(signal.SIGINT)
        strace.wait(20)
        rows = [line.split() for line in out.read().splitlines()]
    calls = {row[0]: int(row[1]) for row in rows if len(row) == 2 and row[1].isdigit() and row[0] != "total"}
    print(f"  {subject.name}, {connections} connections, system calls of 1,000 writes: "
          + ", ".join(f"{name} {calls[name] * 1000 / count:.0f}" for name in list(calls)[:12]))


def run(arguments, folder):
    appended, over = bare(folder)
    print(f"the disk: {appended:,.0f} flushes a second of a block that is appended, {over:,.0f} of one written over")
    (folder / "redis").mkdir()
    redis = Redis(folder / "redis")
    ours = Ours(arguments.server, folder, f"redis://127.0.0.1:{redis.port}" if arguments.engine == "redis" else "")
    failed = False
    try:
        for connections in arguments.connections or [32, 1]:
            for subject in (ours, redis):
                subject.measure(connections, count=2000)
            found = {subject.name: [] for subject in (ours, redis)}
            for round in range(arguments.rounds):
                for subject in (ours, redis) if round % 2 == 0 else (redis, ours):
                    before = flushes(subject.process)
                    rate, p50, p99 = subject.measure(connections, seconds=arguments.seconds)
                    found[subject.name].append(rate)
                    written = (flushes(subject.process) - before) / (rate * arguments.seconds)
                    print(f"  {subject.name}, {connections} connections: {rate:,.0f} writes/s, p50 {p50:.2f} ms, "
                          f"p99 {p99:.2f} ms, {written:,.0f} bytes to the disk for each", flush=True)
            ratios = [a / b for a, b in zip(*found.values())]
            ratio = statistics.median(ratios)
            failed |= ratio < arguments.at_least
            print(f"{connections} connections: {statistics.median(found['mb-server']):,.0f} against "
                  f"{statistics.median(found['redis']):,.0f} writes a second, {ratio:.2f} of Redis "
                  f"({min(ratios):.2f} to {max(ratios):.2f})", flush=True)
        if arguments.syscalls:
            for connections in arguments.connections or [32, 1]:
                for subject in (ours, redis):
                    trace(subject, connections, 3000)
        counted = ours.counted()
        if not ours.answered <= counted <= ours.sent:
            print(f"BROKEN: {ours.answered} answered, {ours.sent} sent, and the counter is {counted}")
            failed = True
    finally:
        ours.stop()
        redis.stop()
    left = sorted(path.name for path in (folder / "state").glob("store.*"))
    if left != ([] if arguments.engine == "redis" else ["store.redb"]):
        print(f"BROKEN: an end in order leaves {left}")
        failed = True
    return failed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", default=ROOT / "target/release/mb-server")
    parser.add_argument("--folder", default=ROOT / "target", help="on the disk to measure")
    parser.add_argument("--connections", type=int, action="append")
    parser.add_argument("--seconds", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--at-least", type=float, default=0)
    parser.add_argument("--engine", choices=["redb", "redis"], default="redb")
    parser.add_argument("--syscalls", action="store_true")
    parser.add_argument("--require", action="store_true")
    arguments = parser.parse_args()
    missing = [name for name in ("redis-server", "redis-benchmark") if not shutil.which(name)]
    if missing:
        print(f"skipped: {' and '.join(missing)} not installed")
        sys.exit(1 if arguments.require else 0)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        failed = run(arguments, pathlib.Path(folder))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
