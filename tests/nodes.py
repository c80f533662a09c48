#!/usr/bin/env python3
"""Three servers that share a store, behind HAProxy, under load.

    cargo build --release && sudo python3 tests/nodes.py [kill|deploy|restart|stop|pause|cut]... [--require]

Gives each server, and redis-server with `appendfsync always`, a network
namespace of its own, connected by a bridge in one more, where HAProxy runs with
admin/deploy/balancers/haproxy.cfg as it stands. 300 calls of `counter.add` a
second go through it over 12 connections, while

    kill      a server is killed (SIGKILL) with calls in flight
    deploy    `mb-server service deploy` puts a new build on all three
    restart   each server in turn is drained and started again
    stop      Redis is stopped for 10 s, and starts again with its files
    pause     Redis stands still for 3 s (SIGSTOP)
    cut       the network loses all packets to Redis for 3 s

Each call is recorded: when it was sent, when and how it ended. Prints figures,
and exits 1 where a call fails that must not, where an error is not true, or
where a count in the store is not what was acknowledged. Changes nothing outside
of its namespaces. All files lie in memory: a disk that others keep busy, as a
compiler does, makes each write of Redis take seconds, and no server can help
that. Where it may not make namespaces or a program is missing, it says
`skipped: WHY` and exits 0, with --require 1. A minute for all of it.
"""
import argparse
import collections
import concurrent.futures
import contextlib
import http.client
import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "admin/deploy/balancers/haproxy.cfg"
ALERTS = ROOT / "admin/deploy/alerts.yml"
COUNTER = ROOT / "services/dist/granted/counter.wasm"
# The addresses of the example, a third server, and Redis.
BALANCER = "10.0.0.2"
NODES = {"one": "10.0.0.11", "two": "10.0.0.12", "three": "10.0.0.13"}
REDIS = "10.0.0.20"
TOKEN = "a token for these deploys"

RATE = 300
CONNECTIONS = 12
# What a call has, in seconds; and beyond it, for its error to arrive.
TIMEOUT, SLACK = 2.0, 0.3
# Within so many seconds of its return, the store is used again.
MOMENT = 2.0
PATIENCE = 20
failed = []


def expect(what, holds, shown=""):
    print(f"  {'ok' if holds else 'BROKEN'}: {what}{'' if holds else f': {shown}'}", flush=True)
    if not holds:
        failed.append(what)


def until(what, holds):
    deadline = time.monotonic() + PATIENCE
    while True:
        with contextlib.suppress(OSError, EOFError, http.client.HTTPException):
            if holds():
                return
        assert time.monotonic() < deadline, f"still not: {what}"
        time.sleep(0.05)


# The network.

class Namespaces:
    """One for the bridge, HAProxy and the load, one for each other machine."""

    def __init__(self):
        self.prefix = f"mb{os.getpid()}"
        self.made = []

    def __enter__(self):
        try:
            self.make("hub")
            run("ip", "netns", "exec", f"{self.prefix}-hub", "true")
            self.ip("hub", "link", "add", "name", "bridge", "type", "bridge")
            self.up("hub", "bridge", BALANCER)
            for name, address in [*NODES.items(), ("redis", REDIS)]:
                self.make(name)
                self.ip("hub", "link", "add", f"to-{name}", "type", "veth",
                        "peer", "name", "eth0", "netns", f"{self.prefix}-{name}")
                self.ip("hub", "link", "set", f"to-{name}", "master", "bridge", "up")
                self.up(name, "eth0", address)
        except BaseException:
            self.__exit__()
            raise
        return self

    def make(self, name):
        run("ip", "netns", "add", f"{self.prefix}-{name}")
        self.made.append(f"{self.prefix}-{name}")

    def up(self, name, device, address):
        self.ip(name, "addr", "add", f"{address}/24", "dev", device)
        for each in [device, "lo"]:
            self.ip(name, "link", "set", each, "up")

    def ip(self, name, *arguments):
        run("ip", "-n", f"{self.prefix}-{name}", *arguments)

    def __exit__(self, *_):
        for name in reversed(self.made):
            pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout
            for pid in pids.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", name])


