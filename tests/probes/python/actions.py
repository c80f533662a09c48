"""What Python does in a component, probe by probe: each works, which its value
shows, or fails with a message that says what is absent.
"""

import asyncio
import base64
import bisect
import calendar
import collections
import configparser
import contextlib
import copy
import csv
import datetime
import decimal
import difflib
import email.message
import enum
import fractions
import functools
import gzip
import hashlib
import heapq
import hmac
import html
import importlib
import io
import ipaddress
import itertools
import json
import locale
import logging
import math
import pathlib
import pickle
import random
import re
import secrets
import socket
import sqlite3
import statistics
import string
import struct
import subprocess
import tempfile
import textwrap
import threading
import time
import tomllib
import typing
import unicodedata
import urllib.parse
import urllib.request
import uuid
import xml.etree.ElementTree as ElementTree
import zlib
import zoneinfo
from dataclasses import asdict, dataclass

import dateutil.parser
import jinja2
import markupsafe
import yaml

from mb_service import Failure

PROBES = {}
AT_BUILD = random.Random()
SEEDED = random.Random(42)
TEXT_AT_BUILD = (pathlib.Path(__file__).parent / "data.txt").read_text()


def works(title, expected):
    """The value is the same in every call, and this one."""
    def take(function):
        PROBES[function.__name__] = {"title": title, "kind": "works", "expected": expected, "function": function}
        return function
    return take


def differs(title):
    """The value is another one in every call, and after a restart."""
    def take(function):
        PROBES[function.__name__] = {"title": title, "kind": "differs", "function": function}
        return function
    return take


def absent(title, says):
    """The call fails, and says so."""
    def take(function):
        PROBES[function.__name__] = {"title": title, "kind": "absent", "says": says, "function": function}
        return function
    return take


@differs("`random.random()`, and the other functions of `random`")
def random_module():
    return random.random()


@differs("`random.Random()` made at the top level of a module")
def random_at_build():
    return AT_BUILD.random()


@works("`random.Random(42)`, which has a seed", 0.6394267984578837)
def random_seeded():
    return SEEDED.random()


@differs("`random.shuffle`, `random.sample`")
def random_shuffle():
    return random.sample(range(1000), 10)


@differs("`random.SystemRandom`")
def random_system():
    return random.SystemRandom().random()


@differs("`uuid.uuid4()`")
def uuid4():
    return str(uuid.uuid4())


@differs("`uuid.uuid1()`")
def uuid1():
    return str(uuid.uuid1())


@differs("`secrets`")
def secrets_token():
    return secrets.token_hex(16)


@differs("`os.urandom`")
def urandom():
    import os
    return os.urandom(16).hex()


@works("the order of a set of texts is that of its hashes, as everywhere, and the same in every call of one build", True)
def hash_order():
    return hash("a") == hash("a") and sorted({"a", "b"}) == ["a", "b"]


@differs("`time.time_ns()`")
def time_ns():
    return time.time_ns()


@works("`time.time()` is the server's", True)
def time_now():
    return time.time() > 1.7e9


@works("`time.sleep()`, within the deadline", True)
def time_sleep():
    begun = time.monotonic()
    time.sleep(0.02)
    return time.monotonic() - begun >= 0.02


@works("`time.localtime()` is UTC", ["UTC", 0])
def local_time():
    return [time.tzname[0], time.localtime(0).tm_hour]


@works("`datetime.now(timezone.utc)`", True)
def datetime_now():
    return datetime.datetime.now(datetime.timezone.utc).year >= 2025


@works("`datetime.strptime`, which imports when it is called", "2026-07-01T12:30:00")
def datetime_strptime():
    return datetime.datetime.strptime("1 Jul 2026 12:30", "%d %b %Y %H:%M").isoformat()


@works("`datetime.strftime`, `fromisoformat`", "Wednesday 01 July")
def datetime_strftime():
    return datetime.datetime.fromisoformat("2026-07-01").strftime("%A %d %B")


@works("`zoneinfo`, with `tzdata` in requirements.txt", ["2026-07-01T12:00:00+02:00", "2026-01-01T12:00:00-05:00"])
def zones():
    def at(month, zone):
        return datetime.datetime(2026, month, 1, 12, tzinfo=zoneinfo.ZoneInfo(zone)).isoformat()
    return [at(7, "Europe/Berlin"), at(1, "America/New_York")]


@absent("a time zone that does not exist", "No time zone found with key Mars/Olympus")
def zone_unknown():
    return str(zoneinfo.ZoneInfo("Mars/Olympus"))


@works("an import within a function, of the standard library", "1,2")
def lazy_standard():
    import ast
    import shlex
    return ",".join(shlex.split("1 2")) if ast.literal_eval("True") else None


@works("an import within a function, of the project", 42)
def lazy_own():
    from lazy import answer
    return answer()


@works("an import within a function of a package (`dateutil`, `jinja2`)", ["2026-07-01T00:00:00", "<b>&lt;</b>"])
def lazy_package():
    page = jinja2.Environment(autoescape=True).from_string("<b>{{ text }}</b>").render(text="<")
    return [dateutil.parser.parse("July 1st, 2026").isoformat(), page]


