"""What the service says of itself; the file must be called like it."""

from actions import greet
from mb_service import Action, service

Handler = service(
    name="{{name}}",
    version="1.0.0",
    description="Greets people",
    actions={
        "greet": Action(
            greet,
            input={"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}},
            output={"type": "object", "required": ["text"], "properties": {"text": {"type": "string"}}},
        ),
    },
)
