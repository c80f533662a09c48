#!/usr/bin/env python3
"""The smallest deployment: a static binary without a compiler in an empty root.

    python3 tests/minimal.py

Builds the binary (profile dist, without the compiler, linked statically),
compiles calc and echo ahead of time, starts the server as the only program in
a folder that holds nothing else, calls both services by address and by name, and prints its size,
how long it takes until it is ready, and what it keeps in memory, idle and with
a thousand idle connections. Needs root, for chroot. Exits 1 if anything does
not work; the figures decide nothing.
"""

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
TARGET = f"{os.uname().machine}-unknown-linux-gnu"
STATIC = ROOT / "target/static"
STARTS = 11
CONNECTIONS = 1000


def run(*command, **options):
    return subprocess.run([str(part) for part in command], check=True, cwd=ROOT, **options)


def build():
    """Both binaries: the one that compiles, and the one that is copied."""
    run("cargo", "build", "--release")
    # Without the second, random numbers come from /dev/urandom, which is not there.
    flags = '-C target-feature=+crt-static --cfg getrandom_backend="linux_getrandom"'
    # A target that is named keeps these flags away from build scripts.
    run("cargo", "build", "--profile", "dist", "--no-default-features", "--features", "runtime", "--bin", "mb-server",
        "--target", TARGET, "--target-dir", STATIC, env={**os.environ, "RUSTFLAGS": flags})
    return STATIC / TARGET / "dist/mb-server"


def furnish(root, binary):
    """An empty root folder but for the program and two services."""
    shutil.copy(binary, root / "mb-server")
    (root / "services").mkdir()
    for name in ["calc", "echo"]:
        run(ROOT / "target/release/mb-server", "compile", ROOT / f"services/dist/{name}.wasm",
            "--output", root / f"services/{name}.cwasm", stdout=subprocess.DEVNULL)
    (root / "state").mkdir(mode=0o700)
    # No file of hosts, and a plug-in for names that ends who loads it.
    (root / "etc").mkdir()
    (root / "etc/nsswitch.conf").write_text("hosts: wrong files dns\n")
    if compiler := shutil.which("cc"):
        (root / "lib").mkdir()
        source = "__attribute__((constructor)) static void start(void) { __builtin_trap(); }"
        run(compiler, "-shared", "-fPIC", "-nostdlib", "-xc", "-", "-o", root / "lib/libnss_wrong.so.2",
            input=source.encode())


def start(root):
    """The process, its address, and milliseconds until it was ready."""
    begun = time.monotonic()
    process = subprocess.Popen(
        ["/mb-server", "serve", "--host", "localhost", "--port", "0", "--admin-port", "0", "--services", "/services"],
        executable="/mb-server", stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd="/",
        env={"MB_STATE_DIR": "/state"}, preexec_fn=lambda: (os.chroot(root), os.chdir("/")))
    lines = []
    while not lines or not lines[-1].startswith("ready"):
        lines.append(process.stdout.readline())
        if not lines[-1]:
            sys.exit("it ended before it was ready: " + "".join(lines))
    took = (time.monotonic() - begun) * 1000
    listening = next(line for line in lines if "listening" in line).split()[1]
    return process, listening, took


def call(address, line, payload):
    host, port = address.rsplit(":", 1)
    body = (line + "\n" + json.dumps(payload)).encode()
    with socket.create_connection((host, int(port)), 10) as connection:
        connection.sendall(struct.pack(">II", len(body), 0) + body)
        head = connection.recv(8, socket.MSG_WAITALL)
        answer = connection.recv(struct.unpack(">I", head[:4])[0], socket.MSG_WAITALL)
    return json.loads(answer.split(b"\n", 1)[1])


def resident(process):
    """KiB of memory that the process keeps."""
    status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])


def settled(process):
    """The same, once it does not change any more."""
    before, same = resident(process), 0
    while same < 5:
        time.sleep(0.1)
        now = resident(process)
        same = same + 1 if abs(now - before) < 16 else 0
        before = now
    return before


def main():
    binary = build()
    linked = subprocess.run(["ldd", str(binary)], capture_output=True, text=True)
    assert "not a dynamic executable" in linked.stderr + linked.stdout or "statically" in linked.stdout, linked
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder) / "root"
        root.mkdir(mode=0o755)
        furnish(root, binary)
        times = []
        for _ in range(STARTS):
            process, address, took = start(root)
            times.append(took)
            process.terminate()
            assert process.wait() == 0
        process, address, _ = start(root)
        try:
            idle = settled(process)
            answer = call(address, "REQUEST:calc.add:1.0.0:one", {"a": 2, "b": 40})
            assert answer == {"sum": 42}, answer
            assert call(address, "REQUEST:echo.say:1.0.0:two", "x") == "x"
            for name, expected in [("localhost", 0), ("nosuch.invalid", 3)]:
                server = f"{name}:{address.rsplit(':', 1)[1]}"
                asked = subprocess.run(
                    ["/mb-server", "call", "echo.say", "--server", server], executable="/mb-server", cwd="/",
                    capture_output=True, preexec_fn=lambda: (os.chroot(root), os.chdir("/")))
                assert asked.returncode == expected, asked
            host, port = address.rsplit(":", 1)
            connections = [socket.create_connection((host, int(port)), 10) for _ in range(CONNECTIONS)]
            for connection in connections:
                connection.sendall(struct.pack(">II", 0, 1))
            for connection in connections:
                assert connection.recv(8, socket.MSG_WAITALL) == struct.pack(">II", 0, 1)
            full = settled(process)
        finally:
            process.terminate()
            process.wait()
        times.sort()
        print(f"size            {binary.stat().st_size / 2**20:.1f} MiB, static, without a compiler")
        print(f"ready           {times[len(times) // 2]:.1f} ms after its start, {STARTS} starts "
              f"({times[0]:.1f} to {times[-1]:.1f})")
        print(f"idle            {idle / 1024:.1f} MiB resident, two services")
        print(f"{CONNECTIONS} idle peers {full / 1024:.1f} MiB resident, "
              f"{(full - idle) / CONNECTIONS:.1f} KiB for each")


main()
