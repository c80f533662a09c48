#!/usr/bin/env python3
"""The OpenAPI document of a running server, and the server against it.

    cargo build --release && python3 tests/clients/openapi.py [SEED]

Installs openapi-spec-validator and Schemathesis of PyPI under target/clients.
The first must accept the document; the second sends what it allows and what it
does not to calc, echo and order. Exits 1 for an answer of 500 or more, and for
a status, content type, field or body that the document does not have.
"""
import json
import pathlib
import random
import subprocess
import sys
import tempfile
import urllib.request

import running

PACKAGES = ["openapi-spec-validator==0.9.0", "schemathesis==4.32.5"]
DIST = running.ROOT / "services/dist"
COMPONENTS = [DIST / "calc.wasm", DIST / "echo.wasm", DIST / "granted/counter.wasm", DIST / "granted/order.wasm"]
CHECKS = ["not_a_server_error", "status_code_conformance", "content_type_conformance",
          "response_headers_conformance", "response_schema_conformance", "unsupported_method",
          "allow_header_conformance"]
# A timeout of a millisecond is refused with 503, as it should be.
SETTINGS = '[parameters]\n"header.Request-Timeout" = "5000"\n'
# counter.add is not asked for: nobody but order may call it.
RIGHTS = '[principals.anonymous]\nrights = ["calc.*", "echo.*", "order.*"]'

programs = running.installed("openapi", *PACKAGES)
seed = sys.argv[1] if len(sys.argv) > 1 else str(random.randrange(1 << 32))
failed = 0
with running.server(COMPONENTS, f'auth = "optional"\n{RIGHTS}') as url, tempfile.TemporaryDirectory() as folder:
    document = urllib.request.urlopen(f"{url}/openapi.json").read()
    file = pathlib.Path(folder) / "openapi.json"
    file.write_bytes(document)
    paths = sorted(json.loads(document)["paths"])
    assert paths == ["/call/calc.add", "/call/calc.divide", "/call/echo.say", "/call/order.create"], paths
    failed |= subprocess.run([programs / "openapi-spec-validator", file]).returncode
    settings = pathlib.Path(folder) / "schemathesis.toml"
    settings.write_text(SETTINGS)
    # Each service has a time of its own.
    for service in ["calc", "echo", "order"]:
        print(f"== {service}, seed {seed}", flush=True)
        failed |= subprocess.run(
            [programs / "st", "--config-file", settings, "run", f"{url}/openapi.json", "--include-tag", service,
             "--checks", ",".join(CHECKS), "--phases", "examples,coverage,fuzzing", "--max-examples", "200",
             "--seed", seed, "--workers", "1", "--continue-on-failure", "--no-color"],
            cwd=folder, timeout=60).returncode
sys.exit(failed and 1)
