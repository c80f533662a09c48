"""Joins the actions to the server: CPython runs this inside of a component."""

import json

from componentize_py_types import Err
from wit_world import exports
from wit_world.imports import logging
from wit_world.imports.types import Failure, Payload_Json

from actions import ACTIONS, Refusal

# What the service says of itself; the file must be called like it.
DESCRIPTION = {
    "name": "{{name}}",
    "version": "1.0.0",
    "description": "Greets people",
    "actions": [
        {
            "name": "greet",
            "description": "Greets a person.",
            "input": {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}},
            "output": {"type": "object", "required": ["text"], "properties": {"text": {"type": "string"}}},
        }
    ],
}


def log(text):
    logging.log(logging.Level.INFO, "", text)


class Handler(exports.Handler):
    def describe(self):
        return json.dumps(DESCRIPTION)

    def handle(self, action, payload):
        """The server asks only for the actions above."""
        try:
            if not isinstance(payload, Payload_Json):
                raise Refusal("INVALID_ARGUMENTS", "expected JSON")
            return Payload_Json(json.dumps(ACTIONS[action](json.loads(payload.value), log)))
        except Refusal as refusal:
            raise Err(Failure(refusal.code, str(refusal), None)) from None
