"""Mean, median and quantiles of lists, and of series that it keeps.

Reads `parts` from its configuration, the number of groups that the quantiles
divide the values into; keeps series of values under their names.
"""

import json

from componentize_py_types import Err
from wit_world import exports
from wit_world.imports import logging, wasi_config_store as config, wasi_keyvalue_store as keyvalue
from wit_world.imports.types import Failure, Payload_Json

from actions import Refusal, argument, numbers, summary

NUMBERS = {"type": "array", "items": {"type": "number"}}
SUMMARY = {"type": "object", "required": ["count", "mean", "median", "quantiles", "least", "most"]}


def takes(**properties):
    return {"type": "object", "required": list(properties), "properties": properties}


DESCRIPTION = {
    "name": "stats",
    "version": "1.0.0",
    "description": "Mean, median and quantiles",
    "actions": [
        {"name": "of", "description": "Describes values.", "input": takes(values=NUMBERS), "output": SUMMARY},
        {
            "name": "add",
            "description": "Adds values to a series and describes all of it.",
            "input": takes(series={"type": "string"}, values=NUMBERS),
            "output": SUMMARY,
        },
    ],
}


def parts():
    text = config.get("parts")
    if text is None:
        return 4
    if not text.isdecimal() or not 2 <= int(text) <= 100:
        raise Refusal("CONFIG_FAILED", "parts must be a whole number from 2 to 100")
    return int(text)


def of(request):
    return summary(argument(request, "values", list), parts())


def add(request):
    series = argument(request, "series", str)
    added = numbers(argument(request, "values", list))
    bucket = keyvalue.open("series")
    known = bucket.get(series)
    values = (json.loads(known) if known else []) + added
    found = summary(values, parts())
    bucket.set(series, json.dumps(values).encode())
    logging.log(logging.Level.INFO, "", f"{series} has {len(values)} values")
    return found


ACTIONS = {"of": of, "add": add}


class Handler(exports.Handler):
    def describe(self):
        return json.dumps(DESCRIPTION)

    def handle(self, action, payload):
        """The server asks only for the actions above."""
        try:
            if not isinstance(payload, Payload_Json):
                raise Refusal("INVALID_ARGUMENTS", "expected JSON")
            return Payload_Json(json.dumps(ACTIONS[action](json.loads(payload.value))))
        except Refusal as refusal:
            raise Err(Failure(refusal.code, str(refusal), None)) from None
