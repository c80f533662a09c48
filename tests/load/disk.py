#!/usr/bin/env python3
"""The state folder on a file system that is really full.

    cargo build --release && sudo python3 tests/load/disk.py [--server PROGRAM] [--require]

Mounts a tmpfs of some MiB, fills it and empties it again: a first start, writes
of a service, a backup, the code cache. Exits 1 where something that is left
keeps a later start from working, or the operator is not told. Where it may not
mount, it says `skipped: WHY` and exits 0, with --require 1.
"""
import argparse
import base64
import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import urllib.request

import soak

ROOT = pathlib.Path(__file__).resolve().parents[2]
GRANTS = """
services_dir = "{services}"
state_dir = "{state}"
port = 0
reload_interval = 0
log_format = "text"
[admin]
port = 0
[services.counter.grants]
keyvalue = true
[services.order.grants]
calls = ["calc.add", "counter.add"]
config = {{ currency = "EUR" }}
"""
failed = []


def expect(what, holds, shown=""):
    print(f"  {'ok' if holds else 'BROKEN'}: {what}{'' if holds else f': {shown}'}", flush=True)
    if not holds:
        failed.append(what)


@contextlib.contextmanager
def mounted(folder, size):
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "tmpfs", folder],
                          capture_output=True, text=True)
    if done.returncode:
        raise PermissionError(done.stderr.strip())
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def fill(file):
    """Takes all the room that there is."""
    with open(file, "wb", buffering=0) as out, contextlib.suppress(OSError):
        while out.write(bytes(1 << 16)):
            pass


class Server:
    def __init__(self, program, config, log):
        self.program, self.log = program, log
        with open(log, "w") as errors:
            cache = {"XDG_CACHE_HOME": os.path.join(os.path.dirname(log), "cache")}
            self.process = subprocess.Popen([program, "serve", "--config", config], stdout=subprocess.PIPE,
                                            stderr=errors, text=True, env=os.environ | cache)
        try:
            ((host, port), *_), admin = soak.addresses(self.process)
        except SystemExit as stopped:
            sys.exit(f"{stopped}{self.said()}")
        self.address, self.admin = f"{host}:{port}", f"http://{admin[0]}:{admin[1]}"

    def call(self, topic, payload):
        done = subprocess.run([self.program, "call", topic, payload, "--server", self.address],
                              capture_output=True, text=True)
        return done.stdout + done.stderr

    def ready(self):
        return json.load(urllib.request.urlopen(f"{self.admin}/readyz"))["store"]

    def said(self):
        return pathlib.Path(self.log).read_text()

    def stop(self):
        self.process.terminate()
        self.process.wait(20)


def run(program, work, state):
    config, log, filler = work / "mb.toml", work / "log", state / "filler"
    config.write_text(GRANTS.format(services=ROOT / "services/dist/granted", state=state))

    print("a first start on a full disk")
    fill(filler)
    server = Server(program, config, log)
    store = server.ready()
    expect("the store is shown as unavailable", store["status"] == "unavailable", store)
    expect("the log says why", "disk is full" in server.said(), server.said())
    server.stop()
    left = sorted(path.name for path in state.rglob("*") if path.is_file() and path != filler)
    expect("no file is left", not left, left)

    print("a start with room")
    filler.unlink()
    server = Server(program, config, log)
    expect("the store is open", server.ready()["status"] == "ok", server.ready())
    expect("there is a token", len((state / "admin.token").read_text().strip()) == 64)
    add = ("counter.add", '{"name":"n"}')
    first = server.call(*add)
    expect("a value is kept", "STORE_FAILED" not in first and "rror" not in first, first)

    print("writes on a full disk")
    fill(filler)
    refused = [server.call("counter.add", json.dumps({"name": f"{i:064}"})) for i in range(300)]
    full = sum("disk is full" in answer for answer in refused)
    expect("writes are refused, and say why", full > 0, refused[-1])
    store = server.ready()
    expect("it is shown", store["full"] >= full and store["error"], store)
    expect("the log says so once", server.said().count("services get STORE_FAILED") == 1, server.said())
    metrics = urllib.request.urlopen(f"{server.admin}/metrics").read().decode()
    expect("it is a metric", 'mb_store_write_failures_total{reason="disk-full"}' in metrics)
    filler.unlink()
    again = server.call(*add)
    expect("with room, the next write succeeds", "rror" not in again, again)
    expect("and that is shown", server.ready()["status"] == "ok", server.ready())
    server.stop()

    print("a backup onto a full disk")
    def command(*arguments):
        done = subprocess.run([program, "store", *arguments, "--config", config], capture_output=True, text=True)
        return done.returncode, done.stderr
    value = base64.b64encode(bytes(60_000)).decode()
    entries = [json.dumps({"service": "a", "bucket": "", "key": f"{i}", "value": value}) for i in range(20)]
    backup = work / "backup.jsonl"
    backup.write_text("\n".join(['{"kind":"mb-server store","format":1}', *entries, '{"entries":20}', ""]))
    code, said = command("import", "--merge", backup)
    expect("a backup is imported", code == 0, said)
    fill(filler)
    with open(filler, "r+b") as out:
        out.truncate(out.seek(0, os.SEEK_END) - (1 << 19))
    to = state / "export.jsonl"
    code, said = command("export", to)
    expect("the backup is named, not the store", code == 1 and "export.jsonl: No space" in said and "redb" not in said,
           said)
    expect("no part is left", not list(state.glob("*export*")) and not list(state.glob(".export*")))
    filler.unlink()
    code, said = command("check")
    expect("the store is sound", code == 0, said)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", default=ROOT / "target/release/mb-server")
    parser.add_argument("--require", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = pathlib.Path(folder)
        state = work / "state"
        state.mkdir(mode=0o700)
        try:
            with mounted(state, "8m"):
                run(arguments.server, work, state)
        except (PermissionError, FileNotFoundError) as error:
            print(f"skipped: {error}")
            sys.exit(1 if arguments.require else 0)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
