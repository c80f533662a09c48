#!/usr/bin/env python3
"""Has peers and guests make a real server hold what they can, by one route
after another, and holds its resident memory against the setting `memory`.

    cargo build --release && python3 tests/load/memory.py [ROUTE]...

Starts its own server for each route, on free loopback ports, with `memory =
"64MiB"`. Prints a table of each route's peak: the most resident memory since
the server was ready, less what it was then. Exits 1 where that exceeds
`memory` and 64 MiB more, which are for what `memory` does not count. Two
minutes; `--server FILE` measures another build. Needs Linux (/proc).
"""
import argparse
import contextlib
import json
import pathlib
import resource
import selectors
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter

import soak

ROOT = pathlib.Path(__file__).resolve().parents[2]
MEMORY, BEYOND = 64, 64
# The most that the server derives from `memory`.
CONNECTIONS = 256
MIB = 1024 * 1024
GREEDY = """
[services.greedy.grants]
keyvalue = true
calls = ["greedy.call", "echo.*", "hostile.spin"]
"""
COMMON = f"""
port = 0
log = "off"
memory = "{MEMORY}MiB"
admin = {{ port = 0 }}
"""


class Server:
    def __init__(self, program, folder, settings, components):
        services = folder / "services"
        services.mkdir()
        for component in components:
            found = next(path for base in ("services/dist", "services/dist/granted", "tests/guests/dist", "tests/fixtures")
                         if (path := ROOT / base / component).is_file())
            shutil.copyfile(found, services / component)
        (folder / "mb.toml").write_text(f'state_dir = "{folder}/state"\n{COMMON}{settings}')
        self.process = subprocess.Popen(
            [program, "serve", "--services", services, "--config", folder / "mb.toml"], stdout=subprocess.PIPE, text=True)
        (self.address, *_), self.admin = soak.addresses(self.process)
        # The peak counts from here.
        pathlib.Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")
        self.ready = self.status("VmRSS")

    def status(self, field):
        """MiB."""
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split(field + ":")[1].split()[0]) / 1024

    def peak(self):
        return self.status("VmHWM") - self.ready


def request(topic, payload, number=1, timeout=8000, binary=False):
    body = f"REQUEST:{topic}:1.0.0:{number}::{timeout}\n".encode() + payload
    return struct.pack(">II", len(body), 2 if binary else 0) + body


def flood(address, streams, seconds, reads=True, enough=None):
    """Sends each stream on a connection of its own, as far as the server takes
    it; reads what comes back, or nothing. Ends when all have been answered
    `enough` times, or when the time is over."""
    selector, connections = selectors.DefaultSelector(), []
    events = selectors.EVENT_WRITE | (selectors.EVENT_READ if reads else 0)
    for stream in streams:
        connection = socket.socket()
        if not reads:
            # What the kernel takes is nothing that the server holds.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(address)
        connection.setblocking(False)
        connections.append(connection)
        selector.register(connection, events, [memoryview(stream), bytearray()])
    until, left, heads = time.monotonic() + seconds, len(connections), Counter()
    while left and (remaining := until - time.monotonic()) > 0:
        for key, ready in selector.select(min(remaining, 0.2)):
            unsent, got = key.data
            try:
                if ready & selectors.EVENT_WRITE:
                    key.data[0] = unsent = unsent[key.fileobj.send(unsent[:256 * 1024]):]
                if ready & selectors.EVENT_READ:
                    piece = key.fileobj.recv(1 << 20)
                    got += piece
                    if not piece or enough and answers(got) >= enough:
                        heads.update(kinds(got))
                        raise ConnectionResetError
                if not unsent and ready & selectors.EVENT_WRITE:
                    if reads:
                        selector.modify(key.fileobj, selectors.EVENT_READ, key.data)
                    else:
                        selector.unregister(key.fileobj)
            except BlockingIOError:
                pass
            except OSError:
                left -= 1
                selector.unregister(key.fileobj)
    if not reads:
        time.sleep(max(0, until - time.monotonic()))
    for connection in connections:
        connection.close()
    return heads


def messages(got):
    at = 0
    while at + 8 <= len(got):
        begin, at = at + 8, at + 8 + struct.unpack_from(">I", got, at)[0]
        if at <= len(got):
            yield begin, at


def answers(got):
    return sum(1 for _ in messages(got))