@absent("an import of a module that was not imported at the build", "a component holds the modules that were imported")
def lazy_by_name():
    return importlib.import_module("".join(["wsgi", "ref"])).__name__


@works("a file that is read at the top level of a module", "kept at the build\n")
def file_at_build():
    return TEXT_AT_BUILD


@absent("a file that is read in a call", "there are no files when a service runs")
def file_in_call():
    return open("data.txt").read()


@absent("a file that is written in a call", "there are no files when a service runs")
def file_written():
    with open("out.txt", "w") as file:
        file.write("x")


@absent("`tempfile`", "No usable temporary directory")
def temporary_file():
    with tempfile.TemporaryFile() as file:
        return file.write(b"x")


@absent("`socket`", "a service has no network")
def sockets():
    socket.create_connection(("127.0.0.1", 80), timeout=1)


@absent("`urllib.request`, and other clients of HTTP", "a service has no network")
def http():
    urllib.request.urlopen("http://127.0.0.1/", timeout=1)


@absent("`threading.Thread`", "can't start new thread")
def threads():
    thread = threading.Thread(target=print)
    thread.start()
    thread.join()


@absent("`subprocess`", "OSError")
def processes():
    subprocess.run(["true"], check=True)


@works("`threading.Lock`, `threading.local`", True)
def locks():
    with threading.Lock():
        return not hasattr(threading.local(), "x")


@works("`asyncio.run`, `asyncio.gather`, `asyncio.sleep`", [1, 2])
def asynchronous():
    async def one(value):
        await asyncio.sleep(0.001)
        return value

    async def both():
        return await asyncio.gather(one(1), one(2))

    return asyncio.run(both())


@works("`sqlite3` in memory", [[3]])
def sqlite():
    with contextlib.closing(sqlite3.connect(":memory:")) as database:
        return [list(row) for row in database.execute("select 1 + 2")]


@works("`json`, to whole numbers of any size", '{"a": [1.5, null, 123456789012345678901234567890]}')
def json_text():
    return json.dumps(json.loads('{"a":[1.5,null,123456789012345678901234567890]}'))


@absent("`NaN` in an answer", "allow_nan=False")
def not_a_number():
    return {"value": math.nan}


@absent("an answer that JSON does not have", "Object of type set is not JSON serializable")
def no_json():
    return {1}


@absent("an answer that is a `Decimal` or a `datetime`", "Object of type Decimal is not JSON serializable")
def no_json_number():
    return decimal.Decimal("1.5")


@absent("an answer with half of a surrogate pair", "surrogates not allowed")
def no_text():
    return "\ud800"


@absent("an action that is an `async` function", "is an async function")
async def asynchronous_action():
    return 1


@absent("`asyncio.to_thread`", "can't start new thread")
def asynchronous_thread():
    return asyncio.run(asyncio.to_thread(int, "1"))


@works("`hashlib`: MD5, SHA-1, SHA-2, SHA-3, BLAKE2", ["900150983cd24fb0", "a9993e364706816a", "ba7816bf8f01cfea", "3a985da74fe225b2", "508c5e8c327c14e2"])
def hashes():
    return [hashlib.new(name, b"abc").hexdigest()[:16] for name in ["md5", "sha1", "sha256", "sha3_256", "blake2s"]]


@works("`hmac`", "f7bc83f430538424")
def macs():
    return hmac.new(b"key", b"The quick brown fox jumps over the lazy dog", "sha256").hexdigest()[:16]


@absent("`hashlib.pbkdf2_hmac`, `hashlib.scrypt`", "has no attribute 'pbkdf2_hmac'")
def key_derivation():
    return hashlib.pbkdf2_hmac("sha256", b"password", b"salt", 1).hex()


@absent("`ssl`", "No module named 'ssl'")
def tls():
    importlib.import_module("ssl")


@works("`zlib`, `gzip`", ["abc", "abc"])
def compression():
    return [zlib.decompress(zlib.compress(b"abc")).decode(), gzip.decompress(gzip.compress(b"abc")).decode()]


@absent("`bz2`, `lzma`", "No module named 'bz2'")
def more_compression():
    importlib.import_module("bz2")


@works("`decimal`, `fractions`", ["0.3", "5/6"])
def exact_numbers():
    return [str(decimal.Decimal("0.1") + decimal.Decimal("0.2")), str(fractions.Fraction(1, 2) + fractions.Fraction(1, 3))]


@works("`math`, `statistics`", [120, 2.5, 1.118033988749895])
def numbers():
    return [math.factorial(5), statistics.median([1, 2, 3, 4]), statistics.pstdev([1, 2, 3, 4])]


@works("whole numbers of any size", "1267650600228229401496703205376")
def big_numbers():
    return str(2 ** 100)


@works("`re`", [["a1", "b2"], "x-y"])
def regular_expressions():
    return [re.findall(r"[a-z]\d", "a1 b2 c"), re.sub(r"\s+", "-", "x  y")]


