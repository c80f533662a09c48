"""What works in a component of Python and what is absent, probe by probe:

    cargo build --release && python3 tests/probes/python.py [--write]

Builds the project in tests/probes/python as a new user would, calls each probe
three times and again after a restart, and builds projects that must fail or
warn. Exits 1 where a probe that works gives another value, one that must
differ does not, or a failure does not say what is absent; and where the table
in services/PYTHON.md is not what came of it. `--write` writes the table.
Takes packages from PyPI, and a minute and a half.
"""

import json
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time

root = pathlib.Path(__file__).resolve().parents[2]
program = root / "target/release/mb-server"
page = root / "services/PYTHON.md"
ROUNDS = 3
BEGIN, END = "<!-- made by tests/probes/python.py -->\n", "<!-- until here -->"

wrong = []


def check(title, holds, seen):
    print(f"{'ok    ' if holds else 'WRONG '} {title}{'' if holds else f': {seen}'}", flush=True)
    if not holds:
        wrong.append(title)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def new(parent, name, **files):
    folder = pathlib.Path(parent) / name
    subprocess.run([program, "new", name, "--lang", "python", "--dir", folder], check=True, capture_output=True)
    for file, text in files.items():
        (folder / file.replace("_txt", ".txt").replace("_py", ".py")).write_text(text)
    return folder


def build(folder):
    run = subprocess.run([program, "build", folder], capture_output=True, text=True)
    return run.returncode, run.stdout + run.stderr


class Server:
    def __init__(self, parent, services):
        self.address = f"127.0.0.1:{free_port()}"
        settings = pathlib.Path(parent) / "settings.toml"
        settings.write_text(f'services_dir = "{services}"\nstate_dir = "{parent}/state"\nport = {self.address[10:]}\n'
                            "[admin]\nport = 0\n[services.probe]\nexpose_traps = true\n")
        self.log = open(pathlib.Path(parent) / "log", "ab")
        self.process = subprocess.Popen([program, "serve", "--config", settings], stdout=subprocess.DEVNULL, stderr=self.log)
        until = time.monotonic() + 120
        while subprocess.run([program, "ping", "-c", "1", "--server", self.address], capture_output=True).returncode:
            if time.monotonic() > until or self.process.poll() is not None:
                sys.exit(f"the server does not answer: {(pathlib.Path(parent) / 'log').read_text()}")
            time.sleep(0.1)

    def call(self, topic, payloads):
        """Answers in the order of the payloads: (True, answer) or (False, error)."""
        lines = "".join(json.dumps({"topic": topic, "payload": payload}) + "\n" for payload in payloads)
        run = subprocess.run([program, "call", "--server", self.address, "--requests", "-"], input=lines,
                             capture_output=True, text=True)
        answers = [json.loads(line) for line in run.stdout.splitlines()]
        if len(answers) != len(payloads):
            sys.exit(f"{len(answers)} answers to {len(payloads)} calls: {run.stderr}")
        return [("answer" in line, line.get("answer", line.get("error"))) for line in answers]

    def end(self):
        self.process.terminate()
        self.process.wait(30)
        self.log.close()


def told(error):
    """All that a caller gets to know of a failure."""
    details = error.get("details") or {}
    return "\n".join([f"{error['code']}: {error['message']}", *details.get("stderr", [])])


def battery(parent):
    folder = new(parent, "probe")
    for file in (root / "tests/probes/python").iterdir():
        if file.is_file():
            shutil.copy(file, folder)
    code, said = build(folder)
    if code:
        sys.exit(said)
    server = Server(parent, folder / "dist")
    (fine, probes), = server.call("probe.list", [None])
    if not fine:
        sys.exit(f"probe.list: {probes}")
    rounds = [server.call("probe.run", list(probes)) for _ in range(ROUNDS)]
    server.end()
    server = Server(parent, folder / "dist")
    rounds.append(server.call("probe.run", list(probes)))
    server.end()
    for name, probe, seen in zip(probes, probes.values(), zip(*rounds)):
        title, kind = probe["title"], probe["kind"]
        if kind == "works":
            check(title, all(one == (True, probe["expected"]) for one in seen), seen[0])
        elif kind == "differs":
            values = {json.dumps(value) for fine, value in seen if fine}
            check(title, len(values) == ROUNDS + 1, seen)
        else:
            check(title, all(not fine and probe["says"] in told(error) for fine, error in seen), seen[0])
    log = (pathlib.Path(parent) / "log").read_text()
    check("`print` and `logging` are in the log", "a probe of print" in log and "a probe of logging" in log, log[-500:])
    stderr = told(rounds[0][list(probes).index("exception")][1])
    check("an exception's file and line reach the caller", re.search(r'File "actions.py", line \d+, in exception', stderr), stderr)
    return probes


