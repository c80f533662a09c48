#!/usr/bin/env python3
"""Unauthenticated peers of a real server: what they cost authenticated ones.

    cargo build --release && python3 tests/load/edge.py [guess|drip|drip-http|unread|files|haproxy|idle|idle-http]...

Starts its own servers on free loopback ports, prints figures, exits 1 where a
bound is broken. Needs Linux; `haproxy` needs that program.
"""
import json
import multiprocessing
import os
import pathlib
import resource
import selectors
import shutil
import socket
import ssl
import statistics
import struct
import subprocess
import sys
import tempfile
import time

import soak

ROOT = pathlib.Path(__file__).resolve().parents[2]
SERVER = ROOT / "target/release/mb-server"
SERVICES = ROOT / "services/dist"
broken = []


def bound(name, value, limit, unit=""):
    print(f"  {name}: {value:.2f}{unit} (bound {limit}{unit})", flush=True)
    if value > limit:
        broken.append(name)


class Server:
    def __init__(self, settings="", before=()):
        self.dir = tempfile.TemporaryDirectory()
        self.state = pathlib.Path(self.dir.name)
        file = self.state / "mb.toml"
        common = f'port = 0\nlog = "off"\nstate_dir = "{self.state}"\nadmin = {{ port = 0 }}\n'
        file.write_text(common + settings + "\n")
        self.process = subprocess.Popen([*before, SERVER, "serve", "--services", SERVICES, "--config", file],
                                        stdout=subprocess.PIPE, text=True)
        self.listeners, self.admin = soak.addresses(self.process)
        self.address = self.listeners[0]

    def token(self):
        made = subprocess.run([SERVER, "token", "new", "ann", "--right", "*", "--file", self.state / "tokens.json"],
                              capture_output=True, text=True, check=True)
        time.sleep(1.2)  # the server looks for changes twice a second
        return made.stdout.strip()

    def page(self, path):
        with socket.create_connection(self.admin, timeout=5) as admin:
            admin.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            answer = b"".join(iter(lambda: admin.recv(65536), b""))
        return answer.split(b"\r\n\r\n", 1)[1].decode()

    def connections(self):
        return json.loads(self.page("/connections"))["connections"]

    def metric(self, name):
        return sum(float(line.split()[-1]) for line in self.page("/metrics").splitlines() if line.startswith(name))

    def resident(self):
        status = dict(line.split(":", 1) for line in open(f"/proc/{self.process.pid}/status"))
        return int(status["VmRSS"].split()[0])

    def cpu(self):
        fields = open(f"/proc/{self.process.pid}/stat").read().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self):
        self.process.terminate()
        self.process.wait()


def frame(topic, number, payload):
    body = f"REQUEST:{topic}:1.0.0:{number}\n{payload}".encode()
    return struct.pack(">II", len(body), 0) + body


def read(connection):
    def exactly(count):
        data = b""
        while len(data) < count:
            more = connection.recv(count - len(data))
            if not more:
                raise EOFError
            data += more
        return data
    length, _ = struct.unpack(">II", exactly(8))
    return exactly(length)


def enter(address, token):
    """A connection that is admitted; unauthenticated peers may have to be evicted first."""
    for _ in range(200):
        connection = socket.create_connection(address, timeout=10)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            connection.sendall(frame("system.hello", 1, json.dumps({"token": token})))
            if read(connection).startswith(b"RESPONSE"):
                return connection
        except (EOFError, OSError):
            pass
        connection.close()
        time.sleep(0.02)
    raise SystemExit("a peer with a token does not get in")


def p99(connection, seconds, rate):
    """Of requests that are due at a fixed rate, counted from when they were due."""
    times, begun = [], time.perf_counter()
    for number in range(int(seconds * rate)):
        due = begun + number / rate
        time.sleep(max(0, due - time.perf_counter()))
        connection.sendall(frame("echo.say", number, '"text"'))
        assert read(connection).startswith(b"RESPONSE")
        times.append(time.perf_counter() - due)
    return sorted(times)[int(len(times) * 0.99)] * 1000


def guesser(address, rate, told, seconds):
    begun, tries = time.perf_counter(), 0
    while time.perf_counter() < begun + seconds:
        time.sleep(max(0, begun + tries / rate - time.perf_counter()))
        tries += 1
        try:
            with socket.create_connection(address, timeout=5) as connection:
                connection.sendall(frame("system.hello", 1, '{"token":"mbt_guess"}'))
        except OSError:
            pass
    told.put(tries / (time.perf_counter() - begun))


