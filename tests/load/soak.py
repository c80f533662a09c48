#!/usr/bin/env python3
"""Loads a real server and holds what it costs against the bounds.

    cargo build --release && python3 tests/load/soak.py [rounds|slow|hostile|drain]...

Starts its own server on free loopback ports, prints figures, exits 1 where a
bound is broken. Needs Linux (/proc) and nothing but Python.
"""
import json
import os
import pathlib
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.parse

ROOT = pathlib.Path(__file__).resolve().parents[2]
SERVER = ROOT / "target/release/mb-server"


def addresses(process):
    """Where a server listens, and where its admin endpoint does, as (host,
    port), once it is ready. Ends the script if the server ends before."""
    listeners, admin, said = [], None, ""
    for line in process.stdout:
        said += line
        match line.split():
            case ["listening", where, *_]:
                host, port = where.rsplit(":", 1)
                listeners.append((host, int(port)))
            case ["admin", where]:
                url = urllib.parse.urlsplit(where)
                admin = (url.hostname, url.port)
            case ["ready", "in", *_]:
                return listeners, admin
    sys.exit(f"the server did not start; was it built?\n{said}")


class Server:
    def __init__(self, services, **settings):
        env = dict(os.environ, MB_PORT="0", MB_ADMIN__PORT="0", MB_LOG="off")
        env.update({f"MB_{name.upper()}": str(value) for name, value in settings.items()})
        self.process = subprocess.Popen(
            [SERVER, "serve", "--services", services], env=env, stdout=subprocess.PIPE, text=True)
        (self.address, *_), self.admin = addresses(self.process)

    def usage(self):
        """Descriptors, threads and resident KiB, once nobody is connected."""
        deadline = time.monotonic() + 30
        while self.connections() > 0:
            assert time.monotonic() < deadline, "connections were left over"
        status = dict(line.split(":", 1) for line in open(f"/proc/{self.process.pid}/status"))
        files = len(os.listdir(f"/proc/{self.process.pid}/fd"))
        return files, int(status["Threads"]), int(status["VmRSS"].split()[0])

    def connections(self):
        with socket.create_connection(self.admin) as admin:
            admin.sendall(b"GET /connections HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            answer = b"".join(iter(lambda: admin.recv(65536), b""))
        return len(json.loads(answer.split(b"\r\n\r\n", 1)[1])["connections"])

    def connect(self):
        connection = socket.create_connection(self.address)
        connection.settimeout(30)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def stop(self):
        self.process.terminate()
        assert self.process.wait(20) == 0


def exactly(connection, size):
    data = b""
    while len(data) < size:
        piece = connection.recv(size - len(data))
        assert piece, "the stream ended early"
        data += piece
    return data


def ask(connection, topic, payload=b"", timeout=5000):
    body = f"REQUEST:{topic}:1.0.0:1::{timeout}\n".encode() + payload
    connection.sendall(struct.pack(">II", len(body), 0) + body)
    length, _ = struct.unpack(">II", exactly(connection, 8))
    return exactly(connection, length).split(b"\n", 1)[1]


def rounds():
    server = Server(ROOT / "services/dist")
    usages = []
    for _ in range(3):
        for _ in range(10_000):
            with server.connect() as connection:
                assert ask(connection, "echo.say", b"1") == b"1"
        many = [server.connect() for _ in range(1000)]
        for connection in many:
            assert ask(connection, "echo.say", b"1") == b"1"
        for connection in many:
            connection.close()
        usages.append(server.usage())
        print("rounds: files %d, threads %d, resident %d KiB" % usages[-1], flush=True)
    server.stop()
    (files, threads, resident), last = usages[0], usages[-1]
    return last[0] == files and last[1] <= threads * 1.1 and last[2] <= resident * 1.1


def slow():
    server = Server(ROOT / "services/dist", read_timeout="2s")
    before = server.usage()[2]
    begun = time.monotonic()
    peers = [server.connect() for _ in range(500)]
    for peer in peers:
        peer.sendall(struct.pack(">II", 1 << 20, 0))
    while server.connections() < 500:
        assert time.monotonic() - begun < 2, "they did not come in time"
    held = int(next(line for line in open(f"/proc/{server.process.pid}/status") if "VmRSS" in line).split()[1])
    for peer in peers:
        length, _ = struct.unpack(">II", exactly(peer, 8))
        assert b"READ_TIMEOUT" in exactly(peer, length)
        assert peer.recv(1) == b""
    elapsed = time.monotonic() - begun
    print(f"slow: 500 peers cost {held - before} KiB, all closed {elapsed:.2f} s after the first came")
    server.stop()
    return held - before < 32 * 1024 and elapsed < 4


def hostile():
    server = Server(ROOT / "tests/guests/dist")
    connection = server.connect()
    late = []
    for _ in range(100):
        begun = time.monotonic()
        assert json.loads(ask(connection, "hostile.spin", timeout=100))["code"] == "TIMEOUT"
        late.append((time.monotonic() - begun) * 1000 - 100)
    good = sum(ms <= 50 for ms in late)
    print(f"hostile: spin ended {max(late):.1f} ms after its timeout at most, {good} of 100 within 50 ms", flush=True)
    resident = []
    for count in (20, 1000):
        for action, reason in [
            ("allocate", "memory"), ("trap", "trap"), ("recurse", "stack"), ("answer-too-large", "answer-size")]:
            for _ in range(count):
                answer = json.loads(ask(connection, f"hostile.{action}"))
                assert answer["details"]["reason"] == reason, answer
        assert ask(connection, "hostile.ok") == b'{"ok":true}'
        status = dict(line.split(":", 1) for line in open(f"/proc/{server.process.pid}/status"))
        resident.append(int(status["VmRSS"].split()[0]))
    print(f"hostile: resident {resident[0]} KiB after 20 of each, {resident[1]} KiB after 1,000 of each")
    connection.close()
    server.stop()
    return good >= 99 and resident[1] <= resident[0] * 1.1


def drain():
    """SIGTERM under load from 50 connections, five times."""
    for _ in range(5):
        server = Server(ROOT / "tests/guests/dist")
        told, cut, answered = [], [], []

        def load():
            connection, count, sent = server.connect(), 0, 0
            body = b'REQUEST:hostile.sleep-spin:1.0.0:1\n{"ms":2}'
            frame = struct.pack(">II", len(body), 0) + body
            try:
                while True:
                    try:
                        connection.sendall(frame * 4)
                    except OSError:
                        pass
                    for _ in range(4):
                        length, _ = struct.unpack(">II", exactly(connection, 8))
                        message = exactly(connection, length)
                        if message.startswith(b"ERROR:system.error") and b"SHUTTING_DOWN" in message:
                            told.append(connection.recv(1) == b"")
                            answered.append(count)
                            connection.close()
                            return
                        assert message.startswith(b"RESPONSE:"), message
                        count += 1
            except (OSError, AssertionError) as error:
                cut.append(repr(error))

        threads = [threading.Thread(target=load) for _ in range(50)]
        for thread in threads:
            thread.start()
        while server.connections() < 50:
            pass
        server.process.terminate()
        for thread in threads:
            thread.join(30)
        code = server.process.wait(20)
        print(f"drain: {len(told)} told, {sum(answered)} answered, {len(cut)} cut off, exit {code}", flush=True)
        if len(told) != 50 or not all(told) or cut or code != 0:
            print(cut[:3])
            return False
    return True


if __name__ == "__main__":
    scenarios = {"rounds": rounds, "slow": slow, "hostile": hostile, "drain": drain}
    broken = [name for name in sys.argv[1:] or scenarios if not scenarios[name]()]
    sys.exit(f"bound broken: {', '.join(broken)}" if broken else 0)
