#!/usr/bin/env python3
"""The examples in admin/deploy/balancers, with the balancers that are installed.

    cargo build --release && python3 tests/balancers.py [haproxy|nginx]...

Checks each file with its program, then runs it as it stands, but for addresses
and ports, in front of two servers: calls in frames and over HTTP, the address
that the servers see, a server that drains, is away and comes back. Exits 1 if
anything does not work. A program that is not installed is named and passed
over, unless TEST_REQUIRES_TOOLS is set.
"""
import http.client
import json
import os
import pathlib
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
SERVER = ROOT / "target/release/mb-server"
EXAMPLES = ROOT / "admin/deploy/balancers"
CLIENT = "127.0.7.7"
PATIENCE = 10
CALLS = 30


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A server with a listener for PROXY headers beside its own port."""

    def __init__(self, folder, name):
        self.folder = folder / name
        self.folder.mkdir()
        self.port, self.proxied, self.admin = free_port(), free_port(), free_port()
        (self.folder / "mb.toml").write_text(f"""
port = {self.port}
auth = "optional"
state_dir = "{self.folder}/state"
log = "warn"
[principals.anonymous]
rights = ["*"]
[admin]
port = {self.admin}
[http]
forwarded_from = ["127.0.0.1/32"]
[[listeners]]
host = "127.0.0.1"
port = {self.proxied}
proxy_from = ["127.0.0.1/32"]
""")
        self.start()

    def start(self):
        self.process = subprocess.Popen(
            [SERVER, "serve", "--services", ROOT / "services/dist", "--config", self.folder / "mb.toml"],
            stdout=subprocess.PIPE, stderr=(self.folder / "log").open("a"), text=True)
        for line in self.process.stdout:
            if line.startswith("ready in"):
                return
        sys.exit(f"the server did not start; was it built?\n{(self.folder / 'log').read_text()}")

    def text(self, path):
        connection = http.client.HTTPConnection("127.0.0.1", self.admin, timeout=5)
        connection.request("GET", path)
        return connection.getresponse().read().decode()

    def page(self, path):
        return json.loads(self.text(path))

    def failed_handshakes(self):
        lines = self.text("/metrics").splitlines()
        return [line for line in lines if line.startswith("mb_handshake_failures_total{") and not line.endswith(" 0")]

    def calls(self):
        return sum(row["calls"] for row in self.page("/services")["services"])

    def stop(self):
        self.process.terminate()
        self.process.wait(timeout=30)


def connect(port):
    peer = socket.socket()
    peer.settimeout(5)
    peer.bind((CLIENT, 0))
    peer.connect(("127.0.0.1", port))
    return peer


def frames(port):
    """Calls a service on a connection of its own; which is returned."""
    peer = connect(port)
    body = b"REQUEST:calc.add:1.0.0:1\n" + b'{"a":2,"b":40}'
    peer.sendall(struct.pack(">II", len(body), 0) + body)
    answer = b""
    while b"}" not in answer:
        part = peer.recv(4096)
        if not part:
            raise EOFError(f"the connection ended after {answer!r}")
        answer += part
    assert b'{"sum":42}' in answer, answer
    return peer


def over_http(port, token=None):
    """Calls a service over HTTP: status and answer."""
    # What a client says of itself does not reach the server: beside the balancer's
    # own field, it would be refused.
    headers = {"Content-Type": "application/json", "Forwarded": "for=198.51.100.7"}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5, source_address=(CLIENT, 0))
    connection.request("POST", "/call/calc.add", b'{"a":2,"b":40}', headers)
    response = connection.getresponse()
    answer = response.read()
    connection.close()
    return response.status, answer


def until(what, holds):
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            if holds():
                return
        except (OSError, EOFError, http.client.HTTPException):
            pass
        if time.monotonic() > deadline:
            raise AssertionError(f"still not: {what}")
        time.sleep(0.05)


def rewritten(example, ports, servers):
    """The text of an example with the addresses of this test."""
    text = (EXAMPLES / example).read_text()
    for address, server in zip(["10.0.0.11", "10.0.0.12"], servers):
        for theirs, ours in [(8091, server.proxied), (8081, server.port)]:
            assert f"{address}:{theirs}" in text, f"{example} names no {address}:{theirs}"
            text = text.replace(f"{address}:{theirs}", f"127.0.0.1:{ours}")
    for theirs, ours in ports.items():
        for there, here in [(f"bind :{theirs}\n", f"bind 127.0.0.1:{ours}\n"),
                            (f"listen {theirs};", f"listen 127.0.0.1:{ours};")]:
            text = text.replace(there, here)
        assert f"127.0.0.1:{ours}" in text, f"{example} does not listen on {theirs}"
    return text


def haproxy(folder, text):
    file = folder / "haproxy.cfg"
    file.write_text(text)
    program = find("haproxy")
    subprocess.run([program, "-c", "-q", "-f", EXAMPLES / "haproxy.cfg"], check=True)
    return [program, "-db", "-f", file]


def nginx(folder, text):
    program = find("nginx")
    file = folder / "nginx.conf"
    # Where it may write; the modules are where the program expects them.
    own = "".join(f"    {kind}_temp_path {folder}/{kind};\n"
                  for kind in ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"])
    text = text.replace("http {\n", f"http {{\n    access_log off;\n{own}", 1)
    file.write_text(f"daemon off;\npid {folder}/nginx.pid;\nerror_log {folder}/error.log;\n{text}")
    modules = next((at for at in ["/usr/lib/nginx/modules", "/usr/share/nginx/modules"]
                    if os.path.exists(f"{at}/ngx_stream_module.so")), None)
    if modules is None:
        absent("nginx's stream module")
        return None
    file.write_text(file.read_text().replace("modules/ngx_stream_module.so", f"{modules}/ngx_stream_module.so"))
    return [program, "-c", file, "-e", folder / "error.log"]


def find(name):
    return shutil.which(name) or shutil.which(name, path="/usr/sbin")


def absent(what):
    print(f"{what} is not installed, so it was NOT tried")
    if os.environ.get("TEST_REQUIRES_TOOLS"):
        sys.exit(1)


def attempt(name, example, command_of):
    if not find(name):
        absent(name)
        return
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        servers = [Server(folder, "one"), Server(folder, "two")]
        ports = {8081: free_port(), 8080: free_port()}
        command = command_of(folder, rewritten(example, ports, servers))
        if command is None:
            return
        tcp, web = ports[8081], ports[8080]
        balancer = subprocess.Popen(command, stderr=(folder / "balancer.log").open("w"))
        try:
            until("frames pass", lambda: frames(tcp))
            until("HTTP passes", lambda: over_http(web) == (200, b'{"sum":42}'))
            until("HTTP passes as frames do", lambda: over_http(tcp) == (200, b'{"sum":42}'))
            spread(name, servers, tcp)
            addresses(name, servers, tcp, web)
            failover(name, servers, tcp, web)
        except BaseException:
            print((folder / "balancer.log").read_text(), *(server.folder.joinpath("log").read_text() for server in servers))
            raise
        finally:
            balancer.terminate()
            balancer.wait()
            for server in servers:
                server.stop()
    print(f"{name}: calls, addresses and failover work with {example}")


def spread(name, servers, tcp):
    """Both servers get calls."""
    before = [server.calls() for server in servers]
    for _ in range(CALLS):
        frames(tcp).close()
    after = [server.calls() for server in servers]
    assert sum(after) - sum(before) == CALLS, (before, after)
    assert all(now > then for now, then in zip(after, before)), f"{name}: {before} {after}"


def addresses(name, servers, tcp, web):
    """Servers see the client: of frames as the peer, of HTTP in their log."""
    with frames(tcp) as peer:
        own = "%s:%d" % peer.getsockname()
        seen = [row["peer"] for server in servers for row in server.page("/connections")["connections"]]
        assert own in seen, f"{name}: {own} is not among {seen}"
    assert over_http(web, token="wrong")[0] == 401
    lines = [json.dumps(line) for server in servers for line in server.page("/log?target=audit")["lines"]]
    assert any(CLIENT in line for line in lines), f"{name}: {CLIENT} is not in {lines}"


def failover(name, servers, tcp, web):
    """A server that is away costs no call, and gets calls again when it is back."""
    servers[0].stop()
    for _ in range(CALLS):
        frames(tcp).close()
        assert over_http(web)[0] == 200
    servers[0].start()

    def is_back():
        frames(tcp).close()
        over_http(web)
        return servers[0].calls() > 1
    until(f"{name} has noticed that a server is back", is_back)
    # Health checks are no handshakes that failed.
    failed = [line for server in servers for line in server.failed_handshakes()]
    assert not failed, f"{name}: {failed}"


BALANCERS = {"haproxy": ("haproxy.cfg", haproxy), "nginx": ("nginx.conf", nginx)}
for wanted in sys.argv[1:] or BALANCERS:
    attempt(wanted, *BALANCERS[wanted])