def guess():
    print("guess: wrong tokens at 1,000/s beside a peer at 200/s, quiet and loud in turns")
    server = Server('auth = "required"')
    token = server.token()
    connection = enter(server.address, token)
    p99(connection, 1, 200)
    ratios = []
    for pair in range(5):
        quiet = p99(connection, 3, 200)
        told = multiprocessing.Queue()
        process = multiprocessing.Process(target=guesser, args=(server.address, 1000, told, 3.5))
        process.start()
        time.sleep(0.3)
        loud = p99(connection, 3, 200)
        rate = told.get()
        process.join()
        ratios.append(loud / quiet)
        print(f"  pair {pair + 1}: p99 {quiet:.2f} ms quiet, {loud:.2f} ms with {rate:.0f} failures/s", flush=True)
    print(f"  refused {server.metric('mb_auth_failures_total'):.0f}")
    bound("ratio of p99, median of 5", statistics.median(ratios), 2)
    server.stop()


def drippers(address, told, body, count, addresses, hold):
    """Opens all of them at once, drips a byte a second into each, and tells
    how long each lived."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (count + 100, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    selector, opened = selectors.DefaultSelector(), {}
    for number in range(count):
        connection = socket.socket()
        connection.setblocking(False)
        connection.bind((f"127.0.1.{number % addresses + 1}", 0))
        connection.connect_ex(address)
        opened[connection] = [time.monotonic(), 0]
        # Its life begins when the system says that it is connected.
        selector.register(connection, selectors.EVENT_READ | selectors.EVENT_WRITE)
        if number % 50 == 0:
            time.sleep(0.002)
    lives, end, next_drip = [], time.monotonic() + hold, time.monotonic()
    while opened and time.monotonic() < end:
        for key, events in selector.select(max(0, min(0.1, next_drip - time.monotonic()))):
            if events & selectors.EVENT_WRITE:
                opened[key.fileobj][0] = time.monotonic()
                selector.modify(key.fileobj, selectors.EVENT_READ)
                continue
            try:
                gone = not key.fileobj.recv(65536)
            except BlockingIOError:
                continue
            except OSError:
                gone = True
            if gone:
                selector.unregister(key.fileobj)
                lives.append(time.monotonic() - opened.pop(key.fileobj)[0])
                key.fileobj.close()
        if time.monotonic() >= next_drip:
            next_drip += 1
            for connection, drip in opened.items():
                try:
                    drip[1] += connection.send(body[drip[1]:drip[1] + 1])
                except OSError:
                    pass
    told.put((lives, len(opened)))


def drip():
    drip_with(5000, struct.pack(">II", 10_000, 0) + b"REQUEST:system.hello:1.0.0:1\n" + b" " * 100)


def drip_http():
    drip_with(2000, b"POST /call/echo.say HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 100)


def drip_with(count, body):
    print(f"drip: {count} peers of 200 addresses, a byte a second each of {body[:12]}, at a pool of 1,024")
    server = Server('auth = "required"\nmax_connections = 1024\nmemory = "512MiB"')
    token = server.token()
    peers = [enter(server.address, token) for _ in range(2)]
    ratios = []
    for pair in range(5):
        quiet = p99(peers[0], 4, 100)
        told = multiprocessing.Queue()
        process = multiprocessing.Process(target=drippers, args=(server.address, told, body, count, 200, 20))
        process.start()
        time.sleep(1.5)
        loud = p99(peers[1], 4, 100)
        newcomer = time.monotonic()
        enter(server.address, token).close()
        newcomer = time.monotonic() - newcomer
        lives, left = told.get()
        process.join()
        ratios.append(loud / quiet)
        print(f"  pair {pair + 1}: p99 {quiet:.2f} ms quiet, {loud:.2f} ms dripped on; a newcomer with a token was in "
              f"after {newcomer * 1000:.0f} ms; drippers lived {max(lives):.2f} s at most, {left} left", flush=True)
        bound("longest life of a dripper", max(lives) if not left else 99, 6, " s")
    print(f"  evicted {server.metric('mb_connections_evicted_total'):.0f}, "
          f"refused {server.metric('mb_connections_refused_total'):.0f}, resident {server.resident()} KiB")
    bound("ratio of p99, median of 5", statistics.median(ratios), 2)
    server.stop()


def unread():
    print("unread: 200 peers that never read their answers of 64 KiB, write_timeout 2 s")
    server = Server('write_timeout = "2s"')
    resident = []
    request = frame("echo.say", 1, '"' + "x" * 65_536 + '"')
    for _ in range(4):
        peers = [socket.create_connection(server.address) for _ in range(200)]
        left = {}
        for peer in peers:
            peer.setblocking(False)
            left[peer] = memoryview(request * 200)
        stalled = time.monotonic()
        while server.connections() and time.monotonic() < stalled + 20:
            for peer in list(left):
                try:
                    left[peer] = left[peer][peer.send(left[peer]):]
                    stalled = time.monotonic()
                except BlockingIOError:
                    pass
                except OSError:
                    del left[peer]
            time.sleep(0.005)
        freed = time.monotonic() - stalled
        assert not server.connections(), "some are still held"
        resident.append(server.resident())
        print(f"  resident {resident[-1]} KiB", flush=True)
        bound("all threads free, after the last byte was taken", freed, 3, " s")
        for peer in peers:
            peer.close()
    print(f"  write timeouts {server.metric('mb_write_timeouts_total'):.0f} of 800")
    # The first round makes the threads and instances that stay.
    bound("resident after the fourth round over the second", resident[-1] / resident[1], 1.1)
    server.stop()


def files():
    print("files: 128 open files, 500 connections")
    server = Server('read_timeout = "10s"', before=["prlimit", "--nofile=128:128"])
    peers = []
    for _ in range(500):
        peers.append(socket.create_connection(server.address, timeout=10))
    time.sleep(0.5)
    begun, cpu, slowest = time.monotonic(), server.cpu(), 0
    while time.monotonic() < begun + 5:
        asked = time.monotonic()
        assert '"ok"' in server.page("/healthz")
        slowest = max(slowest, time.monotonic() - asked)
        time.sleep(0.1)
    share = (server.cpu() - cpu) / (time.monotonic() - begun) * 100
    print(f"  full: {len(server.connections())} connections, refused {server.metric('mb_connections_refused_total'):.0f}, "
          f"accept errors {server.metric('mb_accept_errors_total'):.0f}, the admin endpoint's slowest answer "
          f"{slowest * 1000:.0f} ms")
    bound("processor while full", share, 20, " %")
    for peer in peers:
        peer.close()
    begun = time.monotonic()
    while True:
        try:
            with socket.create_connection(server.address, timeout=2) as peer:
                peer.sendall(frame("echo.say", 1, "1"))
                if read(peer).startswith(b"RESPONSE"):
                    break
        except (EOFError, OSError):
            pass
        if time.monotonic() > begun + 10:
            break
    bound("serving again after", time.monotonic() - begun, 2, " s")
    server.stop()


def haproxy():
    program = shutil.which("haproxy") or "/usr/sbin/haproxy"
    if not os.path.exists(program):
        print("haproxy: is not installed, so it was NOT tried")
        return
    print("haproxy: a real load balancer with PROXY v2 and health checks")
    server = Server('[[listeners]]\nport = 0\nproxy_from = ["127.0.0.1/32"]')
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = server.state / "haproxy.cfg"
    config.write_text(f"""
