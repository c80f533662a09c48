"""What the service does, without the server: tested with plain Python."""


class Refusal(Exception):
    """A refusal of the service's own: the code is [A-Z][A-Z0-9_]*."""

    def __init__(self, code, message):
        super().__init__(message)
        self.code = code


def greet(person, log):
    if not isinstance(person, dict) or not isinstance(person.get("name"), str):
        raise Refusal("INVALID_ARGUMENTS", "name must be a text")
    if not person["name"]:
        raise Refusal("NAME_EMPTY", "the name must not be empty")
    log(f"greeting {person['name']}")
    return {"text": f"Hello, {person['name']}!"}


ACTIONS = {"greet": greet}