HELLO = 'from mb_service import log\n\n\ndef greet(person):\n    """Greets."""\n    return {"text": WORD}\n'


def builds(parent):
    tool = (root / "services/templates/python/requirements.txt").read_text()
    uses_six = HELLO.replace("WORD", 'six.ensure_text("Hello")').replace("from mb", "import six\nfrom mb", 1)
    folder = new(parent, "packages", actions_py=uses_six)
    code, said = build(folder)
    check("a package that requirements.txt does not name", code == 1 and "No module named 'six'" in said, said)
    (folder / "requirements.txt").write_text(tool + "six\n")
    code, said = build(folder)
    check("a package that was added to requirements.txt", code == 0 and "requirements.txt has changed" in said, said)
    code, said = build(folder)
    check("nothing is installed where nothing has changed", code == 0 and "pip install" not in said, said)
    (folder / "requirements.txt").write_text(tool)
    code, said = build(folder)
    check("a package that was taken out of requirements.txt, and is in .venv", code == 1 and "No module named 'six'" in said, said)

    (folder / "actions.py").write_text(HELLO.replace("WORD", 'orjson.dumps("x")').replace("from mb", "import orjson\nfrom mb", 1))
    (folder / "requirements.txt").write_text(tool + "orjson\n")
    code, said = build(folder)
    named = re.search(r"orjson [\d.]+ is a native wheel: orjson/\S+\.so is machine code, which a component can't run", said)
    check("a native wheel that nothing can replace", code == 1 and named, said)

    warned = (HELLO.replace("WORD", 'NAME + open("x").read()').replace("\n\n\ndef", "\nimport random, uuid\n\nNAME = str(uuid.uuid4())\nrandom.seed(NAME)\n\n\ndef", 1))
    (folder / "actions.py").write_text(warned)
    (folder / "requirements.txt").write_text(tool)
    code, said = build(folder)
    check("what is drawn once, at the build, is warned of", code == 0 and "actions.py:4 calls uuid.uuid4() when the module" in said, said)
    check("a seed of `random` is warned of", "actions.py:5 gives random a seed" in said, said)
    check("a file that is opened in a function is warned of", "actions.py:10 open() in a function finds no file" in said, said)


def table(probes):
    def rows(kinds):
        return [probe for probe in probes.values() if probe["kind"] in kinds]

    lines = ["| works | |", "| --- | --- |"]
    lines += [f"| {probe['title']} | {'differs in every call' if probe['kind'] == 'differs' else ''} |" for probe in rows(("works", "differs"))]
    lines += ["", "| fails | and the caller and the log get |", "| --- | --- |"]
    lines += [f"| {probe['title']} | `{probe['says']}` |" for probe in rows(("absent",))]
    return "\n".join(lines) + "\n"


def main():
    if not program.is_file():
        sys.exit(f"{program} is missing: cargo build --release")
    with tempfile.TemporaryDirectory() as parent:
        probes = battery(parent)
        builds(parent)
    before, rest = page.read_text().split(BEGIN)
    after = rest.split(END)[1]
    made = before + BEGIN + table(probes) + END + after
    if "--write" in sys.argv:
        page.write_text(made)
    else:
        check("the table in services/PYTHON.md is this one", made == page.read_text(), "run with --write and commit it")
    print(f"\n{len(probes)} probes, {len(wrong)} wrong: {', '.join(wrong)}" if wrong else f"\n{len(probes)} probes, all as they should be")
    sys.exit(bool(wrong))


main()
