"""How long after saving a change the next call shows it, in each language:

    cargo build --release && python3 tests/load/edits.py [rust] [js] [ts] [python]

Makes a project, runs `mb-server dev`, calls, edits, and calls until the
answer is the new one. Exits 1 where that takes longer than it should: 3 s for
Rust, 4 s for JavaScript and TypeScript, 15 s for Python, once the tools are there.
"""

import json
import pathlib
import subprocess
import sys
import tempfile
import threading
import time

root = pathlib.Path(__file__).resolve().parents[2]
program = root / "target/release/mb-server"

EDITS = {
    "rust": ("src/lib.rs", '"Hello, {}!"', '"Good day, {}!"', 3),
    "js": ("actions.js", "`Hello, ", "`Good day, ", 4),
    "ts": ("actions.ts", "`Hello, ", "`Good day, ", 4),
    "python": ("actions.py", 'f"Hello, ', 'f"Good day, ', 15),
}
ROUNDS = 3
FIRST_BUILD = 600


def call(server):
    run = subprocess.run(
        [program, "call", "hello.greet", '{"name":"Ada"}', "--server", server], capture_output=True, text=True
    )
    return json.loads(run.stdout)["text"] if run.returncode == 0 else run.stderr


def until(wanted, server, seconds):
    begun = time.monotonic()
    while (answer := call(server)) != wanted:
        if time.monotonic() - begun > seconds:
            sys.exit(f"still {answer!r} after {seconds} s, not {wanted!r}")
        time.sleep(0.02)
    return time.monotonic() - begun


def measure(language, parent):
    file, before, after, bound = EDITS[language]
    project = pathlib.Path(parent) / language
    subprocess.run([program, "new", "hello", "--lang", language, "--dir", project], check=True, capture_output=True)
    dev = subprocess.Popen([program, "dev", project, "--port", "0"], stderr=subprocess.PIPE, stdin=subprocess.PIPE, text=True)
    lines, ready = [], threading.Event()

    def read():
        for line in dev.stderr:
            lines.append(line)
            if line.startswith("ready: "):
                ready.set()

    threading.Thread(target=read, daemon=True).start()
    try:
        begun = time.monotonic()
        if not ready.wait(FIRST_BUILD):
            sys.exit(f"{language}: not ready after {FIRST_BUILD} s:\n{''.join(lines)}")
        first = time.monotonic() - begun
        address = next(line.split(" on ")[1].split(",")[0] for line in lines if line.startswith("serving "))
        until("Hello, Ada!", address, 10)
        times = []
        source = project / file
        for _ in range(ROUNDS):
            for old, new, shown in [(before, after, "Good day, Ada!"), (after, before, "Hello, Ada!")]:
                text = source.read_text()
                assert old in text, f"{file} has no {old}"
                source.write_text(text.replace(old, new))
                times.append(until(shown, address, 120))
        lines.clear()
        dev.stdin.write("\n")
        dev.stdin.flush()
        repeated = time.monotonic() + 10
        while not any("hello.greet in" in line for line in lines):
            if time.monotonic() > repeated:
                sys.exit(f"{language}: Enter repeats nothing:\n{''.join(lines)}")
            time.sleep(0.02)
    finally:
        dev.terminate()
        dev.wait(20)
    times.sort()
    print(f"{language}: first ready after {first:.1f} s; an edit shows after {times[len(times) // 2]:.2f} s, "
          f"at most {times[-1]:.2f} s (bound {bound})")
    return times[-1] <= bound


with tempfile.TemporaryDirectory() as parent:
    fine = [measure(language, parent) for language in sys.argv[1:] or EDITS]
sys.exit(0 if all(fine) else 1)
