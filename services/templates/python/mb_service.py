"""What a service is made of, and what it uses of the server.

In a component these are the server's; in plain Python, as in tests, the
dictionaries of `mock` stand for it. What needs a grant has its line in
`wit/world.wit`, from which the slashes are to be taken away, and its setting in
`mb-server.toml`.
"""

import json

try:
    import wit_world
except ImportError:
    wit_world = None  # plain Python


class Failure(Exception):
    """A refusal of the service's own: the code is [A-Z][A-Z0-9_]*, details are anything that JSON has."""

    def __init__(self, code, message, details=None):
        super().__init__(message)
        self.code, self.message, self.details = code, message, details


class mock:
    """Stands for the server in plain Python."""

    lines = []  # of the log, as "info: text"
    config = {}  # values and secrets
    buckets = {}  # durable values, as {"bucket": {"key": b"value"}}
    calls = {}  # other services, as {"calc.add": lambda arguments: {"sum": 3}}

    @staticmethod
    def reset():
        for held in (mock.lines, mock.config, mock.buckets, mock.calls):
            held.clear()


def _imported(line, *modules):
    """The bindings of an interface: what the generator calls them depends on what else is imported."""
    for name, mark in modules:
        try:
            module = __import__(f"wit_world.imports.{name}", fromlist=["imports"])
        except ImportError:
            continue
        if hasattr(module, mark):
            return module
    return _Absent(line)


class _Absent:
    def __init__(self, line):
        self.line = line

    def __getattr__(self, name):
        raise RuntimeError(f"take away the slashes before `import {self.line}` in wit/world.wit, and grant it")


if wit_world:
    from componentize_py_types import Err
    from wit_world.imports import types as _types

    _logging = _imported("wasi:logging/logging", ("logging", "log"))
    _context = _imported("mb:service/context", ("context", "request_id"))
    _config = _imported("wasi:config/store", ("wasi_config_store", "get_all"), ("store", "get_all"))
    _store = _imported("wasi:keyvalue/store", ("wasi_keyvalue_store", "open"), ("store", "open"))
    _atomics = _imported("wasi:keyvalue/atomics", ("atomics", "increment"))
    _batch = _imported("wasi:keyvalue/batch", ("batch", "set_many"))
    _values = _imported("mb:service/values", ("values", "set_for"))
    _calls = _imported("mb:service/calls", ("calls", "call"))


def _told(code, work, *arguments):
    """Makes a failure of what the server refuses."""
    try:
        return work(*arguments)
    except Err as error:
        value = error.value
        text = getattr(value, "value", None) or type(value).__name__.removeprefix("Error_").replace("_", " ").lower()
        raise Failure(code, str(text)) from None


class log:
    """Lines in the server's log, under the request that is served."""

    @staticmethod
    def _write(level, text):
        if not wit_world:
            mock.lines.append(f"{level}: {text}")
        else:
            _logging.log(getattr(_logging.Level, level.upper()), "", str(text))

    trace = staticmethod(lambda text: log._write("trace", text))
    debug = staticmethod(lambda text: log._write("debug", text))
    info = staticmethod(lambda text: log._write("info", text))
    warn = staticmethod(lambda text: log._write("warn", text))
    error = staticmethod(lambda text: log._write("error", text))


class config:
    """Values and secrets that the operator gives: `config = { … }`, `secrets = { … }`."""

    @staticmethod
    def get(key, default=None):
        """The text of a key; with a default, a value of its type."""
        text = _told("CONFIG_FAILED", _config.get, key) if wit_world else mock.config.get(key)
        if text is None or default is None or isinstance(default, str):
            return default if text is None else text
        try:
            if isinstance(default, bool):
                return {"true": True, "false": False}[text]
            return type(default)(text)
        except (KeyError, ValueError):
            raise Failure("CONFIG_FAILED", f"{key} is no {type(default).__name__}") from None


class keyvalue:
    """Durable values: `keyvalue = true`. Each service has buckets of its own."""

    @staticmethod
    def open(name=""):
        return Bucket(name)


