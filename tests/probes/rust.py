"""A new project in Rust whose code brings a megabyte of data: it links, and
answers, under `mb-server dev` and from `mb-server build`.

    cargo build --release && python3 tests/probes/rust.py

Says how long the first answer took, and the build after it. Takes crates from
crates.io, and a few minutes where nothing is compiled yet.
"""

import pathlib
import subprocess
import sys
import tempfile
import time

root = pathlib.Path(__file__).resolve().parents[2]
program = root / "target/release/mb-server"
DATA = "static DATA: [u8; 1 << 20] = { let mut data = [7; 1 << 20]; data[123_456] = 42; data };\n"


def main():
    if not program.is_file():
        sys.exit(f"{program} is missing: cargo build --release")
    with tempfile.TemporaryDirectory() as parent:
        project = pathlib.Path(parent) / "data"
        begun = time.monotonic()
        subprocess.run([program, "new", "data", "--lang", "rust", "--dir", project], check=True, stdout=subprocess.DEVNULL)
        source = project / "src/lib.rs"
        text = source.read_text().replace('format!("Hello, {}!", person.name)', 'format!("{} {}", person.name, DATA[person.name.len() * 123_456])')
        source.write_text(text + DATA)
        dev = subprocess.Popen([program, "dev", project, "--port", "0"], stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True)
        try:
            address = next(line.split(" on ")[1].split(",")[0] for line in dev.stderr if line.startswith("serving "))
            run = subprocess.run([program, "call", "data.greet", '{"name":"A"}', "--server", address], capture_output=True, text=True)
        finally:
            dev.terminate()
        print(f"first answer after {time.monotonic() - begun:.0f} s")
        if run.stdout != '{"text":"A 42"}\n':
            sys.exit(f"{run.stdout}{run.stderr}{dev.stderr.read()}")
        begun = time.monotonic()
        build = subprocess.run([program, "build", project], capture_output=True, text=True)
        print(f"built to be deployed in {time.monotonic() - begun:.0f} s")
        if build.returncode:
            sys.exit(build.stdout + build.stderr)
        inspect = subprocess.run([program, "inspect", project / "dist/data.wasm"], capture_output=True, text=True)
        if "name         data" not in inspect.stdout:
            sys.exit(inspect.stdout + inspect.stderr)
        print("2 passed, 0 failed")


main()
