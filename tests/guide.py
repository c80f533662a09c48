"""Runs the commands of the guides (PAGES below) as they stand there.

    cargo build --release && python3 tests/guide.py [PAGE | SECTION ...]

Blocks marked `sh` are run line by line in an empty folder, all blocks of one
at a time; those marked `sh repository` in the repository, with OUT naming a folder
for what they make. What ends with & goes on until the block ends, and the next
line runs when its server answers. `#=> TEXT` must be in what the line before
it printed. SERVICES is the folder of the example services. Needs what the guide asks for: npm, Python, clang, a Rust compiler
for WebAssembly; and ports 8081, 8444 and 9090.
"""

import os
import pathlib
import re
import socket
import subprocess
import sys
import tempfile
import time

root = pathlib.Path(__file__).resolve().parents[1]
program = root / "target/release/mb-server"
PATIENCE = 600
PAGES = [
    "README.md", "services/README.md", "services/CAPABILITIES.md", "services/LANGUAGES.md", "services/PYTHON.md",
    "services/JAVASCRIPT.md", "admin/README.md",
]


def blocks(text):
    """Pairs of a section and the lines of one block, and whether it is run in the repository."""
    section = ""
    for match in re.finditer(r"^##+ ([^\n]+)$|^```sh( repository)?\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        if match.group(1):
            section = match.group(1)
        else:
            yield section, joined(match.group(3)), bool(match.group(2))


def joined(text):
    """Its lines, those of a file that is written by `<<'END'` in one."""
    lines = re.findall(r"^[^\n]*<<'END'[^\n]*\n.*?^END$|^[^\n]*$", text, re.MULTILINE | re.DOTALL)
    return [line for line in lines if line.strip()]


def fail(section, line, said):
    sys.exit(f"{section}: {line}\n{said}")


def serves():
    """Whether a server answers without TLS, or listens with it."""
    if subprocess.run([program, "ping", "-c", "1"], capture_output=True).returncode == 0:
        return True
    with socket.socket() as peer:
        return peer.connect_ex(("127.0.0.1", 8444)) == 0


class Block:
    def __init__(self, section, folder, out):
        self.section, self.folder, self.running = section, folder, []
        self.environment = {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}", "OUT": out,
                            "SERVICES": str(root / "services/dist"),
                            "XDG_STATE_HOME": f"{out}/state", "MB_ADMIN__PORT": "0"}

    def run(self, line):
        """The line, in a shell that goes on where the one before has stopped."""
        # A changed folder counts for the next line too.
        run = subprocess.run(["bash", "-c", f"set -euo pipefail\n{line}\npwd >&3"], cwd=self.folder, text=True,
                             env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                             pass_fds=[3], timeout=PATIENCE)
        if run.returncode:
            fail(self.section, line, run.stdout)
        os.lseek(3, 0, os.SEEK_SET)
        self.folder = os.read(3, 4096).decode().strip()
        os.ftruncate(3, 0)
        os.lseek(3, 0, os.SEEK_SET)
        return run.stdout

    def begin(self, line):
        process = subprocess.Popen(["bash", "-c", f"exec {line}"], cwd=self.folder, env=self.environment,
                                   stdin=subprocess.DEVNULL)
        self.running.append(process)
        until = time.monotonic() + PATIENCE
        while not serves():
            if process.poll() is not None or time.monotonic() > until:
                fail(self.section, line, "its server answers neither on port 8081 nor, with TLS, on 8444")
            time.sleep(0.1)

    def end(self):
        for process in self.running:
            process.terminate()
            process.wait(30)


def run_block(section, lines, in_repository):
    with tempfile.TemporaryDirectory() as out, tempfile.TemporaryFile() as folder:
        os.dup2(folder.fileno(), 3)
        block = Block(section, str(root) if in_repository else out, out)
        said, last = "", ""
        try:
            for line in lines:
                if line.startswith("#=> "):
                    if line[4:] not in said:
                        fail(section, last, f"{said}\ndoes not hold {line[4:]!r}")
                elif line.endswith(" &"):
                    block.begin(line[:-2])
                elif line.strip():
                    print(f"{section}: {line}", flush=True)
                    said, last = block.run(line), line
        finally:
            block.end()


if not program.is_file():
    sys.exit(f"{program} is missing: cargo build --release")
wanted = sys.argv[1:]
found = [(page, *block) for page in PAGES for block in blocks((root / page).read_text())]
if len(found) < 20:
    sys.exit(f"only {len(found)} blocks found in the guides")
for page, section, lines, in_repository in found:
    if not wanted or page in wanted or section in wanted:
        run_block(f"{page}, {section}", lines, in_repository)
