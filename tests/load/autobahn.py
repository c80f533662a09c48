#!/usr/bin/env python3
"""The cases of Autobahn's test suite against this server's WebSocket.

    cargo build --release --example measure && python3 tests/load/autobahn.py [SECTION|CASE]...

Takes the cases (sections 1 to 7 and 10) from the package autobahntestsuite of
PyPI, which is written for Python 2: what they need of it stands here, on
sockets. They talk to the server's own connections, with a handler in the place
of services that sends each message back. Prints each case that does not pass,
and exits 1 if there is one.
"""

import concurrent.futures
import heapq
import importlib
import os
import pathlib
import random
import re
import select
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import types
import venv

ROOT = pathlib.Path(__file__).resolve().parents[2]
PACKAGE = "autobahntestsuite==25.10.1"
SECTIONS = ["1", "2", "3", "4", "5", "6", "7", "10"]
AT_ONCE = 32
# Of one case, beyond what it waits for itself.
PATIENCE = 20
PASSES = {"OK", "INFORMATIONAL"}

STUBS = {
    "autobahn/__init__.py": "",
    "autobahn/websocket/__init__.py": "",
    "autobahn/websocket/protocol.py": "class WebSocketProtocol:\n"
    "   STATE_CLOSED, STATE_CONNECTING, STATE_CLOSING, STATE_OPEN = range(4)\n",
    "autobahn/websocket/utf8validator.py": "class Utf8Validator:\n"
    "   def reset(self):\n      pass\n"
    "   def validate(self, text):\n"
    "      try:\n         text.encode('latin-1').decode()\n"
    "      except UnicodeDecodeError as error:\n"
    "         is_begun = error.reason == 'unexpected end of data'\n"
    "         return is_begun, False, error.start, error.start\n"
    "      return True, True, len(text), len(text)\n",
    "hexes.py": "def b2a_hex(text):\n   return text.encode('latin-1').hex()\n",
}


