"""What the service does: tested with plain Python."""

from mb_service import Failure, log


def greet(person):
    """Greets a person."""
    if not isinstance(person, dict) or not isinstance(person.get("name"), str):
        raise Failure("INVALID_ARGUMENTS", "name must be a text")
    if not person["name"]:
        raise Failure("NAME_EMPTY", "the name must not be empty")
    log.info(f"greeting {person['name']}")
    return {"text": f"Hello, {person['name']}!"}
