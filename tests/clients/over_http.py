#!/usr/bin/env python3
"""Real clients, browsers, proxies and probes ask a real server over HTTP.

    cargo build --release && python3 tests/clients/over_http.py [NAME...]

Starts the server as README.md does, but on free ports, and prints one line for
each client; exits 1 if one of them fails. What is missing it installs with apt
(as root) and pip (into target/http-clients). NAME restricts it to the lines
that hold it.
"""
import contextlib
import http.server
import json
import os
import pathlib
import queue
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/load"))
from soak import SERVER, addresses  # noqa: E402

VENV = ROOT / "target/http-clients"
# Programs, and the packages of Debian that have them.
PACKAGES = {
    "curl": "curl", "node": "nodejs", "chromium": "chromium", "haproxy": "haproxy", "nginx": "nginx-light",
    "prometheus-blackbox-exporter": "prometheus-blackbox-exporter",
}
# Seconds that one program may take, or something that is waited for.
PATIENCE = 15
SUM, RESULT = '{"a":2,"b":40}', {"sum": 42}
JSON = ("-H", "Content-Type: application/json")
stack = contextlib.ExitStack()


def path_of(program):
    return shutil.which(program) or shutil.which(f"/usr/sbin/{program}")


def install():
    missing = sorted(package for program, package in PACKAGES.items() if not path_of(program))
    if missing:
        print("installs", *missing, flush=True)
        quiet = {"stdout": subprocess.DEVNULL, "check": True, "timeout": 600}
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run(["apt-get", "update", "-qq"], **quiet)
        subprocess.run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing], env=environment, **quiet)
    if not (VENV / "bin/python").exists():
        subprocess.run([sys.executable, "-m", "venv", VENV], check=True, timeout=120)
    python = VENV / "bin/python"
    if subprocess.run([python, "-c", "import requests"], capture_output=True).returncode:
        subprocess.run([python, "-m", "pip", "install", "-q", "requests==2.32.5"], check=True, timeout=300)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(*command, stdin=None):
    """What a program prints; an error where it fails or takes too long."""
    done = subprocess.run(list(map(str, command)), input=stdin, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, f"{command[0]}: exit code {done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout


def until(what, found):
    deadline = time.monotonic() + PATIENCE
    while not (value := found()):
        assert time.monotonic() < deadline, f"{what}: not within {PATIENCE} s"
        time.sleep(0.05)
    return value


def background(*command, **options):
    """A program that runs until the end."""
    process = subprocess.Popen(list(map(str, command)), stdin=subprocess.DEVNULL, **options)

    def end():
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    stack.callback(end)
    return process


def listens(port):
    with socket.socket() as peer:
        return peer.connect_ex(("127.0.0.1", port)) == 0


class Server:
    """`mb-server serve` in the repository, as README.md starts it."""

    def __init__(self, folder, settings=""):
        file = folder / "mb.toml"
        state = f'port = 0\nlog = "off"\nstate_dir = "{folder}/state"\nreload_interval = 100\nadmin = {{ port = 0 }}\n'
        file.write_text(state + settings)
        process = background(SERVER, "serve", "--config", file, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        listeners, admin = addresses(process)
        self.ports = [port for _, port in listeners]
        self.url = f"http://127.0.0.1:{self.ports[0]}"
        self.call = f"{self.url}/call/calc.add"
        self.admin = f"http://127.0.0.1:{admin[1]}"

    def calls(self):
        """How many calls have begun so far."""
        with urllib.request.urlopen(f"{self.admin}/metrics", timeout=PATIENCE) as page:
            text = page.read().decode()
        return sum(int(count) for count in re.findall(r"^mb_calls_total\S* (\d+)$", text, re.MULTILINE))


class Setup:
    """Servers, files and pages that the clients share."""

    def __init__(self):
        self.folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        self.tls = self.folder / "tls"
        run(SERVER, "cert", "dev", self.tls)
        self.pages = Pages()
        self.plain = Server(self.subfolder("plain"))
        tokens = self.folder / "tokens.json"
        self.token = run(SERVER, "token", "new", "ann", "--right", "calc.*", "--file", tokens).strip()
        self.strict = Server(self.subfolder("strict"), f"""
auth = "required"
tokens = "{tokens}"
[http]
origins = ["{self.pages.listed}"]
forwarded_from = ["127.0.0.1/32"]
[tls]
port = 0
cert = "{self.tls}/server.crt"
key = "{self.tls}/server.key"
ca = "{self.tls}/ca.crt"
reject_unauthorized = false
[principals.dev]
rights = ["calc.*"]
""")
        self.secure = f"https://localhost:{self.strict.ports[1]}/call/calc.add"

    def subfolder(self, name):
        folder = self.folder / name
        folder.mkdir()
        return folder

    def pair(self):
        return self.tls / "client.crt", self.tls / "client.key"


class Pages:
    """Pages that tell what their script has found by a POST to /done."""

    def __init__(self):
        told = self.told = queue.Queue()
        page = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200)
                self.send_header("Content-Type", "text/html; charset=utf-8")
                self.end_headers()
                if urllib.parse.urlsplit(self.path).path == "/":
                    self.wfile.write(page.html.encode())

            def do_POST(self):
                told.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(204)
                self.end_headers()

            def log_message(self, *_):
                pass
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        stack.callback(server.shutdown)
        self.html, self.listed = "", f"http://127.0.0.1:{server.server_port}"
        # The same, from where another site would come.
        self.foreign = f"http://localhost:{server.server_port}"

    def show(self, origin, script):
        """What a script in a page of this origin finds, in Chromium."""
        self.html = f"<!doctype html><title>x</title><body><script type=module>{script}\n" \
                    "await fetch('/done', { method: 'POST', body: JSON.stringify(found) });</script>"
        with tempfile.TemporaryDirectory() as profile:
            browser = subprocess.Popen([
                path_of("chromium"), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
                f"--user-data-dir={profile}", f"--remote-debugging-port={free_port()}", origin + "/",
            ], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
            try:
                return self.told.get(timeout=PATIENCE)
            except queue.Empty:
                raise AssertionError("the page has told nothing") from None
            finally:
                os.killpg(browser.pid, 9)
                browser.wait()


def equal(found, expected):
    assert found == expected, f"{found!r}, not {expected!r}"


def curl(*arguments, stdin=None):
    return run("curl", "-sS", "--max-time", PATIENCE, *arguments, stdin=stdin)


# Clients by what they print. Each gets the setup, and raises where it is
# answered otherwise than it should.

def readme(setup):
    """curl, as README.md has it"""
    line = next(line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("curl -d"))
    line = line.replace("127.0.0.1:8081", f"127.0.0.1:{setup.plain.ports[0]}")
    before = setup.plain.calls()
    equal(json.loads(run("bash", "-c", line)), RESULT)
    equal(setup.plain.calls(), before + 1)


def curl_versions(setup):
    """curl: HTTP/1.1, HTTP/1.0, and HTTP/1.0 that keeps its connection"""
    for flags in (["--http1.1"], ["--http1.0"], ["--http1.0", "-H", "Connection: keep-alive"]):
        equal(json.loads(curl(*flags, *JSON, "-d", SUM, setup.plain.call)), RESULT)


def curl_chunked(setup):
    """curl: a body in chunks, from a pipe"""
    body = json.dumps("x" * 300_000)
    answer = curl(*JSON, "-H", "Transfer-Encoding: chunked", "--data-binary", "@-",
                  f"{setup.plain.url}/call/echo.say", stdin=body)
    equal(answer, body)


def curl_expect(setup):
    """curl: waits for 100 before a large body, and spares one that is too large"""
    def upload(size):
        told = setup.folder / "told"
        told.write_text(json.dumps("x" * size))
        shown = curl(*JSON, "-H", "Expect: 100-continue", "--expect100-timeout", "10", "-o", setup.folder / "answer",
                     "-w", "%{http_code} %{size_upload}", "-D", "-", "--data-binary", f"@{told}",
                     f"{setup.plain.url}/call/echo.say")
        return shown.splitlines()[0], shown.splitlines()[-1], (setup.folder / "answer").read_text() == told.read_text()
    equal(upload(500_000), ("HTTP/1.1 100 Continue", "200 500002", True))
    first, last, _ = upload(9_000_000)
    assert first.startswith("HTTP/1.1 413") and last == "413 0", (first, last)


def curl_head(setup):
    """curl: HEAD has the length of GET and no body"""
    sizes = [re.search(r"(?i)content-length: (\d+)", curl(*flags, f"{setup.plain.url}/services"))[1]
             for flags in (["-I"], ["-i"])]
    equal(sizes[0], sizes[1])


def curl_keeps(setup):
    """curl: three calls over one connection"""
    arguments = [*JSON, "-d", SUM, "-o", "/dev/null", "-w", "%{http_code} %{num_connects}\n", setup.plain.call]
    shown = curl(*arguments, "--next", "-sS", *arguments, "--next", "-sS", *arguments)
    equal(shown.split(), ["200", "1", "200", "0", "200", "0"])


def curl_tls(setup):
    """curl: TLS with a token, with a certificate, and with neither"""
    ca, (cert, key) = setup.tls / "ca.crt", setup.pair()
    call = ["--cacert", ca, *JSON, "-d", SUM, setup.secure]
    equal(json.loads(curl("-H", f"Authorization: Bearer {setup.token}", *call)), RESULT)
    equal(json.loads(curl("--cert", cert, "--key", key, *call)), RESULT)
    equal(json.loads(curl(*call))["code"], "UNAUTHORIZED")


def python_requests(setup):
    """Python requests: a session, chunks, a failure, TLS with a certificate"""
    script = f"""
import requests
with requests.Session() as session:
    for _ in range(3):
        answer = session.post({setup.plain.call!r}, json={{"a": 2, "b": 40}}, timeout=5)
        assert answer.json() == {{"sum": 42}} and answer.headers["Service-Version"], answer.text
    answer = session.post({setup.plain.call!r}, data=iter([b'{{"a":2,', b'"b":40}}']),
                          headers={{"Content-Type": "application/json"}}, timeout=5)
    assert answer.json() == {{"sum": 42}}, answer.text
    answer = session.post({setup.plain.url + "/call/calc.divide"!r}, json={{"a": 1, "b": 0}}, timeout=5)
    assert answer.status_code == 422 and answer.json()["origin"] == "service", answer.text
    answer = session.get({setup.plain.url + "/services"!r}, timeout=5)
    assert answer.ok and "calc" in answer.text, answer.text
answer = requests.post({setup.secure!r}, json={{"a": 2, "b": 40}}, timeout=5, verify={str(setup.tls / "ca.crt")!r},
                       cert={tuple(map(str, setup.pair()))!r})
assert answer.json() == {{"sum": 42}}, answer.text
"""
    run(VENV / "bin/python", "-c", script)


def node_fetch(setup):
    """Node fetch: calls side by side, a stream as body, a failure"""
    script = f"""
import assert from 'node:assert';
const headers = {{ 'Content-Type': 'application/json' }};
const ask = (body, more) => fetch({json.dumps(setup.plain.call)}, {{ method: 'POST', headers, body, signal: AbortSignal.timeout(5000), ...more }});
const sums = await Promise.all(Array.from({{ length: 20 }}, async (_, n) => (await ask(JSON.stringify({{ a: n, b: 1 }}))).json()));
assert.deepStrictEqual(sums.map(({{ sum }}) => sum), Array.from({{ length: 20 }}, (_, n) => n + 1));
const stream = new Blob(['{{"a":2,', '"b":40}}']).stream();
assert.deepStrictEqual(await (await ask(stream, {{ duplex: 'half' }})).json(), {{ sum: 42 }});
assert.strictEqual((await ask('{{')).status, 400);
"""
    run("node", "--input-type=module", "-e", script)


# All that a page of another origin can try without leave, and what it gets.
FOREIGN = """
const found = {};
const kinds = {
  json: { headers: { 'Content-Type': 'application/json' } },
  text: { headers: { 'Content-Type': 'text/plain' } },
  blind: { headers: { 'Content-Type': 'text/plain' }, mode: 'no-cors' },
};
for (const [kind, options] of Object.entries(kinds)) {
  found[kind] = await fetch(CALL, { method: 'POST', body: '{"a":2,"b":40}', ...options })
    .then((answer) => answer.type === 'opaque' ? 'opaque' : answer.text(), () => 'refused');
}
const frame = Object.assign(document.createElement('iframe'), { name: 'target' });
const form = Object.assign(document.createElement('form'), { action: CALL, method: 'POST', enctype: 'text/plain', target: 'target' });
form.append(Object.assign(document.createElement('input'), { name: '{"a":2,"b":40,"x":"', value: '"}' }));
document.body.append(frame, form);
const loaded = new Promise((done) => frame.addEventListener('load', done));
form.submit();
await loaded;
"""


def browser_refused(setup):
    """Chromium: a page of another origin gets nothing, and nothing is called"""
    for origin in (setup.pages.listed, setup.pages.foreign):
        before = setup.plain.calls()
        found = setup.pages.show(origin, FOREIGN.replace("CALL", json.dumps(setup.plain.call)))
        equal(found, {"json": "refused", "text": "refused", "blind": "opaque"})
        equal(setup.plain.calls(), before)


def browser_allowed(setup):
    """Chromium: a page whose origin is in http.origins calls with a token"""
    script = f"""
const ask = (token) => fetch({json.dumps(setup.strict.call)}, {{
  method: 'POST', body: '{SUM}', headers: {{ 'Content-Type': 'application/json', Authorization: `Bearer ${{token}}` }} }})
  .then(async (answer) => [answer.status, (await answer.json()).sum ?? null, answer.headers.has('Request-Id')], () => ['refused']);
const found = [await ask({json.dumps(setup.token)}), await ask('mbt_wrong')];
"""
    equal(setup.pages.show(setup.pages.listed, script), [[200, 42, True], [401, None, True]])
    equal(setup.pages.show(setup.pages.foreign, script), [["refused"], ["refused"]])


def behind(setup, url, source):
    """What holds behind a proxy: calls over connections that it keeps, large
    bodies, and that failures count for its client."""
    token = ["-H", f"Authorization: Bearer {setup.token}"]
    call = [*JSON, "-d", SUM, f"{url}/call/calc.add"]
    equal(json.loads(curl(*token, *call)), RESULT)
    shown = curl(*token, *call, "--next", "-sS", *token, *call)
    equal(shown, json.dumps(RESULT, separators=(",", ":")) * 2)
    body = '{"a":2,"b":40' + " " * 300_000 + "}"
    for flags in ([], ["-H", "Transfer-Encoding: chunked"]):
        answer = curl(*token, *JSON, *flags, "--data-binary", "@-", f"{url}/call/calc.add", stdin=body)
        equal(json.loads(answer), RESULT)

    def guess(address):
        answer = curl("--interface", address, "-H", "Authorization: Bearer mbt_wrong", *call)
        return json.loads(answer)["message"]
    # Ten failures in a minute are allowed, and one is forgotten after six seconds.
    messages = [guess(source) for _ in range(20)]
    assert "too many" not in messages[9] and "too many" in messages[-1], messages
    assert "too many" not in guess(source + "9"), "another client pays for it"


def haproxy(setup):
    """HAProxy: mode http, its checks of /readyz, forwardfor"""
    port, config = free_port(), setup.folder / "haproxy.cfg"
    config.write_text(f"""
defaults
  mode http
  timeout connect 5s
  timeout client 10s
  timeout server 10s
frontend in
  bind 127.0.0.1:{port}
  default_backend mb
backend mb
  option forwardfor
  option httpchk
  http-check send meth GET uri /readyz ver HTTP/1.1 hdr Host mb
  http-check expect status 200
  server one 127.0.0.1:{setup.strict.ports[0]} check inter 100
""")
    background(path_of("haproxy"), "-f", config, "-db", stderr=subprocess.DEVNULL)
    until("HAProxy listens", lambda: listens(port))
    behind(setup, f"http://127.0.0.1:{port}", "127.0.0.4")


def nginx(setup):
    """nginx: HTTP/1.1 with kept connections, and HTTP/1.0 as it is by default"""
    for version, source in (("1.1", "127.0.0.5"), ("1.0", "127.0.0.6")):
        folder, port = setup.subfolder(f"nginx-{version}"), free_port()
        (folder / "nginx.conf").write_text(f"""
daemon off; pid nginx.pid; error_log stderr crit; events {{ worker_connections 256; }}
http {{
  access_log off; client_max_body_size 8m;
  client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path f; uwsgi_temp_path u; scgi_temp_path s;
  upstream mb {{ server 127.0.0.1:{setup.strict.ports[0]}; keepalive {8 if version == "1.1" else 1}; }}
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://mb; proxy_http_version {version}; proxy_request_buffering {"off" if version == "1.1" else "on"};
      proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
      {'proxy_set_header Connection "";' if version == "1.1" else ""}
    }}
  }}
}}
""")
        background(path_of("nginx"), "-p", folder, "-c", "nginx.conf", "-g", "master_process off;", stderr=subprocess.DEVNULL)
        until("nginx listens", lambda: listens(port))
        behind(setup, f"http://127.0.0.1:{port}", source)


def blackbox(setup):
    """Prometheus' blackbox exporter: /readyz, and a call whose result it matches"""
    port, config = free_port(), setup.folder / "blackbox.yml"
    post = {"method": "POST", "body": SUM, "headers": {"Content-Type": "application/json"}}
    modules = {
        "ready": {"prober": "http", "timeout": "5s"},
        "sum": {"prober": "http", "timeout": "5s", "http": {**post, "fail_if_body_not_matches_regexp": ['"sum":42}']}},
        "wrong": {"prober": "http", "timeout": "5s", "http": {**post, "fail_if_body_not_matches_regexp": ['"sum":43}']}},
    }
    config.write_text(json.dumps({"modules": modules}))  # JSON is YAML
    background(path_of("prometheus-blackbox-exporter"), f"--config.file={config}",
               f"--web.listen-address=127.0.0.1:{port}", stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    until("it listens", lambda: listens(port))

    def probe(module, target):
        query = urllib.parse.urlencode({"module": module, "target": target})
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/probe?{query}", timeout=PATIENCE) as page:
            return re.search(r"^probe_success (\d)$", page.read().decode(), re.MULTILINE)[1]
    equal([probe("ready", f"{setup.plain.url}/readyz"), probe("ready", f"{setup.plain.url}/call/calc.add"),
           probe("sum", setup.plain.call), probe("wrong", setup.plain.call)], ["1", "0", "1", "0"])


CLIENTS = [
    readme, curl_versions, curl_chunked, curl_expect, curl_head, curl_keeps, curl_tls, python_requests, node_fetch,
    browser_refused, browser_allowed, haproxy, nginx, blackbox,
]


def main():
    install()
    begun, failed = time.monotonic(), 0
    with stack:
        setup = Setup()
        wanted = sys.argv[1:]
        for client in CLIENTS:
            if wanted and not any(name.lower() in client.__doc__.lower() for name in wanted):
                continue
            since = time.monotonic()
            try:
                client(setup)
                result = "ok"
            except (AssertionError, OSError, ValueError, subprocess.TimeoutExpired) as error:
                failed += 1
                result = f"FAILED: {error}"
            print(f"{time.monotonic() - since:5.1f} s  {client.__doc__}: {result}", flush=True)
    print(f"{time.monotonic() - begun:5.1f} s  in all, {failed} failed")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
