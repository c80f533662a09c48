#!/usr/bin/env python3
"""The official client of the Model Context Protocol against a running server.

    cargo build --release && python3 tests/clients/mcp.py

Installs `mcp` of PyPI under target/clients. Lists and calls the tools of the
examples, of a service that loops and of one that traps, in each revision of
the protocol. Exits 1 at the first difference.
"""
import sys

import running

sys.path = [path for path in sys.path if path != sys.path[0]]
running.inside("mcp", "mcp==2.3.0")

import asyncio
import json

from mcp import MCPError
from mcp.client.client import Client

DIST = running.ROOT / "services/dist"
COMPONENTS = [DIST / "calc.wasm", DIST / "granted/counter.wasm", DIST / "granted/order.wasm",
              running.ROOT / "tests/guests/dist/hostile.wasm"]
SETTINGS = "default_timeout = 1000\n[http]\nmcp = true"
ORDER = {"customer": "Ada", "items": [{"name": "tea", "price": 250, "quantity": 3}]}


def failure(result):
    """The ERROR object of a tool that failed."""
    assert result.is_error, result
    return json.loads(result.content[0].text)


async def check(url, mode, revision):
    async with Client(f"{url}/mcp", mode=mode) as client:
        assert client.protocol_version == revision, client.protocol_version
        # Where the revision is given, the client asks for nothing.
        assert mode == revision or client.server_info.name == "mb-server", client.server_info
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
        assert set(tools) == {"calc_add", "calc_divide", "hostile_spin", "order_create"}, set(tools)
        assert tools["calc_add"].input_schema["required"] == ["a", "b"], tools["calc_add"]
        assert tools["calc_add"].description.startswith("Adds"), tools["calc_add"]
        # The client holds it against the tool's own schema.
        result = await client.call_tool("calc_add", {"a": 2, "b": 40})
        assert (result.is_error, result.structured_content) == (False, {"sum": 42}), result
        result = await client.call_tool("order_create", ORDER)
        assert result.structured_content["total"] == 750, result
        error = failure(await client.call_tool("calc_divide", {"a": 1, "b": 0}))
        assert (error["code"], error["origin"]) == ("DIVISION_BY_ZERO", "service"), error
        error = failure(await client.call_tool("order_create", {"customer": "Ada"}))
        assert error["code"] == "INVALID_ARGUMENTS", error
        error = failure(await client.call_tool("hostile_spin", {}))
        assert (error["code"], error["origin"]) == ("TIMEOUT", "server"), error
        for name in ["calc_nothing", "größe"]:
            try:
                raise AssertionError(await client.call_tool(name, {}))
            except MCPError as refused:
                assert refused.code == (-32602 if name.isascii() or mode == "legacy" else -32020), refused
        if mode == "legacy":
            await client.send_ping()
        sums = await asyncio.gather(*(client.call_tool("calc_add", {"a": n, "b": 1}) for n in range(50)))
        assert [result.structured_content["sum"] for result in sums] == list(range(1, 51))
    print(f"ok {mode}: revision {revision}, {len(tools)} tools")


with running.server(COMPONENTS, SETTINGS) as url:
    asyncio.run(check(url, "legacy", "2025-11-25"))
    asyncio.run(check(url, "2026-07-28", "2026-07-28"))
    asyncio.run(check(url, "auto", "2026-07-28"))