class Bucket:
    """Values are bytes. Any refusal is the failure STORE_FAILED."""

    def __init__(self, name):
        if wit_world:
            self._bucket = _told("STORE_FAILED", _store.open, name)
        else:
            self._held = mock.buckets.setdefault(name, {})

    # The server has a table of what is open, and wants it back.
    def __enter__(self):
        return self

    def __exit__(self, *_):
        if wit_world:
            self._bucket.__exit__(None, None, None)

    def get(self, key):
        return _told("STORE_FAILED", self._bucket.get, key) if wit_world else self._held.get(key)

    def set(self, key, value):
        if wit_world:
            _told("STORE_FAILED", self._bucket.set, key, bytes(value))
        else:
            self._held[key] = bytes(value)

    def set_for(self, key, value, seconds):
        """A value that ends after so many seconds: then the key has none."""
        if wit_world:
            _told("STORE_FAILED", _values.set_for, self._bucket, key, bytes(value), round(seconds * 1000))
        else:
            self._held[key] = bytes(value)

    def delete(self, key):
        if wit_world:
            _told("STORE_FAILED", self._bucket.delete, key)
        else:
            self._held.pop(key, None)

    def exists(self, key):
        return _told("STORE_FAILED", self._bucket.exists, key) if wit_world else key in self._held

    def keys(self, prefix=""):
        """All keys, or those that begin so, in order."""
        if not wit_world:
            return sorted(key for key in self._held if key.startswith(prefix))
        found, cursor = [], None
        while True:
            if prefix:
                answer = _told("STORE_FAILED", _values.keys_from, self._bucket, prefix, cursor)
            else:
                answer = _told("STORE_FAILED", self._bucket.list_keys, cursor)
            found.extend(answer.keys)
            cursor = answer.cursor
            if cursor is None:
                return found

    def increment(self, key, by=1):
        """Adds to a number, safe against other calls; returns the sum."""
        if wit_world:
            return _told("STORE_FAILED", _atomics.increment, self._bucket, key, by)
        held = int.from_bytes(self._held.get(key, b""), "little", signed=True) + by
        self._held[key] = held.to_bytes(8, "little", signed=True)
        return held

    def set_many(self, values):
        """All of a dictionary at once, which costs one flush of the disk."""
        if wit_world:
            _told("STORE_FAILED", _batch.set_many, self._bucket, [(key, bytes(value)) for key, value in values.items()])
        else:
            self._held.update(values)


class calls:
    """Other services: `calls = ["calc.add"]`."""

    @staticmethod
    def call(topic, arguments=None, version="1.0.0", timeout_ms=None):
        """What another service answers. Its own failure comes with its code, a refusal of the server as CALL_FAILED."""
        if not wit_world:
            return mock.calls[topic](arguments)
        payload = _types.Payload_Json(_json(arguments))
        try:
            answer = _calls.call(topic, version, payload, timeout_ms)
        except Err as error:
            refusal = error.value
            if refusal.origin == _calls.Origin.SERVICE:
                details = None if refusal.details is None else json.loads(refusal.details)
                raise Failure(refusal.code, refusal.message, details) from None
            raise Failure("CALL_FAILED", f"{refusal.code}: {refusal.message}") from None
        return json.loads(answer.value) if isinstance(answer, _types.Payload_Json) else answer.value


class context:
    """The call that is served."""

    request_id = staticmethod(lambda: _context.request_id() if wit_world else "1")
    parent_request_id = staticmethod(lambda: _context.parent_request_id() if wit_world else None)
    requested_version = staticmethod(lambda: _context.requested_version() if wit_world else "1.0.0")
    principal = staticmethod(lambda: _context.principal() if wit_world else None)
    connection_id = staticmethod(lambda: _context.connection_id() if wit_world else "1")
    encrypted = staticmethod(lambda: _context.encrypted() if wit_world else False)
    remaining_ms = staticmethod(lambda: _context.remaining_ms() if wit_world else 5000)


def _json(value):
    try:
        return json.dumps(value, allow_nan=False, ensure_ascii=False)
    except ValueError as error:
        if "JSON compliant" not in str(error):
            raise Failure("INVALID_ANSWER", f"no JSON: {error}") from None
        # json.dumps would write NaN if it were not for allow_nan.
        raise Failure("INVALID_ANSWER", f"NaN or an infinite number, which JSON does not have (json.dumps with "
                                        f"allow_nan=False says: {error}); answer None or a text") from None
    except TypeError as error:
        raise Failure("INVALID_ANSWER", f"no JSON: {error}") from None


class Action:
    """A function of one value, and what `describe` says of it."""

    def __init__(self, function, input=None, output=None):
        self.function, self.input, self.output = function, input, output

    def described(self, name):
        described = {"name": name, "input": self.input, "output": self.output}
        described["description"] = (self.function.__doc__ or "").strip().partition("\n")[0] or None
        return {key: value for key, value in described.items() if value is not None}


def service(name, version, actions, description=""):
    """The class that a component begins with: `Handler = service(…)` in app.py.

    An action is a function from what JSON gives to what JSON has, or takes and
    gives bytes; or an `Action`, with its JSON Schemas.
    """
    actions = {key: action if isinstance(action, Action) else Action(action) for key, action in actions.items()}
    document = {"name": name, "version": version, "description": description,
                "actions": [action.described(key) for key, action in actions.items()]}

    class Handler:
        def describe(self):
            return json.dumps(document)

        def handle(self, action, payload):
            """The server asks only for the actions above."""
            try:
                binary = not isinstance(payload, _types.Payload_Json)
                answer = actions[action].function(payload.value if binary else json.loads(payload.value))
                if hasattr(answer, "__await__"):
                    answer.close()
                    raise Failure("INVALID_ANSWER", f"{action} is an async function: let it be an ordinary one, which "
                                                    "calls asyncio.run")
                if isinstance(answer, (bytes, bytearray)):
                    return _types.Payload_Binary(bytes(answer))
                return _types.Payload_Json(_json(answer))
            except Failure as failure:
                details = None if failure.details is None else _json(failure.details)
                raise Err(_types.Failure(failure.code, failure.message, details)) from None

    return Handler
