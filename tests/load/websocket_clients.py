#!/usr/bin/env python3
"""Real WebSocket clients against a real server: `ws` of npm and `websockets` of
PyPI, plain and over TLS.

    cargo build --release && python3 tests/load/websocket_clients.py [ws|websockets]...

Installs the clients into a temporary folder. Each calls a service, sends bytes,
a ping and 200 requests at once, is refused from a foreign page, and reads how a
server that drains closes. Exits 1 where one fails. Ten seconds.
"""

import pathlib
import signal
import subprocess
import sys
import tempfile
import venv

import soak

ROOT = pathlib.Path(__file__).resolve().parents[2]
SERVER = ROOT / "target/release/mb-server"
SERVICES = ROOT / "services/dist"
PACKAGES = {"ws": "ws@8", "websockets": "websockets"}

JAVASCRIPT = r"""
import assert from "node:assert";
import fs from "node:fs";
import { createInterface } from "node:readline";
import WebSocket from "ws";

const [url, ca] = process.argv.slice(2);
const options = url.startsWith("wss") ? { ca: fs.readFileSync(ca) } : {};
const refused = new WebSocket(url, "mb.v1", { ...options, origin: "https://evil.example" });
await new Promise((done) => refused.on("unexpected-response", (_, response) => {
  assert.equal(response.statusCode, 403);
  refused.on("error", done);
  refused.terminate();
}));

const socket = new WebSocket(url, "mb.v1", options);
const answers = new Map();
socket.on("message", (data, isBinary) => {
  const end = data.indexOf(10);
  const id = data.subarray(0, end).toString().split(":")[3];
  answers.get(id ?? "closing")?.([data.subarray(end + 1), isBinary]);
});
const answer = (id) => new Promise((done) => answers.set(id, done));
await new Promise((done) => socket.on("open", done));
assert.equal(socket.protocol, "mb.v1");

const sum = answer("1");
socket.send('REQUEST:calc.add:1.0.0:1\n{"a":2,"b":40}');
assert.deepEqual(JSON.parse((await sum)[0]), { sum: 42 });

const bytes = answer("2");
socket.send(Buffer.concat([Buffer.from("REQUEST:echo.say:1.0.0:2\n"), Buffer.from([255, 0, 254])]));
assert.deepEqual(await bytes, [Buffer.from([255, 0, 254]), true]);

const pong = new Promise((done) => socket.on("pong", done));
socket.ping("alive");
assert.equal((await pong).toString(), "alive");

const large = JSON.stringify("x".repeat(300_000));
const many = Array.from({ length: 200 }, (_, index) => answer(`m${index}`));
many.forEach((_, index) => socket.send(`REQUEST:echo.say:1.0.0:m${index}\n${index % 50 ? index : large}`));
for (const [index, one] of many.entries()) assert.equal(String((await one)[0]), String(index % 50 ? index : large));

const closing = answer("closing");
const closed = new Promise((done) => socket.on("close", (code) => done(code)));
console.log("ready");
assert.equal(JSON.parse((await closing)[0]).code, "SHUTTING_DOWN");
assert.equal(await closed, 1001);
"""

PYTHON = r"""
import json, ssl, sys
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

url, ca = sys.argv[1:]
options = {"subprotocols": ["mb.v1"], "max_size": None, "compression": None}
if url.startswith("wss"):
    options["ssl"] = ssl.create_default_context(cafile=ca)
try:
    connect(url, origin="https://evil.example", **options)
    sys.exit("a foreign page was let in")
except InvalidStatus as error:
    assert error.response.status_code == 403, error

with connect(url, **options) as socket:
    assert socket.subprotocol == "mb.v1"
    socket.send('REQUEST:calc.add:1.0.0:1\n{"a":2,"b":40}')
    line, payload = socket.recv().split("\n", 1)
    assert (line, json.loads(payload)) == ("RESPONSE:calc.add:1.0.0:1", {"sum": 42}), line
    socket.send(b"REQUEST:echo.say:1.0.0:2\n\xff\0\xfe")
    assert socket.recv() == b"RESPONSE:echo.say:1.0.0:2\n\xff\0\xfe"
    assert socket.ping(b"alive").wait(10)
    # In pieces, as an iterator is sent.
    socket.send(["REQUEST:echo.say:1.0.0:3\n", '"', "\u00e9" * 100_000, '"'])
    assert socket.recv().endswith('"' + "\u00e9" * 100_000 + '"')
    for number in range(200):
        socket.send(f"REQUEST:echo.say:1.0.0:{number}\n{number}")
    answers = {socket.recv() for _ in range(200)}
    assert answers == {f"RESPONSE:echo.say:1.0.0:{number}\n{number}" for number in range(200)}
    print("ready", flush=True)
    assert json.loads(socket.recv().split("\n", 1)[1])["code"] == "SHUTTING_DOWN"
    try:
        socket.recv()
    except ConnectionClosed as closed:
        assert closed.rcvd.code == 1001, closed
"""


def run(command, **options):
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, **options)


def install(client, folder):
    """Returns the command of a client."""
    package = PACKAGES[client]
    if client == "ws":
        run(["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", folder, package])
        script = folder / "client.mjs"
        script.write_text(JAVASCRIPT)
        return ["node", script]
    venv.create(folder / "venv", with_pip=True)
    run([folder / "venv/bin/pip", "install", "--quiet", "--no-deps", package])
    script = folder / "client.py"
    script.write_text(PYTHON)
    return [folder / "venv/bin/python", script]


def talk(command, scheme, folder):
    certificates = folder / "certs"
    settings = folder / "mb.toml"
    settings.write_text(
        f'port = 0\nlog = "off"\nstate_dir = "{folder}/state"\nadmin = {{ port = 0 }}\n'
        f'[tls]\nport = 0\ncert = "{certificates}/server.crt"\nkey = "{certificates}/server.key"\n'
    )
    server = subprocess.Popen(
        [SERVER, "serve", "--services", SERVICES, "--config", settings], stdout=subprocess.PIPE, text=True
    )
    try:
        listeners, _ = soak.addresses(server)
        port = listeners[scheme == "wss"][1]
        url = f"{scheme}://localhost:{port}/ws"
        client = subprocess.Popen([*command, url, certificates / "ca.crt"], stdout=subprocess.PIPE, text=True)
        assert client.stdout.readline() == "ready\n", f"{url} failed"
        server.send_signal(signal.SIGTERM)
        assert client.wait(timeout=20) == 0, f"{url} failed"
        assert server.wait(timeout=20) == 0
    finally:
        server.kill()


def main():
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        run([SERVER, "cert", "dev", folder / "certs"])
        for client in sys.argv[1:] or PACKAGES:
            command = install(client, folder)
            for scheme in ["ws", "wss"]:
                talk(command, scheme, folder)
                print(f"{client} over {scheme}: passes", flush=True)


if __name__ == "__main__":
    main()