def kinds(got):
    """RESPONSE, or the code of an ERROR."""
    for begin, end in messages(got):
        head, _, text = bytes(got[begin:min(end, begin + 500)]).partition(b"\n")
        kind = head.split(b":")[0].decode()
        yield kind if kind == "RESPONSE" else text.split(b'"code":"')[-1].split(b'"')[0].decode()


def zeros(size):
    return b"[" + b"0," * (size // 2 - 2) + b"0]"


ROUTES = {}


def route(*components, settings=""):
    def add(function):
        ROUTES[function.__name__] = (function, components, settings)
        return function
    return add


@route("echo.wasm")
def keep_alives(server):
    """KEEPALIVE frames of peers that read no answer."""
    return flood(server.address, [b"\0\0\0\0\0\0\0\1" * (MIB // 4)] * CONNECTIONS, 5, reads=False)


@route("echo.wasm")
def half_messages(server):
    """Messages of which the last byte does not come."""
    return flood(server.address, [request("echo.say", bytes(MIB - 100), binary=True)[:-1]] * CONNECTIONS, 5, reads=False)


@route("echo.wasm")
def echoes(server):
    """Answers of 1 MiB that nobody reads."""
    return flood(server.address, [request("echo.say", bytes(MIB - 100), binary=True)] * CONNECTIONS, 5, reads=False)


HANDSHAKE = b"\r\n".join([
    b"GET /ws HTTP/1.1", b"Host: localhost", b"Upgrade: websocket", b"Connection: Upgrade",
    b"Sec-WebSocket-Version: 13", b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", b"", b""])


def websocket_frame(first, payload):
    """A frame of a client, whose mask is all zeros."""
    length = len(payload)
    head = struct.pack(">BB", first, 0x80 | length) if length < 126 else struct.pack(">BBQ", first, 0xff, length)
    return head + bytes(4) + payload


@route("echo.wasm")
def websocket_halves(server):
    """Messages of WebSocket of which the last byte does not come."""
    half = HANDSHAKE + websocket_frame(0x82, bytes(MIB - 100))[:-1]
    return flood(server.address, [half] * CONNECTIONS, 5, reads=False)


@route("echo.wasm")
def websocket_pieces(server):
    """Messages of WebSocket in pieces of one byte, without an end."""
    pieces = HANDSHAKE + websocket_frame(0x02, b"x") + websocket_frame(0x00, b"x") * (MIB // 2)
    return flood(server.address, [pieces] * CONNECTIONS, 5, reads=False)


@route("echo.wasm")
def websocket_pings(server):
    """Pings of peers that read no pong."""
    pings = HANDSHAKE + websocket_frame(0x89, bytes(125)) * (MIB // 64)
    return flood(server.address, [pings] * CONNECTIONS, 5, reads=False)


@route("hostile.wasm")
def answers_only(server):
    """Small requests with answers of 1 MiB that nobody reads."""
    asks = b"".join(request("hostile.answer-too-large", b'{"bytes":1000000}', number) for number in range(32))
    return flood(server.address, [asks] * CONNECTIONS, 6, reads=False)


@route("hostile.wasm")
def answers_middling(server):
    """The same with answers that fit into what an instance keeps."""
    asks = b"".join(request("hostile.answer-too-large", b'{"bytes":300000}', number) for number in range(32))
    return flood(server.address, [asks] * CONNECTIONS, 6, reads=False)


@route("greedy.wasm", settings=GREEDY)
def slow_calls(server):
    """As many slow calls as connections may have, each with a message of the
    first size of a buffer."""
    naps = b"".join(
        request("greedy.nap", b'{"ms":1500,"more":"%s"}' % (b"x" * 6000), number, 6000) for number in range(64))
    return flood(server.address, [naps] * CONNECTIONS, 7, enough=64)


@route("greedy.wasm", settings=GREEDY)
def slow_large(server):
    """Slow calls whose messages are large, with more behind them."""
    naps = b"".join(
        request("greedy.nap", b'{"ms":1500,"more":"%s"}' % (b"x" * 200_000), number, 6000) for number in range(64))
    return flood(server.address, [naps] * CONNECTIONS, 7, enough=64)


def system(server, topic, payload):
    return flood(server.address, [request(topic, payload) * 8] * 24, 6, enough=8)


@route("echo.wasm")
def hello(server):
    """1 MiB of JSON numbers in `system.hello`."""
    return system(server, "system.hello", zeros(MIB - 100))


@route("echo.wasm")
def hello_objects(server):
    """The same in a field of its object, as small objects."""
    return system(server, "system.hello", b'{"more":[%s{}]}' % (b'{"":0},' * ((MIB - 200) // 7)))


@route("echo.wasm")
def ping(server):
    """1 MiB of JSON numbers in `system.ping`."""
    return system(server, "system.ping", zeros(MIB - 100))


@route("echo.wasm")
def services(server):
    """1 MiB of small objects in `system.services`."""
    return system(server, "system.services", b'{"more":[%s{}]}' % (b'{"":0},' * ((MIB - 200) // 7)))


@route("calc.wasm", settings="[services.calc]\nvalidate = true\n")
def validated(server):
    """1 MiB of small objects, held against the schema of an action."""
    payload = b'{"a":1,"b":2,"more":[%s{}]}' % (b'{"":0},' * ((MIB - 200) // 7))
    return system(server, "calc.add", payload)


@route("hostile.wasm")
def failures(server):
    """Failed calls, with all that is kept of them."""
    kinds = ["panic", "trap", "recurse", "details", "bad-code", "no-such-" + "x" * 200]
    asks = b"".join(request("hostile." + kinds[number % 6], b"", f"{number:064}") for number in range(500))
    return flood(server.address, [asks] * 16, 8, enough=500)


@route("hostile.wasm", "greedy.wasm", settings=GREEDY)
def stacks(server):
    """Calls that use up the call stacks of as many threads as there may be:
    they wait for those that sleep, each with a thread of its own."""
    naps = b"".join(request("greedy.nap", b'{"ms":1500}', number) for number in range(16))
    asks = b"".join(request("hostile.recurse", b"", number) for number in range(32))
    streams = [naps] * 2 + [asks] * 40
    return flood(server.address, streams, 8, enough=16)


@route("greedy.wasm", settings=GREEDY + 'quota = "1MiB"\n')
def store_writes(server):
    """Writes of 100 KB that wait for the disk."""
    asks = b"".join(request("greedy.kv-quota", b"", number) for number in range(4))
    return flood(server.address, [asks] * CONNECTIONS, 8, enough=4)


@route("greedy.wasm", settings='[services.greedy]\nisolation = "shared"\n' + GREEDY)
def handles(server):
    """Handles that are never dropped, in instances that go on."""
    asks = b"".join(request("greedy.numbers", b'{"count":900,"keep":true}', number) for number in range(8))
    return flood(server.address, [asks] * 64, 6, enough=8)


@route("echo.wasm")
def admin_bodies(server):
    """Bodies of admin requests of which the last byte does not come."""
    head = f"POST /call HTTP/1.1\r\nHost: localhost\r\nContent-Length: {MIB}\r\n\r\n".encode()
    return flood(server.admin, [head + bytes(MIB - 1)] * 64, 4, reads=False)


@route("hostile.wasm")
def admin_answers(server):
    """Pages of the admin endpoint that nobody reads."""
    failures(server)
    page = b"GET /calls/past?limit=10000 HTTP/1.1\r\nHost: localhost\r\n\r\n"
    return flood(server.admin, [page] * 64, 4, reads=False)


def run(program, name):
    function, components, settings = ROUTES[name]
    with tempfile.TemporaryDirectory() as folder:
        server = Server(program, pathlib.Path(folder), settings, components)
        try:
            with contextlib.suppress(BrokenPipeError):
                seen = function(server)
            if server.process.poll() is not None:
                sys.exit(f"{name}: the server ended with {server.process.returncode}")
            return server.peak(), function.__doc__, seen
        finally:
            server.process.kill()
            server.process.wait()


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("routes", nargs="*", metavar="ROUTE", help="of " + ", ".join(ROUTES))
    arguments.add_argument("--server", default=ROOT / "target/release/mb-server", type=pathlib.Path)
    arguments = arguments.parse_args()
    unknown = set(arguments.routes) - set(ROUTES)
    if unknown:
        sys.exit("no route " + ", ".join(sorted(unknown)))
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 4096), most))
    broken = []
    print(f"memory = {MEMORY} MiB; bound {MEMORY + BEYOND} MiB")
    print(f"{'route':<18}{'peak, MiB':>10}  what is held")
    for name in arguments.routes or ROUTES:
        peak, what, seen = run(arguments.server, name)
        over = peak > MEMORY + BEYOND
        what = " ".join(what.split()) + "".join(f" {count} {kind}" for kind, count in sorted((seen or {}).items()))
        print(f"{name:<18}{peak:>10.1f}  {what}{'  OVER' if over else ''}", flush=True)
        if over:
            broken.append(name)
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