def run(*command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise PermissionError(f"{' '.join(command)}: {done.stderr.strip()}")


# What runs in it.

class Machine:
    """A program in a namespace."""

    def __init__(self, prefix, name, folder):
        self.inside = ["ip", "netns", "exec", f"{prefix}-{name}"]
        self.link = ["ip", "link", "set", f"to-{name}"]
        self.name, self.folder = name, folder / name
        self.folder.mkdir()
        self.process = None

    def start(self, command, ready):
        """Starts it, and waits for a line of its standard output."""
        self.process = subprocess.Popen([*self.inside, *command], stdout=subprocess.PIPE, text=True,
                                        stderr=(self.folder / "log").open("a"),
                                        env=os.environ | {"XDG_CACHE_HOME": str(self.folder / "cache")})
        for line in self.process.stdout:
            if ready in line:
                # Goes on reading: a full pipe would stop it.
                threading.Thread(target=collections.deque, args=(self.process.stdout, 0), daemon=True).start()
                return
        sys.exit(f"{self.name} did not start:\n{(self.folder / 'log').read_text()}")

    def signal(self, number):
        self.process.send_signal(number)

    def stop(self):
        if self.process and self.process.poll() is None:
            self.signal(signal.SIGCONT)
            self.signal(signal.SIGTERM)
            return self.process.wait(PATIENCE)

    def set_link(self, state):
        subprocess.run([*self.link, state], check=True)


class Node(Machine):
    """A server."""

    def __init__(self, prefix, name, folder, server):
        super().__init__(prefix, name, folder)
        self.server, self.address, self.admin = server, NODES[name], self.folder / "admin.sock"
        (self.folder / "services").mkdir()
        shutil.copy(COUNTER, self.folder / "services")
        token = self.folder / "deploy.token"
        token.write_text(TOKEN)
        token.chmod(0o600)
        (self.folder / "mb.toml").write_text(f"""
host = "{self.address}"
allow_unsecure = true
services_dir = "{self.folder}/services"
state_dir = "{self.folder}/state"
log = "warn"
[http]
forwarded_from = ["{BALANCER}/32"]
[[listeners]]
host = "{self.address}"
port = 8091
proxy_from = ["{BALANCER}/32"]
[admin]
host = ""
socket = "{self.admin}"
deploy = true
deploy_token = "{token}"
[services.counter.grants]
keyvalue = true
[store]
url = "redis://{REDIS}"
""")

    def start(self):
        super().start([self.server, "serve", "--config", self.folder / "mb.toml"], "ready in")

    def request(self, path):
        """Status and text of a page of the admin endpoint."""
        connection = http.client.HTTPConnection("localhost", timeout=5)
        with contextlib.closing(connection), socket.socket(socket.AF_UNIX) as connection.sock:
            connection.sock.connect(str(self.admin))
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode()

    def page(self, path):
        return json.loads(self.request(path)[1])

    def metric(self, name):
        lines = self.request("/metrics")[1].splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{name} "))

    def digest(self):
        [row] = self.page("/services")["services"]
        return row["digest"]

    def calls(self):
        return sum(row["calls"] for row in self.page("/services")["services"])

    def peers(self):
        """Ports of the clients that are connected through HAProxy."""
        rows = self.page("/connections")["connections"]
        return {int(row["peer"].rsplit(":", 1)[1]) for row in rows if row["peer"].startswith(f"{BALANCER}:")}

    def count(self, name):
        connection = http.client.HTTPConnection(self.address, 8081, timeout=5)
        with contextlib.closing(connection):
            connection.request("POST", "/call/counter.get", json.dumps({"name": name}),
                               {"Content-Type": "application/json"})
            return json.loads(connection.getresponse().read()).get("value")


class Redis(Machine):
    def start(self):
        super().start(["redis-server", "--bind", REDIS, "--protected-mode", "no", "--dir", self.folder, "--save", "",
                       "--appendonly", "yes", "--appendfsync", "always"], "eady to accept connections")

    def count(self, name):
        parts = [b"HGET", b"mb:{counter}:values", b"counters\0" + name.encode()]
        with socket.create_connection((REDIS, 6379), timeout=5) as peer:
            peer.sendall(b"*3\r\n" + b"".join(b"$%d\r\n%s\r\n" % (len(part), part) for part in parts))
            return int(peer.recv(100).split(b"\r\n")[1])


# The load.

class Call:
    def __init__(self, number, name, timeout):
        body = f"REQUEST:counter.add:1.0.0:{number}::{timeout * 1000:.0f}\n" + json.dumps({"name": name})
        self.frame = struct.pack(">II", len(body), 0) + body.encode()
        self.number, self.port, self.sent, self.ended = number, None, None, None
        # `acknowledged` with the new count; else `nothing` or `perhaps`: what
        # the error says of whether it was written.
        self.outcome, self.value, self.why = None, None, None

    def end(self, outcome, value=None, why=None):
        self.outcome, self.value, self.why, self.ended = outcome, value, why, time.monotonic()

    def took(self):
        return self.ended - self.sent


class Connection:
    """One through HAProxy, made again whenever it ends."""

    def __init__(self, load):
        self.load, self.lock = load, threading.Lock()
        self.socket, self.in_flight = None, {}
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def send(self, call):
        """Whether it may have been sent."""
        with self.lock:
            if self.socket is None:
                return False
            call.port, call.sent = self.socket.getsockname()[1], call.sent or time.monotonic()
            self.in_flight[str(call.number)] = call
            # What goes wrong here, the reader sees.
            with contextlib.suppress(OSError):
                self.socket.sendall(call.frame)
            return True

    def run(self):
        while not self.load.ended.is_set():
            try:
                peer = socket.create_connection((BALANCER, 8081), timeout=5)
            except OSError:
                time.sleep(0.02)
                continue
            peer.settimeout(None)
            with self.lock:
                self.socket = peer
            told = orderly = False
            with contextlib.suppress(OSError), peer.makefile("rb") as stream:
                while head := stream.read(8):
                    line, payload = stream.read(struct.unpack(">II", head)[0]).decode().split("\n", 1)
                    told |= self.answered(line.split(":"), payload)
                orderly = True
            with self.lock:
                self.socket, left = None, self.in_flight
                self.in_flight = {}
            peer.close()
            self.load.broken += bool(left) and not told
            for call in left.values():
                # An orderly end after SHUTTING_DOWN: it was never begun.
                if told and orderly:
                    self.load.again.append(call)
                else:
                    call.end("perhaps", why="the connection ended")

    def answered(self, header, payload):
        """Whether it says that the server drains."""
        answer = json.loads(payload)
        if len(header) < 4:
            return answer.get("code") == "SHUTTING_DOWN"
        with self.lock:
            call = self.in_flight.pop(header[3])
        if header[0] == "RESPONSE":
            call.end("acknowledged", answer["value"])
        else:
            written = answer["code"] == "SERVICE_UNAVAILABLE" or "nothing was written" in answer["message"]
            call.end("nothing" if written else "perhaps", why=f"{answer['code']}: {answer['message']}")
        return False

    def close(self):
        with self.lock:
            if self.socket:
                self.socket.shutdown(socket.SHUT_RDWR)


class Load:
    """RATE calls a second on a counter of its own."""

    def __init__(self, name, timeout=TIMEOUT):
        self.name, self.timeout, self.calls = name, timeout, []
        self.again, self.repeated, self.broken = collections.deque(), 0, 0
        self.stopping, self.ended = threading.Event(), threading.Event()
        self.connections = [Connection(self) for _ in range(CONNECTIONS)]
        until("connected", lambda: all(connection.socket for connection in self.connections))
        self.begun = time.monotonic()
        self.pace = threading.Thread(target=self.send_all, daemon=True)
        self.pace.start()

    def send_all(self):
        turns = itertools.cycle(self.connections)
        for number in itertools.count():
            self.send_again(turns)
            self.stopping.wait(max(0, self.begun + number / RATE - time.monotonic()))
            if self.stopping.is_set():
                break
            call = Call(number, self.name, self.timeout)
            self.calls.append(call)
            self.send(call, turns)
        self.stopped = time.monotonic()
        while any(call.outcome is None for call in self.calls) and time.monotonic() < self.stopped + PATIENCE:
            self.send_again(turns)
            time.sleep(0.02)
        self.ended.set()

    def send_again(self, turns):
        while self.again:
            self.repeated += 1
            self.send(self.again.popleft(), turns)

    def send(self, call, turns):
        while not any(connection.send(call) for connection in itertools.islice(turns, CONNECTIONS)):
            time.sleep(0.005)

    def stop(self):
        """Waits for all answers, and shows what came of the calls."""
        self.stopping.set()
        self.pace.join()
        for connection in self.connections:
            connection.close()
        for connection in self.connections:
            connection.thread.join(PATIENCE)
        took = sorted(call.took() * 1000 for call in self.calls if call.outcome == "acknowledged")
        seconds = self.stopped - self.begun
        half, most = took[len(took) // 2], took[len(took) * 99 // 100]
        print(f"  {len(self.calls)} calls in {seconds:.1f} s: {len(took)} acknowledged, in {half:.1f} ms, p99 {most:.0f} ms, "
              f"{took[-1]:.0f} ms at most; {len(self.of('nothing'))} errors say that nothing was written, "
              f"{len(self.of('perhaps'))} that it may have been; {self.repeated} repeated")
        expect("the load kept its rate", len(self.calls) > 0.95 * RATE * seconds)
        silent = [call.number for call in self.calls if call.outcome is None]
        expect("each call had an answer or an error", not silent, silent)

    def of(self, *outcomes):
        return [call for call in self.calls if call.outcome in outcomes]

    def agrees(self, holders):
        """The store has what was acknowledged, perhaps more, and nothing else."""
        values = [call.value for call in self.of("acknowledged")]
        # What was cut off on the way to Redis may arrive while they are asked.
        deadline = time.monotonic() + 5
        while True:
            counts = {holder.name: holder.count(self.name) for holder in holders}
            [count, *others] = set(counts.values())
            if not others or time.monotonic() > deadline:
                break
        perhaps = len(self.of("perhaps"))
        print(f"  the store counts {count}: {len(values)} acknowledged, and {count - len(values)} of {perhaps} "
              "that may have been written")
        expect("all servers and Redis give the same count", not others, counts)
        expect("each was counted once", len(set(values)) == len(values) and max(values) <= count, counts)
        expect("nothing acknowledged is lost, and what says so was not written",
               len(values) <= count <= len(values) + perhaps)


# The scenarios.

class Cluster:
    def __init__(self, prefix, folder, server):
        self.server, self.folder = server, folder
        self.redis = Redis(prefix, "redis", folder)
        self.nodes = [Node(prefix, name, folder, server) for name in NODES]
        self.balancer = None

    def __enter__(self):
        self.redis.start()
        with concurrent.futures.ThreadPoolExecutor() as each:
            list(each.map(Node.start, self.nodes))
        text = re.sub(r"( +server) two \S+:(\d+)(.*\n)", rf"\g<0>\1 three {NODES['three']}:\2\3", EXAMPLE.read_text())
        assert text.count(NODES["three"]) == 2, text
        (self.folder / "haproxy.cfg").write_text(text)
        self.balancer = subprocess.Popen([find("haproxy"), "-db", "-f", self.folder / "haproxy.cfg"],
                                         stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
        return self

    def __exit__(self, kind, *_):
        for machine in [*self.nodes, self.redis]:
            machine.stop()
        if self.balancer:
            self.balancer.terminate()
            self.balancer.wait(PATIENCE)
        if kind or failed:
            for log in sorted(self.folder.glob("*/log")):
                print(f"{log.parent.name} has logged at last", *log.read_text().splitlines()[-20:], sep="\n    ")

    def holders(self):
        return [*self.nodes, self.redis]

    def used(self, node):
        """Waits until HAProxy gives a server new connections, of which it has
        the fewest."""
        before = node.calls()

        def is_used():
            with socket.create_connection((BALANCER, 8081), timeout=5) as peer:
                peer.sendall(Call(0, "probe", 1).frame)
                peer.recv(1000)
            return node.calls() > before
        until(f"{node.name} is used", is_used)

    def load(self, name, **options):
        """A load that all servers have a part of."""
        for node in self.nodes:
            self.used(node)
        load = Load(name, **options)
        shares = [len(node.peers()) for node in self.nodes]
        assert min(shares) >= 1, shares
        return load

    def kill(self):
        load, victim = self.load("kill"), self.nodes[0]
        time.sleep(1)
        # Calls wait for Redis, so that some are in flight.
        self.redis.signal(signal.SIGSTOP)
        time.sleep(0.3)
        ports, killed = victim.peers(), time.monotonic()
        victim.signal(signal.SIGKILL)
        victim.process.wait()
        self.redis.signal(signal.SIGCONT)
        time.sleep(3)
        load.stop()
        errors = load.of("nothing", "perhaps")
        # A system that is killing the server still takes connections for it.
        known = [call for call in errors
                 if call.sent > killed + 1 or call.sent < killed and call.port not in ports]
        expect("only calls in flight on the killed server failed", errors and not known,
               [(call.number, call.why, call.port in ports, call.sent - killed) for call in known])
        expect("each says that it may have run", not load.of("nothing"), [call.why for call in load.of("nothing")])
        survivors = [self.nodes[1], self.nodes[2], self.redis]
        load.agrees(survivors)
        begun = time.monotonic()
        victim.start()
        self.used(victim)
        print(f"  started again, and used {time.monotonic() - begun:.1f} s later")

    def deploy(self):
        load = self.load("deploy")
        time.sleep(1)
        before = {node.digest() for node in self.nodes}
        build = self.folder / "counter.wasm"
        # A section that says nothing: other bytes, the same service.
        name = b"another build"
        build.write_bytes(COUNTER.read_bytes() + bytes([0, len(name) + 1, len(name)]) + name)
        command = [self.server, "service", "deploy", build, "--token-file", self.nodes[0].folder / "deploy.token"]
        for node in self.nodes:
            command += ["--admin", f"unix:{node.admin}"]
        begun = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True)
        print(f"  deployed to three servers in {time.monotonic() - begun:.1f} s")
        after = {node.digest() for node in self.nodes}
        calls = [node.calls() for node in self.nodes]
        time.sleep(1)
        load.stop()
        expect("the command succeeds", done.returncode == 0, done.stdout + done.stderr)
        expect("all servers serve the new build", len(before) == len(after) == 1 and before != after, (before, after))
        expect("and are called", all(node.calls() > then for node, then in zip(self.nodes, calls)))
        self.none_failed(load)

    def restart(self):
        load, ends = self.load("restart"), []
        for node in self.nodes:
            begun = time.monotonic()
            ends.append(node.stop())
            drained = time.monotonic() - begun
            # HAProxy takes it out meanwhile.
            time.sleep(2.5)
            started = time.monotonic()
            node.start()
            self.used(node)
            print(f"  {node.name}: drained in {drained * 1000:.0f} ms, "
                  f"used {time.monotonic() - started:.1f} s after it was started")
        load.stop()
        expect("each server ended in order", ends == [0, 0, 0], ends)
        self.none_failed(load)

    def none_failed(self, load):
        errors = load.of("nothing", "perhaps")
        expect("no call failed", not errors, [(call.number, call.why) for call in errors[:5]])
        load.agrees(self.holders())

    def stop(self):
        def stop():
            self.redis.signal(signal.SIGTERM)
            self.redis.process.wait(PATIENCE)
        self.away("stop", 10, stop, self.redis.start)

    def pause(self):
        self.away("pause", 3, lambda: self.redis.signal(signal.SIGSTOP), lambda: self.redis.signal(signal.SIGCONT),
                  timeout=1)

    def cut(self):
        self.away("cut", 3, lambda: self.redis.set_link("down"), lambda: self.redis.set_link("up"), timeout=1)

    def away(self, name, seconds, leave, come_back, timeout=TIMEOUT):
        load = self.load(name, timeout=timeout)
        time.sleep(1)
        seen = Seen(self.nodes)
        left = time.monotonic()
        leave()
        while time.monotonic() < left + seconds:
            seen.look()
        come_back()
        returned = time.monotonic()
        meanwhile, seen.degraded = seen.degraded, {}
        while time.monotonic() < returned + PATIENCE and not seen.all_ready():
            seen.look()
        ready = time.monotonic() - returned
        time.sleep(2)
        load.stop()
        errors = load.of("nothing", "perhaps")
        assert errors, "no call failed"
        first, last = min(call.ended for call in errors) - left, max(call.ended for call in errors) - returned
        longest = max(call.took() for call in errors)
        noticed = max((at - left for at, _ in meanwhile.values()), default=seconds)
        print(f"  errors from {first:.2f} s after it left to {last:.2f} s after it was back, each after "
              f"{longest:.2f} s at most; degraded after {noticed:.2f} s, ready {ready:.2f} s after it was back")
        for why, count in collections.Counter(re.sub(r"\d{2,}", "N", call.why) for call in errors).most_common(4):
            print(f"    {count} × {why}")
        expect("errors only meanwhile", first >= 0 and last < MOMENT)
        expect("each within its deadline", longest < timeout + SLACK)
        known = ("STORE_FAILED: the store ", "SERVICE_UNAVAILABLE: ", "TIMEOUT: ")
        expect("each says what failed, and whether it was written",
               all(call.why.startswith(known) for call in errors), {call.why for call in errors})
        expect("no connection ended", load.broken == 0, load.broken)
        expect("each server was degraded and gave a reason, and HAProxy kept it",
               len(meanwhile) == len(self.nodes) and all(reason for _, reason in meanwhile.values())
               and seen.statuses == {200}, (meanwhile, seen.statuses))
        expect("and recovered by itself", ready < MOMENT)
        expect("mb_store_failing says so", seen.failing[0] == 0 and max(seen.failing) == 1 and seen.failing[-1] == 0,
               seen.failing)
        alerts(seen.failing)
        log = (self.nodes[0].folder / "log").read_text()
        expect("the log says so", "were refused, services get STORE_FAILED" in log and "store: it works again" in log)
        load.agrees(self.holders())


class Seen:
    """What the servers say of themselves, looked at several times a second."""

    def __init__(self, nodes):
        self.nodes, self.statuses, self.ready = nodes, set(), {}
        # By server: since when, and why.
        self.degraded = {}
        # The metric of the first server.
        self.failing = [nodes[0].metric("mb_store_failing")]

    def look(self):
        for node in self.nodes:
            status, text = node.request("/readyz")
            self.statuses.add(status)
            page = json.loads(text)
            self.ready[node] = page["status"] == "ready"
            if page["status"] == "degraded":
                self.degraded.setdefault(node, (time.monotonic(), page["store"].get("error")))
        self.failing.append(self.nodes[0].metric("mb_store_failing"))
        time.sleep(0.05)

    def all_ready(self):
        return all(self.ready.get(node) for node in self.nodes)


def alerts(failing):
    """The alert fires for what the metric was."""
    promtool = find("promtool")
    if not promtool:
        print("  promtool is not installed, so the alert was NOT tried")
        return
    samples = " ".join(str(sample) for sample in failing)
    at = failing.index(1)
    with tempfile.NamedTemporaryFile("w", suffix=".yml") as file:
        json.dump({"rule_files": [str(ALERTS)], "evaluation_interval": "1s", "tests": [{
            "interval": "1s",
            "input_series": [{"series": 'mb_store_failing{instance="one"}', "values": samples}],
            "promql_expr_test": [{"expr": 'count(ALERTS{alertname="MbStoreFailing"}) or vector(0)',
                                  "eval_time": f"{at}s", "exp_samples": [{"labels": "{}", "value": 1}]}],
        }]}, file)
        file.flush()
        done = subprocess.run([promtool, "test", "rules", file.name], capture_output=True, text=True)
    expect("and the alert fires", done.returncode == 0, done.stdout + done.stderr)


SCENARIOS = {"kill": Cluster.kill, "deploy": Cluster.deploy, "restart": Cluster.restart, "stop": Cluster.stop,
             "pause": Cluster.pause, "cut": Cluster.cut}


def find(name):
    return shutil.which(name) or shutil.which(name, path="/usr/sbin")


def inside(arguments):
    """In the namespace of HAProxy."""
    # What compiles beside it, as in CI, is not to make calls late.
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, -10)
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder, \
            Cluster(arguments.inside, pathlib.Path(folder), arguments.server) as cluster:
        print(f"three servers are ready at {time.monotonic() - begun:.1f} s")
        for name in arguments.scenarios or SCENARIOS:
            print(f"{name} (at {time.monotonic() - begun:.1f} s)", flush=True)
            SCENARIOS[name](cluster)
    print(f"{time.monotonic() - begun:.0f} s")
    sys.exit(1 if failed else 0)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=", ".join(SCENARIOS))
    parser.add_argument("--server", default=ROOT / "target/release/mb-server", help="program of the servers")
    parser.add_argument("--require", action="store_true", help="fail where it can't run")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    unknown = set(arguments.scenarios) - set(SCENARIOS)
    if unknown:
        parser.error(f"no such scenario: {', '.join(unknown)}")
    if arguments.inside:
        inside(arguments)
    # So that nothing is left of them where this is ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        missing = [name for name in ["ip", "haproxy", "redis-server"] if not find(name)]
        if missing:
            arguments.require |= "TEST_REQUIRES_TOOLS" in os.environ
            raise PermissionError(f"{', '.join(missing)} is not installed")
        with Namespaces() as namespaces:
            sys.exit(subprocess.run(["ip", "netns", "exec", f"{namespaces.prefix}-hub", sys.executable, __file__,
                                     *sys.argv[1:], "--inside", namespaces.prefix]).returncode)
    except PermissionError as why:
        print(f"skipped: {why}")
        sys.exit(1 if arguments.require else 0)


begun = time.monotonic()
if __name__ == "__main__":
    main()
