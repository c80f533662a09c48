"""What works in a component of JavaScript and what is absent, probe by probe:

    cargo build --release && python3 tests/probes/javascript.py [--write]

Builds a project with the probes of tests/probes/javascript as a new user
would, calls each of them, those that must differ three times and again after a
restart, and builds projects that must fail or warn. Exits 1 where a probe
answers another value than it should or than Node.js does, where a failure does
not say why, where instances are not reset, and where the table in
services/JAVASCRIPT.md is not what came of it. `--write` writes the table.
Takes packages from npm, and a minute.
"""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request

root = pathlib.Path(__file__).resolve().parents[2]
program = root / "target/release/mb-server"
sources = root / "tests/probes/javascript"
page = root / "services/JAVASCRIPT.md"
ROUNDS = 3
LEAST = 30
BEGIN, END = "<!-- made by tests/probes/javascript.py -->\n", "<!-- until here -->"

# What is wrong at the top level of a module: its text, and what the build says.
AT_BUILD = [
    ("`import` of a module of Node.js", "import fs from 'node:fs'; console.log(fs);",
     r"node:fs is a module of Node\.js, which is absent in a service"),
    ("`await` at the top level of a module", "await null;", r"Top-level await is not available"),
    ("`crypto.getRandomValues` at the top level of a module", "crypto.getRandomValues(new Uint8Array(4));",
     r"at the top level of a module would be the same in every call.*actions\.js:1"),
    ("`setTimeout` at the top level of a module", "setTimeout(() => {}, 1);",
     r"setTimeout at the top level of a module: there is no call yet.*actions\.js:1"),
    ("an Error at the top level of a module", "null.x;", r"cannot read property 'x' of null.*actions\.js:1"),
    ("an interface of WASI that the server lacks", "import { get } from 'wasi:http/types@0.2.12'; get();", r"wasi:http"),
    ("a file that is not there", "import './nowhere.js';", r"Could not resolve .*nowhere\.js"),
]

wrong = []


def check(title, holds, seen):
    print(f"{'ok    ' if holds else 'WRONG '} {title}{'' if holds else f': {seen}'}", flush=True)
    if not holds:
        wrong.append(title)


def new(parent, name):
    folder = pathlib.Path(parent) / name
    subprocess.run([program, "new", name, "--lang", "js", "--dir", folder], check=True, capture_output=True)
    return folder


def build(folder):
    run = subprocess.run([program, "build", folder], capture_output=True, text=True)
    return run.returncode, run.stdout + run.stderr


class Server:
    """A server of one component, and the lines of its log."""

    def __init__(self, parent, component):
        services = pathlib.Path(parent) / "services"
        services.mkdir(exist_ok=True)
        shutil.copy(component, services)
        settings = pathlib.Path(parent) / "settings.toml"
        settings.write_text('[services.default]\nexpose_traps = true\n')
        environment = {**os.environ, "XDG_STATE_HOME": f"{parent}/state", "MB_ADMIN__PORT": "0", "MB_LOG_FORMAT": "json"}
        command = [program, "serve", "--config", settings, "--services", services, "--port", "0"]
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.lines, self.address, self.admin = [], None, None
        ready = threading.Event()

        def read():
            for line in self.process.stdout:
                self.lines.append(line)
                if match := re.search(r"--server (127\.0\.0\.1:\d+)", line):
                    self.address = match.group(1)
                    ready.set()
                if match := re.search(r"admin\s+(http://127\.0\.0\.1:\d+)", line):
                    self.admin = match.group(1)
            ready.set()

        threading.Thread(target=read, daemon=True).start()
        if not ready.wait(120) or self.address is None:
            self.end()
            sys.exit(f"the server is not ready:\n{''.join(self.lines)}")

    def logs(self, text):
        """Whether it is in the log, which is written beside what the server does."""
        until = time.monotonic() + 60
        while text not in "".join(self.lines) and time.monotonic() < until:
            time.sleep(0.05)
        return text in "".join(self.lines)

    def call(self, number, timeout=None):
        """The answer as JSON text, or None; and what was said of a failure."""
        command = [program, "call", "probes.run", str(number), "--server", self.address]
        run = subprocess.run(command + (["--timeout", str(timeout)] if timeout else []), capture_output=True, text=True, timeout=60)
        if run.returncode == 0:
            return run.stdout.strip(), ""
        said = re.sub(r"(?m)^request id: .*\n", "", run.stderr)
        for line in said.splitlines():
            if line.startswith("{"):
                details = json.loads(line)
                said += "\n".join(details.get("stderr", []))
        return None, said

    def end(self):
        self.process.terminate()
        self.process.wait(30)


def matches(pattern, text):
    flags = re.DOTALL if "s" in pattern["flags"] else 0
    return re.search(pattern["source"].replace("(?<", "(?P<"), text, flags | (re.IGNORECASE if "i" in pattern["flags"] else 0))


