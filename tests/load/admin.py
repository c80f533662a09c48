"""What looking costs: the wire under full load, with and without 50 admin
requests a second over every route that reads, in pairs.

    cargo build --release && python3 tests/load/admin.py

Exits 1 where the median pair loses 5 % of its throughput or more, or an admin
request takes over a second.
"""

import json
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request

root = pathlib.Path(__file__).resolve().parents[2]
program = root / "target/release/mb-server"
PAIRS = 5
SECONDS = 4
RATE = 50


def rate(wire):
    run = subprocess.run([program, "bench", "--server", wire, "--pipeline", "4", "--duration", str(SECONDS), "--json"],
                         capture_output=True, text=True, check=True)
    report = json.loads(run.stdout)
    return report["answers"] / report["seconds"]


class Looking(threading.Thread):
    def __init__(self, admin, paths):
        super().__init__(daemon=True)
        self.admin, self.paths, self.slowest, self.count, self.stop = admin, paths, 0.0, 0, False

    def run(self):
        due = time.monotonic()
        while not self.stop:
            path = self.paths[self.count % len(self.paths)]
            begun = time.monotonic()
            try:
                urllib.request.urlopen(f"http://{self.admin}{path}", timeout=10).read()
            except urllib.error.HTTPError:
                pass
            self.slowest = max(self.slowest, time.monotonic() - begun)
            self.count += 1
            due += 1 / RATE
            time.sleep(max(0.0, due - time.monotonic()))


with tempfile.TemporaryDirectory() as folder:
    settings = pathlib.Path(folder) / "mb.toml"
    settings.write_text(f'state_dir = "{folder}/state"\nservices_dir = "{root}/services/dist"\n')
    server = subprocess.Popen([program, "serve", "--config", settings, "--port", "0", "--admin-port", "0"],
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        said = ""
        while "ready in" not in said:
            said += server.stdout.readline()
        wire = re.search(r"listening +(\S+)", said).group(1)
        admin = re.search(r"admin +http://(\S+)/", said).group(1)
        document = json.load(urllib.request.urlopen(f"http://{admin}/openapi.json"))
        paths = [path.replace("{id}", "1").replace("{name}", "echo") for path, methods in document["paths"].items()
                 if "get" in methods and path != "/events"]
        rate(wire)
        ratios, slowest = [], 0.0
        for pair in range(1, PAIRS + 1):
            without = rate(wire)
            looking = Looking(admin, paths)
            begun = time.monotonic()
            looking.start()
            looked_at = rate(wire)
            looking.stop = True
            looking.join()
            asked = looking.count / (time.monotonic() - begun)
            ratios.append(looked_at / without)
            slowest = max(slowest, looking.slowest)
            print(f"pair {pair}: {without:.0f}/s, {looked_at:.0f}/s beside {asked:.0f} admin requests a second over "
                  f"{len(paths)} routes, the slowest {looking.slowest * 1e3:.0f} ms")
    finally:
        server.terminate()
        server.wait(30)
median = statistics.median(ratios)
print(f"median ratio {median:.3f} (bound 0.95), slowest admin request {slowest * 1e3:.0f} ms (bound 1000)")
sys.exit(0 if median > 0.95 and slowest < 1 else 1)
