#!/usr/bin/env python3
"""A client in one file, written from src/wire/PROTOCOL.md alone.

    python3 client.py HOST:PORT [--ca FILE [--cert FILE --key FILE]] [--token TOKEN] [--calls N]

Run as a program it holds what the document says against a real server, prints
`ok` and the number of answers, and exits 1 at the first difference.
"""
import argparse
import json
import random
import select
import socket
import ssl
import struct
import threading
import uuid

KEEPALIVE, BINARY, MORE = 1, 2, 4


class Refused(Exception):
    """The answer is an ERROR."""

    def __init__(self, body):
        super().__init__(f"{body['code']}: {body['message']}")
        self.code, self.origin, self.details = body["code"], body["origin"], body.get("details")


class Lost(Exception):
    """No answer will come. `begun` is False where nothing can have run."""

    def __init__(self, why, begun):
        super().__init__(why)
        self.begun = begun


class Client:
    """One connection that threads share; a thread of its own reads it."""

    def __init__(self, host, port, tls=None, token=None, timeout=30):
        connection = socket.create_connection((host, port), timeout)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = tls.wrap_socket(connection, server_hostname=host) if tls else connection
        self.socket.setblocking(False)
        # OpenSSL lets no two threads into one session, so nobody waits inside.
        self.session = threading.Lock()
        self.lock, self.pending = threading.Condition(), {}
        self.keep_alives, self.ending, self.ended = 0, False, None
        threading.Thread(target=self._read, daemon=True).start()
        hello = {"client": "client.py/1", "protocol": "1.0"}
        self.hello = self.call("system.hello", hello | ({"token": token} if token else {}), timeout=timeout)

    def call(self, topic, payload=None, version="1.0.0", timeout=5, pieces=None):
        return self.wait(self.send(topic, payload, version, timeout, pieces), timeout + 2)

    def send(self, topic, payload=None, version="1.0.0", timeout=5, pieces=None):
        """Sends a request, in pieces of so many bytes if that is said."""
        number = str(uuid.uuid4())
        binary = isinstance(payload, bytes)
        body = payload if binary else json.dumps(payload).encode()
        message = f"REQUEST:{topic}:{version}:{number}::{int(timeout * 1000)}\n".encode() + body
        size = pieces or max(1, len(message))
        cut = [message[at:at + size] for at in range(0, len(message), size)]
        flags = BINARY if binary else 0
        frames = [struct.pack(">II", len(piece), flags | MORE) + piece for piece in cut[:-1]]
        frames.append(struct.pack(">II", len(cut[-1]), flags) + cut[-1])
        with self.lock:
            if self.ended:
                raise Lost(self.ended, False)
            self.pending[number] = None
            self._send(b"".join(frames))
        return number

    def wait(self, number, timeout=30):
        with self.lock:
            self.lock.wait_for(lambda: self.pending[number] is not None or self.ended, timeout)
            answer = self.pending.pop(number)
            if answer is None:
                raise Lost(self.ended or "no answer within the timeout", not (self.ended and self.ending))
        if isinstance(answer, Exception):
            raise answer
        return answer

    def keep_alive(self):
        """Sends one; the server answers with one."""
        with self.lock:
            before = self.keep_alives
            self._send(struct.pack(">II", 0, KEEPALIVE))
            self.lock.wait_for(lambda: self.keep_alives > before or self.ended, 30)
            return self.keep_alives - before

    def close(self):
        try:
            self.socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self.socket.close()

    def _send(self, data):
        while data:
            with self.session:
                try:
                    data = data[self.socket.send(data):]
                    continue
                except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                    pass
            select.select([], [self.socket], [])

    def _exactly(self, count):
        data = bytearray()
        while len(data) < count:
            with self.session:
                try:
                    more = self.socket.recv(count - len(data))
                    if not more:
                        raise EOFError("the server closed the connection")
                    data += more
                    continue
                except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                    pass
            select.select([self.socket], [], [])
        return bytes(data)

    def _read(self):
        message = b""
        try:
            while True:
                length, flags = struct.unpack(">II", self._exactly(8))
                body = self._exactly(length)
                with self.lock:
                    if flags & KEEPALIVE:
                        self.keep_alives += 1
                    else:
                        message += body
                        if not flags & MORE:
                            self._answered(message, flags & BINARY)
                            message = b""
                    self.lock.notify_all()
        except (EOFError, OSError) as error:
            with self.lock:
                self.ending = self.ending and isinstance(error, EOFError) and not message
                self.ended = str(error)
                self.lock.notify_all()

    def _answered(self, message, binary):
        line, payload = message.split(b"\n", 1)
        fields = line.decode().split(":")
        number = fields[3] if len(fields) > 3 else None
        if fields[0] == "ERROR":
            answer = Refused(json.loads(payload))
            # What names no request concerns all of them.
            self.ending = self.ending or number is None and answer.code == "SHUTTING_DOWN"
        else:
            answer = payload if binary else (json.loads(payload),)
        if number in self.pending:
            self.pending[number] = answer


def value(answer):
    """JSON answers come in a tuple, so that `null` is one too."""
    return answer[0] if isinstance(answer, tuple) else answer


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("server")
    for name in ("--ca", "--cert", "--key", "--token"):
        parser.add_argument(name)
    parser.add_argument("--calls", type=int, default=200)
    arguments = parser.parse_args()
    host, port = arguments.server.rsplit(":", 1)
    tls = None
    if arguments.ca:
        tls = ssl.create_default_context(cafile=arguments.ca)
        tls.set_alpn_protocols(["mb/1"])
        if arguments.cert:
            tls.load_cert_chain(arguments.cert, arguments.key)
    client = Client(host.strip("[]"), int(port), tls, arguments.token)
    assert value(client.hello)["protocol"] == "1.0"
    assert value(client.call("system.ping", {"a": [1]}))["echo"] == {"a": [1]}
    assert value(client.call("calc.add", {"a": 2, "b": 40})) == {"sum": 42}
    names = [service["name"] for service in value(client.call("system.services"))["services"]]
    assert "echo" in names and "calc" in names, names
    chance = random.Random(7)
    sent = []
    for number in range(arguments.calls):
        data = {"number": number, "text": "ä" * chance.randrange(3000)}
        sent.append((data, client.send("echo.say", data, pieces=chance.choice([None, 100, 1000]))))
    chance.shuffle(sent)
    for data, number in sent:
        assert value(client.wait(number)) == data, number
    data = bytes(range(256)) * 9
    assert client.call("echo.say", data, pieces=700) == data
    assert client.keep_alive() == 1
    for topic, payload, version, code in [
        ("nobody.here", None, "1.0.0", "NO_ROUTE_FOUND"),
        ("calc.nothing", None, "1.0.0", "TOPIC_NOT_SUPPORTED"),
        ("calc.add", {}, "9.0.0", "VERSION_NOT_SUPPORTED"),
    ]:
        try:
            client.call(topic, payload, version)
            raise AssertionError(f"{topic} was answered")
        except Refused as refused:
            assert refused.code == code, (refused.code, code)
    client.close()
    print(f"ok {arguments.calls} answers")


if __name__ == "__main__":
    main()