def outcome(probe, server):
    """What the table says of a probe, and whether it is as it should be."""
    value, said = server.call(probe["number"], probe.get("timeout"))
    pattern = probe.get("fails") or probe.get("absent")
    if pattern:
        first = next((line for line in said.splitlines() if re.search(r"\w", line)), "")
        if "SERVICE_FAILED" in first:
            first = next((line for line in said.splitlines()[1:] if line and not line.startswith("{")), first)
        return (f"absent: {first}" if probe.get("absent") else f"fails: {first}"), value is None and matches(pattern, said), value or said
    if probe.get("fresh"):
        seen = [value] + [server.call(probe["number"])[0] for _ in range(ROUNDS - 1)]
        probe["seen"] = seen
        return "works, differs in every call", all(v and matches(probe["fresh"], v) for v in seen) and len(set(seen)) == ROUNDS, seen
    native = probe.get("native", {"value": probe["is"]})
    holds = value is not None and json.loads(value) == probe["is"] and native.get("value") == probe["is"]
    return "works", holds, f"{value} {said}, in Node.js {native}"


def probe_all(parent):
    folder = new(parent, "probes")
    for file in folder.glob("*.js"):
        file.unlink()
    for file in sources.iterdir():
        if file.is_file():
            shutil.copy(file, folder)
    code, said = build(folder)
    if code:
        sys.exit(f"the probes are not built:\n{said}")
    environment = {**os.environ, "TZ": "UTC", "NO_COLOR": "1"}
    bundle = ["node_modules/.bin/esbuild", "list.mjs", "--bundle", "--platform=node", "--target=node20", "--outfile=list.cjs"]
    subprocess.run(bundle, cwd=folder, check=True, capture_output=True)
    listed = subprocess.run(["node", "list.cjs"], cwd=folder, env=environment, capture_output=True, text=True)
    if listed.returncode:
        sys.exit(f"the probes do not run in Node.js:\n{listed.stderr}")
    probes = [{**probe, "number": number} for number, probe in enumerate(json.loads(listed.stdout[listed.stdout.index("[{"):]))]
    component = folder / "dist/probes.wasm"
    server = Server(parent, component)
    rows, calls = [], 0
    try:
        for title, text in [
            ("console while the modules load", "while loading { a: [ 1 ] }"),
            ("a random number at the top level of a module is warned of",
             "Math.random() was called at the top level of a module"),
        ]:
            check(title, server.logs(text), "".join(server.lines))
        failed = 0
        for probe in probes:
            row, holds, seen = outcome(probe, server)
            failed += not row.startswith("works")
            calls += ROUNDS if probe.get("fresh") else 1
            check(f"{probe['group']}: {probe['name']}", holds, seen)
            rows.append((probe["group"], probe["name"], row))
        # Only what failed leaves its instance unfit.
        with urllib.request.urlopen(f"{server.admin}/services") as answer:
            made = json.load(answer)["services"][0]["instances"]
        print(f"{calls} calls, {failed} of which were to fail, {made} instances", flush=True)
        begun = made
        for _ in range(50):
            server.call(0)
        with urllib.request.urlopen(f"{server.admin}/services") as answer:
            made = json.load(answer)["services"][0]["instances"] - begun
        check("instances are reset", made <= 5, f"{made} instances for 50 calls")
    finally:
        server.end()
    server = Server(parent, component)
    try:
        for probe in probes:
            if probe.get("fresh"):
                value, _ = server.call(probe["number"])
                check(f"{probe['name']} differs after a restart", value and value not in probe["seen"], value)
    finally:
        server.end()
    return folder, rows


def build_all(folder):
    rows = []
    (folder / "service.js").write_text(
        "import { service } from 'mb-service';\nimport about from './package.json' with { type: 'json' };\n"
        "import './actions.js';\nexport const handler = service(about, { run: () => null });\n")
    for name, text, pattern in AT_BUILD:
        (folder / "actions.js").write_text(text + "\n")
        code, said = build(folder)
        check(name, code == 1 and re.search(pattern, said, re.DOTALL), said)
        first = re.search(pattern.split(".*")[0], said)
        rows.append(("At the build", name, f"the build fails: {first.group(0) if first else said}"))
    return rows


def table(rows):
    text, before = "", None
    for group, name, row in rows:
        if group != before:
            text += f"\n| {group} | |\n| --- | --- |\n"
            before = group
        row = re.sub(r" of \d+ ms", "", " ".join(row.split())).replace("|", "\\|")
        text += f"| {name} | {row} |\n"
    return text + "\n"


if not program.is_file():
    sys.exit(f"{program} is missing: cargo build --release")
with tempfile.TemporaryDirectory() as parent:
    folder, rows = probe_all(parent)
    rows += build_all(folder)
check(f"at least {LEAST} probes", len(rows) >= LEAST, len(rows))
text = page.read_text()
head, rest = text.split(BEGIN)
made = head + BEGIN + table(rows) + rest[rest.index(END):]
if "--write" in sys.argv[1:]:
    page.write_text(made)
else:
    check("the table in services/JAVASCRIPT.md", made == text, "it is stale: python3 tests/probes/javascript.py --write")
print(f"{len(rows)} probes, {len(wrong)} wrong")
sys.exit(1 if wrong else 0)