def fetch(into):
    """Unpacks the cases as Python 3. A text of Python 2 is bytes: it is read
    as Latin-1, and so is all that is sent and received."""
    venv.create(f"{into}/venv", with_pip=True)
    subprocess.run([f"{into}/venv/bin/pip", "download", "--quiet", "--no-deps", "--dest", into, PACKAGE], check=True)
    archive = next(pathlib.Path(into).glob("autobahntestsuite-*.tar.gz"))
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            name = re.fullmatch(r"[^/]+/autobahntestsuite/case/(case(?:\.py|[1-7]_.*\.py|10_.*\.py))", member.name)
            if not name:
                continue
            text = tar.extractfile(member).read().decode("latin-1")
            text = re.sub(r"^(\s*)print .*$", r"\1pass", text, flags=re.M)
            text = text.replace("xrange", "range").replace("unichr", "chr")
            text = text.replace("import binascii", "import hexes as binascii").replace("(object, Case, )", "(Case, )")
            text = text.replace("len(self.payload) / ", "len(self.payload) // ")
            pathlib.Path(into, name[1]).write_text(text, encoding="utf-8")
    for name, text in STUBS.items():
        path = pathlib.Path(into, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def load(folder):
    """All cases by their numbers."""
    sys.path.insert(0, folder)
    base = importlib.import_module("case").Case
    # By way of pickle, equal texts that are two objects were two.
    base.compare = lambda self, one, other: one == other
    found = {}
    for path in pathlib.Path(folder).glob("case[0-9]*.py"):
        for value in vars(importlib.import_module(path.stem)).values():
            for case in value if isinstance(value, list) else [value]:
                if isinstance(case, type) and issubclass(case, base) and case is not base:
                    found[case.__name__.removeprefix("Case").replace("_", ".")] = case
    return found


class Peer:
    """What a case sees of its connection: autobahn's protocol, as a client."""

    STATE_CLOSED, STATE_CONNECTING, STATE_CLOSING, STATE_OPEN = range(4)
    CLOSE_STATUS_CODE_NORMAL = 1000
    CLOSE_STATUS_CODE_PROTOCOL_ERROR = 1002
    CLOSE_STATUS_CODE_INVALID_PAYLOAD = 1007

    def __init__(self, port):
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.factory = types.SimpleNamespace(isServer=False)
        self.state = self.STATE_CONNECTING
        self.timers = []
        self.unread = b""
        self.message = None
        self.connectionWasOpen = False
        self.closedByMe = self.failedByMe = self.droppedByMe = self.wasClean = False
        self.remoteCloseCode = self.localCloseReason = None
        self.autoFragmentSize = 0
        self.txFrameStats = {}

    # What cases call.

    def sendFrame(self, opcode, payload="", fin=True, rsv=0, mask=None, payload_len=None, chopsize=None, sync=False):
        if payload_len is not None:
            payload = (payload * (payload_len // max(len(payload), 1) + 1))[:payload_len]
        first = fin << 7 | rsv << 4 | opcode
        self.txFrameStats[opcode] = self.txFrameStats.get(opcode, 0) + 1
        self.mask, self.masked = random.randbytes(4), 0
        self.write(self.head(first, len(payload)) + self.masks(payload), chopsize)

    def sendMessage(self, payload, isBinary=False, fragmentSize=None, sync=False):
        size = fragmentSize or self.autoFragmentSize or len(payload) or 1
        pieces = [payload[at : at + size] for at in range(0, len(payload), size)] or [""]
        for at, piece in enumerate(pieces):
            opcode = 0 if at else 2 if isBinary else 1
            self.sendFrame(opcode, piece, fin=at + 1 == len(pieces))

    def beginMessage(self, isBinary=False):
        self.opcode = 2 if isBinary else 1

    def beginMessageFrame(self, length):
        self.mask, self.masked = random.randbytes(4), 0
        self.write(self.head(self.opcode, length))
        self.opcode = 0

    def sendMessageFrameData(self, payload, sync=False):
        self.write(self.masks(payload))

    def endMessage(self):
        self.sendFrame(0)

    def sendCloseFrame(self, code=None, reasonUtf8=None, isReply=False):
        if self.state != self.STATE_OPEN:
            return
        payload = code.to_bytes(2, "big").decode("latin-1") if code is not None else ""
        self.state = self.STATE_CLOSING
        self.closedByMe = not isReply
        self.sendFrame(8, payload + (reasonUtf8 or ""))

    def sendClose(self, code=None, reason=None):
        self.sendCloseFrame(code, reason)

    def continueLater(self, delay, function, tag=None):
        heapq.heappush(self.timers, (time.monotonic() + delay, len(self.timers), function))

    def closeAfter(self, delay):
        self.continueLater(delay, self.sendClose)

    def killAfter(self, delay):
        self.continueLater(delay, self.fail)

    def enableWirelog(self, enable):
        pass

    # The rest.

    def fail(self):
        if self.state == self.STATE_OPEN:
            self.failedByMe = True
            self.sendCloseFrame(1001)

    def head(self, first, length):
        if length < 126:
            return bytes([first, 0x80 | length]) + self.mask
        size, mark = (2, 126) if length < 65536 else (8, 127)
        return bytes([first, 0x80 | mark]) + length.to_bytes(size, "big") + self.mask

    def masks(self, payload):
        data = payload.encode("latin-1")
        mask = (self.mask * 2)[self.masked % 4 :][:4]
        self.masked += len(data)
        mask = int.from_bytes((mask * (len(data) // 4 + 1))[: len(data)], "big")
        return (int.from_bytes(data, "big") ^ mask).to_bytes(len(data), "big")

    def write(self, data, chopsize=None):
        if self.state == self.STATE_CLOSED:
            return
        step = chopsize or len(data)
        try:
            for at in range(0, len(data), step):
                self.socket.sendall(data[at : at + step])
        except OSError:
            pass  # The server is gone; what it sent is read.

    def run(self, case):
        self.case = case
        case.p = self
        key = "dGhlIHNhbXBsZSBub25jZQ=="
        self.socket.sendall(
            f"GET /ws HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n\r\n".encode()
        )
        until = time.monotonic() + PATIENCE
        while self.state != self.STATE_CLOSED and time.monotonic() < until:
            due = self.timers[0][0] - time.monotonic() if self.timers else PATIENCE
            if due <= 0:
                heapq.heappop(self.timers)[2]()
            elif select.select([self.socket], [], [], due)[0]:
                self.read()
        if self.state != self.STATE_CLOSED:
            self.droppedByMe = True
        self.socket.close()
        case.onConnectionLost(self.failedByMe)

    def read(self):
        try:
            data = self.socket.recv(1 << 20)
        except OSError:
            data = b""
        if not data:
            self.state = self.STATE_CLOSED
            return
        self.unread += data
        if self.state == self.STATE_CONNECTING and b"\r\n\r\n" in self.unread:
            head, self.unread = self.unread.split(b"\r\n\r\n", 1)
            assert head.startswith(b"HTTP/1.1 101 "), head
            self.state, self.connectionWasOpen = self.STATE_OPEN, True
            self.case.onOpen()
        while self.connectionWasOpen and (frame := self.take()):
            self.received(*frame)

    def take(self):
        """The next frame, once it is whole."""
        if len(self.unread) < 2:
            return None
        length, at = self.unread[1], 2
        if length >= 126:
            at = 4 if length == 126 else 10
            length = int.from_bytes(self.unread[2:at], "big")
        if len(self.unread) < at + length:
            return None
        first, payload = self.unread[0], self.unread[at : at + length]
        self.unread = self.unread[at + length :]
        return first, payload.decode("latin-1")

    def received(self, first, payload):
        if first in (0x81, 0x82):
            self.case.onMessage(payload, first == 0x82)
        elif first == 0x8A:
            self.case.onPong(payload)
        elif first == 0x88:
            self.remoteCloseCode = int.from_bytes(payload[:2].encode("latin-1"), "big") if payload else None
            self.wasClean = True
            self.sendCloseFrame(self.remoteCloseCode, isReply=True)
        else:
            raise AssertionError(f"the server sends {first:#x}")


def listens(port):
    try:
        socket.create_connection(("127.0.0.1", port)).close()
        return True
    except ConnectionRefusedError:
        return False


def run(case, port):
    peer = Peer(port)
    instance = case(peer)
    peer.run(instance)
    return instance


def main():
    wanted = sys.argv[1:] or SECTIONS
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = ROOT / "target/release/examples/measure"
    server = subprocess.Popen([program, "compare", "--serve-parrot", str(port)])
    try:
        with tempfile.TemporaryDirectory() as folder:
            fetch(folder)
            cases = load(folder)
            chosen = {
                number: case
                for number, case in cases.items()
                if any(number == name or number.startswith(name + ".") for name in wanted)
            }
            assert chosen, f"no case of {wanted}"
            while not listens(port):
                assert server.poll() is None, "the server did not start; was it built?"
                time.sleep(0.01)
            with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as threads:
                runs = {number: threads.submit(run, case, port) for number, case in chosen.items()}
            failed = 0
            for number in sorted(runs, key=lambda number: [int(part) for part in number.split(".")]):
                case = runs[number].result()
                if case.behavior in PASSES and case.behaviorClose in PASSES:
                    continue
                failed += 1
                print(f"{number}: {case.behavior}, close {case.behaviorClose}: {case.result} {case.resultClose}")
                print(f"    expected {str(case.expected)[:300]}\n    received {str(case.received)[:300]}")
            print(f"{len(runs) - failed} of {len(runs)} cases pass")
            return failed > 0
    finally:
        server.kill()
        server.wait()


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main())
