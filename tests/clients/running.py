"""A server with settings of one's own, and programs of PyPI in a folder of their own."""

import contextlib
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import venv

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "target/release/mb-server"


def installed(name, *packages):
    """The folder of programs of a virtual environment with these packages."""
    folder = ROOT / "target" / "clients" / name
    programs, done = folder / "bin", folder / "installed"
    if not done.exists() or done.read_text() != " ".join(packages):
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([programs / "pip", "install", "--quiet", *packages], check=True)
        done.write_text(" ".join(packages))
    return programs


def inside(name, *packages):
    """Goes on as this program in a virtual environment with these packages."""
    programs = installed(name, *packages)
    if pathlib.Path(sys.prefix) != programs.parent:
        os.execv(programs / "python", [programs / "python", *sys.argv])


@contextlib.contextmanager
def server(components, settings):
    """A server of these components, with the grants of the examples. Gives its URL."""
    if not PROGRAM.exists():
        sys.exit(f"{PROGRAM} is missing: cargo build --release")
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        (folder / "services").mkdir()
        for component in components:
            (folder / "services" / component.name).symlink_to(component)
        granted = (ROOT / "services/granted.toml").read_text()
        granted = re.sub("^services_dir.*$", "", granted, flags=re.MULTILINE)
        file = folder / "mb.toml"
        file.write_text(f'state_dir = "{folder}/state"\nservices_dir = "{folder}/services"\n{settings}\n{granted}')
        process = subprocess.Popen([PROGRAM, "serve", "--config", file, "--port", "0", "--admin-port", "0"],
                                   stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        try:
            said = ""
            while "ready in" not in said:
                line = process.stdout.readline()
                if not line:
                    sys.exit(f"the server did not start:\n{said}")
                said += line
            yield "http://" + re.search(r"listening +(\S+)", said).group(1)
        finally:
            process.terminate()
            process.wait(30)