@works("`unicodedata`, upper case, casefold", ["é", "SS", "ss"])
def unicode():
    return [unicodedata.normalize("NFC", "e\u0301"), "ß".upper(), "ß".casefold()]


@works("text in UTF-16, Latin-1, cp1252, IDNA", ["fffe6100", "e9", "80", "xn--bcher-kva"])
def encodings():
    return ["a".encode("utf-16").hex(), "é".encode("latin-1").hex(),
            "€".encode("cp1252").hex(), "bücher".encode("idna").decode()]


@absent("text in an encoding that was not used at the build", "unknown encoding: cp737")
def more_encodings():
    return "x".encode("cp737").hex()


@works("`base64`, `struct`, `binascii`", ["aGk=", "01000000"])
def binary():
    return [base64.b64encode(b"hi").decode(), struct.pack("<I", 1).hex()]


@works("`csv`, `io.StringIO`", [["a", "b,c"]])
def tables():
    return list(csv.reader(io.StringIO('a,"b,c"\n')))


@works("`xml.etree.ElementTree`", ["x", "1"])
def xml():
    root = ElementTree.fromstring('<r><c a="1">x</c></r>')
    return [root.find("./c").text, root.find("c").get("a")]


@works("`html`, `urllib.parse`", ["&lt;", "b c", "xn--e1aybc"])
def web_texts():
    parsed = urllib.parse.urlparse("http://тест/?a=b+c")
    return [html.escape("<"), urllib.parse.parse_qs(parsed.query)["a"][0], parsed.hostname.encode("idna").decode()]


@works("`email`", "Subject: =?utf-8?q?=C3=A9?=")
def mail():
    message = email.message.EmailMessage()
    message["Subject"] = "é"
    return message.as_string().splitlines()[0]


@works("`tomllib`, `configparser`", [1, "2"])
def settings():
    parser = configparser.ConfigParser()
    parser.read_string("[a]\nb = 2\n")
    return [tomllib.loads("a = 1")["a"], parser["a"]["b"]]


@works("`dataclasses`, `enum`, `typing`", [{"x": 1}, "RED", True])
def types():
    @dataclass
    class Point:
        x: int
    Colour = enum.Enum("Colour", ["RED"])
    return [asdict(Point(1)), Colour.RED.name, typing.get_type_hints(Point) == {"x": int}]


@works("`collections`, `itertools`, `functools`, `heapq`, `bisect`", [[["a", 2]], [1, 3, 6], 6, [1, 2], 1])
def containers():
    return [[list(pair) for pair in collections.Counter("aab").most_common(1)], list(itertools.accumulate([1, 2, 3])),
            functools.reduce(int.__add__, [1, 2, 3]), heapq.nsmallest(2, [3, 1, 2]), bisect.bisect([1, 2], 1)]


@works("`pickle`, `copy`", [{"a": [1]}, True])
def pickles():
    return [pickle.loads(pickle.dumps({"a": [1]})), copy.deepcopy([1]) == [1]]


@works("`textwrap`, `string`, `difflib`, `calendar`, `ipaddress`", ["a\nb", "x1", ["apple"], 29, "10.0.0.1"])
def small_modules():
    return [textwrap.fill("a b", 1), string.Template("x$n").substitute(n=1), difflib.get_close_matches("appel", ["apple"]),
            calendar.monthrange(2024, 2)[1], str(next(ipaddress.ip_network("10.0.0.0/30").hosts()))]


@works("`locale` knows the C locale", "C")
def locales():
    return (locale.setlocale(locale.LC_ALL, "C"))


@works("`logging` and `print` write into the server's log", True)
def logs():
    logging.warning("a probe of logging")
    print("a probe of print")
    return True


@works("recursion, 500 levels deep", 500)
def recursion():
    def deep(levels):
        return 0 if levels == 0 else 1 + deep(levels - 1)
    return deep(500)


@absent("recursion without an end", "RecursionError")
def endless_recursion():
    def deep():
        return deep() + 1
    return deep()


@works("a wheel with machine code that can do without (`PyYAML`, `MarkupSafe`)", [{"a": [1, 2]}, "&lt;"])
def native_optional():
    return [yaml.safe_load("a: [1, 2]"), str(markupsafe.escape("<"))]


@works("state of a module does not pass from call to call", 1)
def state():
    STATE.append(1)
    return len(STATE)


@absent("an exception: its type, message, file and line are reported", "ZeroDivisionError: division by zero")
def exception():
    return 1 / 0


@absent("`sys.exit`", "exited with code 1 instead of answering")
def leave():
    raise SystemExit(3)


@absent("a failure of the service's own", "NO_SUCH_THING")
def own_failure():
    raise Failure("NO_SUCH_THING", "as asked for", {"asked": True})


STATE = []


def listing(_):
    return {name: {key: value for key, value in probe.items() if key != "function"} for name, probe in PROBES.items()}


def run(name):
    return PROBES[name]["function"]()