defaults
  mode tcp
  timeout connect 5s
  timeout client 30s
  timeout server 30s
listen mb
  bind 127.0.0.1:{port}
  server one 127.0.0.1:{server.listeners[1][1]} send-proxy-v2 check check-send-proxy inter 200
""")
    balancer = subprocess.Popen([program, "-f", config, "-db"], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 10
        while True:
            try:
                peer = socket.socket()
                peer.bind(("127.0.7.7", 0))
                peer.connect(("127.0.0.1", port))
                peer.settimeout(5)
                peer.sendall(frame("echo.say", 1, "1"))
                assert read(peer).startswith(b"RESPONSE")
                break
            except (EOFError, OSError):
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
        own = "%s:%d" % peer.getsockname()
        shown = [row["peer"] for row in server.connections()]
        print(f"  we are {own}, the admin endpoint shows {shown}")
        if own not in shown:
            broken.append("the real peer is shown")
        time.sleep(1)  # a few health checks
        print(f"  failed handshakes after health checks: {server.metric('mb_handshake_failures_total'):.0f}")
        with socket.create_connection(server.listeners[0], timeout=5) as untrusted:
            untrusted.sendall(b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c" + bytes(12))
            answer = read(untrusted)
        print(f"  a header from one who is not trusted: {answer[:80]!r}")
        if not answer.startswith(b"ERROR"):
            broken.append("a header from one who is not trusted is refused")
    finally:
        balancer.terminate()
        balancer.wait()
    server.stop()


def idle():
    """Quiet TLS connections, each of which has been served once."""
    count = 4000
    print(f"idle: {count} quiet TLS connections beside 32 that ask")
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([SERVER, "cert", "dev", folder], check=True, capture_output=True)
        ca = f"{folder}/ca.crt"
        server = Server(f'memory = "4GiB"\nidle_timeout = 600000\nmax_connections = {count + 100}\n'
                        f'[tls]\nport = 0\ncert = "{folder}/server.crt"\nkey = "{folder}/server.key"')
        context = ssl.create_default_context(cafile=ca)
        address = server.listeners[1]
        where = f"localhost:{address[1]}"

        def active():
            done = subprocess.run([SERVER, "bench", "echo.say", '"text"', "--server", where, "--ca", ca, "--threads", "1",
                                   "-c", "32", "-d", "2", "--warm-up", "1", "--json"],
                                  capture_output=True, text=True, check=True)
            return json.loads(done.stdout)["micros"]["p99"] / 1000

        def threads():
            return len(os.listdir(f"/proc/{server.process.pid}/task"))

        alone = statistics.median(active() for _ in range(5))
        before, threads_before = server.resident(), threads()
        quiet = []
        for number in range(count):
            connection = context.wrap_socket(socket.create_connection(address), server_hostname="localhost")
            connection.sendall(frame("echo.say", number, "1"))
            assert read(connection).startswith(b"RESPONSE")
            quiet.append(connection)
        bound("memory of each", (server.resident() - before) / count, 24, " KiB")
        bound("threads beyond those before", threads() - threads_before, 2)
        beside = statistics.median(active() for _ in range(5))
        print(f"  p99 of 32 that ask: {alone:.3f} ms alone, {beside:.3f} ms beside")
        bound("ratio of these", beside / alone, 1.3)
        server.stop()


def idle_http():
    """Quiet connections that stay, each of which has been served once over HTTP."""
    count = 10_000
    print(f"idle-http: {count} quiet connections of HTTP beside 32 that ask")
    server = Server(f'memory = "4GiB"\nidle_timeout = 600000\nmax_connections = {count + 100}')
    request = b"POST /call/echo.say HTTP/1.1\r\nHost: localhost\r\n\r\n"

    def active():
        done = subprocess.run([SERVER, "bench", "--http", "--server", "%s:%d" % server.address, "-c", "32", "-d", "2",
                               "--warm-up", "1", "--json"], capture_output=True, text=True, check=True)
        return json.loads(done.stdout)["micros"]["p99"] / 1000

    def threads():
        return len(os.listdir(f"/proc/{server.process.pid}/task"))

    alone = statistics.median(active() for _ in range(5))
    before, threads_before, quiet = server.resident(), threads(), []
    for _ in range(count):
        connection = socket.create_connection(server.address, timeout=10)
        connection.sendall(request)
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        quiet.append(connection)
    assert server.metric('mb_protocol_connections{protocol="http"}') == count
    bound("memory of each", (server.resident() - before) / count, 4, " KiB")
    bound("threads beyond those before", threads() - threads_before, 2)
    beside = statistics.median(active() for _ in range(5))
    print(f"  p99 of 32 that ask: {alone:.3f} ms alone, {beside:.3f} ms beside")
    bound("ratio of these", beside / alone, 1.3)
    for connection in quiet[::100]:
        connection.sendall(request)
        assert connection.recv(4096).startswith(b"HTTP/1.1 200"), "a quiet one is served on"
    server.stop()


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_NOFILE, (12_000, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    parts = {"guess": guess, "drip": drip, "drip-http": drip_http, "unread": unread, "files": files, "haproxy": haproxy,
             "idle": idle, "idle-http": idle_http}
    for name in sys.argv[1:] or parts:
        parts[name]()
    if broken:
        sys.exit("broken: " + ", ".join(broken))
    print("all within their bounds")
