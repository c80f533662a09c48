"""What a component of Python begins with. `mb-server build` writes it beside
the packages; it runs once, at the build, and brings in the module `app`.

A component is a picture of Python after its imports. What would make that
picture answer wrongly, or fail without a word, is set right here.
"""

import importlib
import linecache
import os
import random
import sys
import traceback

# Imports within functions, by the module that has them.
LAZY = {}

# The standard library's own.
LAZY_STANDARD = {
    "codecs": ["encodings.ascii", "encodings.latin_1", "encodings.cp1252", "encodings.utf_16", "encodings.utf_16_be",
               "encodings.utf_16_le", "encodings.utf_32", "encodings.utf_32_be", "encodings.utf_32_le",
               "encodings.iso8859_1", "encodings.iso8859_15", "encodings.utf_8_sig", "encodings.idna", "encodings.punycode", "encodings.unicode_escape",
               "encodings.raw_unicode_escape", "encodings.hex_codec", "encodings.base64_codec",
               "encodings.rot_13", "encodings.zlib_codec", "encodings.mbcs", "unicodedata"],
    "datetime": ["_strptime"],
    "time": ["_strptime"],
    "urllib.parse": ["unicodedata"],
    "zoneinfo": ["zoneinfo._common", "importlib.resources"],
    "uuid": ["random", "hashlib"],
    "http.cookies": ["http.cookies"],
    "email": ["email.parser", "email.mime.text", "email.header", "email.charset", "email.message"],
    "email.message": ["email.policy", "email.generator", "email._policybase", "email.iterators", "email.utils"],
    "xml.etree.ElementTree": ["pyexpat", "xml.etree.ElementPath"],
    "decimal": ["numbers", "_decimal"],
    "fractions": ["decimal"],
    "statistics": ["fractions", "decimal"],
    "difflib": ["heapq"],
    "json": ["json.scanner", "json.decoder", "json.encoder"],
    "logging": ["traceback", "pickle"],
    "dataclasses": ["inspect", "copy"],
    "concurrent.futures": ["concurrent.futures.thread"],
    "typing": ["inspect"],
    "functools": ["typing", "types"],
    "enum": ["operator", "functools"],
    "traceback": ["unicodedata"],
    "gettext": ["locale", "string"],
    "textwrap": ["re"],
    "string": ["string.templatelib", "re"],
}

# What is said beside an exception that has its reason in the component.
HINTS = {
    "ModuleNotFoundError": "a component holds the modules that were imported when it was built: import it at the top "
                           "level of a module",
    "FileNotFoundError": "there are no files when a service runs: read them at the top level of a module, which runs "
                         "when it is built",
    "PermissionError": "a service has no network and no files: it asks other services of its server",
    "URLError": "a service has no network: it asks other services of its server",
    "LookupError": "encodings are modules: one that is used at the top level of a module is there in calls too",
    "ZoneInfoNotFoundError": "time zones take the package tzdata in requirements.txt",
}

# Generators without a seed of their own would give all callers the same.
_seed, _unseeded = random.Random.seed, {}


def seed(self, a=None, version=2):
    _seed(self, a, version)
    if a is None:
        _unseeded[id(self)] = self
    else:
        _unseeded.pop(id(self), None)


random.Random.seed = seed
_unseeded[id(random._inst)] = random._inst
# The functions of the module are methods of its hidden generator.
random.seed = random._inst.seed

import app  # noqa: E402


def import_lazy():
    """Imports what would be imported first in a call, where it is there."""
    done = set()
    while True:
        names = {name for module in list(sys.modules) for name in [*LAZY.get(module, ()), *LAZY_STANDARD.get(module, ())]}
        if names <= done:
            return
        for name in sorted(names - done):
            done.add(name)
            try:
                importlib.import_module(name)
            except BaseException:
                pass  # Optional, or no module but something in one.


def keep_time_zones():
    """tzdata keeps its zones in files."""
    try:
        import tzdata
        import zoneinfo._common
    except ImportError:
        return
    import io

    folder, kept = os.path.join(os.path.dirname(tzdata.__file__), "zoneinfo"), {}
    for parent, _, names in os.walk(folder):
        for name in names:
            if not name.endswith(".py"):
                path = os.path.join(parent, name)
                with open(path, "rb") as file:
                    kept[os.path.relpath(path, folder)] = file.read()

    def load(key):
        if key not in kept:
            raise zoneinfo.ZoneInfoNotFoundError(f"No time zone found with key {key}")
        return io.BytesIO(kept[key])

    zoneinfo._common.load_tzdata = load


def mend_asyncio():
    """Its loop wakes itself over a socket, for threads; here are neither."""
    selector_events = sys.modules.get("asyncio.selector_events")
    if selector_events is None:
        return
    import selectors
    import time

    class Sleep(selectors._BaseSelectorImpl):
        def select(self, timeout=None):
            # Nothing but the deadline ends a wait for nothing.
            time.sleep(3600 if timeout is None else max(timeout, 0))
            return []

    selectors.DefaultSelector = Sleep
    loop = selector_events.BaseSelectorEventLoop
    loop._make_self_pipe = loop._close_self_pipe = lambda self: None


def keep_sources():
    """Lines for tracebacks; later there is no file to read them from."""
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if file and file.startswith("/0/"):
            linecache.getlines(file)
    linecache.checkcache = lambda filename=None: None


def report(kind, error, trace):
    """What the server shows of an exception that nobody has caught."""
    frames = ("mb_entry.py", "mb_service.py")
    while trace and trace.tb_next and os.path.basename(trace.tb_frame.f_code.co_filename) in frames:
        trace = trace.tb_next
    told = traceback.TracebackException(kind, error, trace, limit=-20)
    for frame in told.stack:
        for root in ("/0/", "/1/"):
            frame.filename = frame.filename.removeprefix(root)
    for line in told.format():
        sys.stderr.write(line)
    if kind.__name__ in HINTS:
        sys.stderr.write(HINTS[kind.__name__] + "\n")
    sys.stderr.flush()


class Handler(app.Handler):
    begun = False

    def handle(self, action, payload):
        if not Handler.begun:
            begin()
        return super().handle(action, payload)


def begin():
    """Once in the life of an instance, within its first call."""
    Handler.begun = True
    # The runtime has just seeded the module's own generator.
    if _hidden is not None:
        random._inst.setstate(_hidden)
    others = [generator for generator in _unseeded.values() if generator is not random._inst]
    if others:
        fresh = os.urandom(32)
        for number, generator in enumerate(others):
            _seed(generator, fresh + number.to_bytes(4))


import_lazy()
keep_time_zones()
mend_asyncio()
keep_sources()
# One that the service gave a seed keeps it, although the runtime gives it another.
_hidden = None if id(random._inst) in _unseeded else random._inst.getstate()
sys.excepthook = report
