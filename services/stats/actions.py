"""Mean, median and quantiles, without the server: tested with plain Python."""

import math
import statistics

MAX_VALUES = 100_000


class Refusal(Exception):
    """A refusal of the service's own."""

    def __init__(self, code, message):
        super().__init__(message)
        self.code = code


def numbers(values):
    if not isinstance(values, list) or not all(is_number(value) for value in values):
        raise Refusal("INVALID_ARGUMENTS", "values must be a list of finite numbers")
    if not values:
        raise Refusal("EMPTY", "there must be at least one value")
    if len(values) > MAX_VALUES:
        raise Refusal("TOO_MANY", f"at most {MAX_VALUES} values")
    return values


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def summary(values, parts):
    """`parts` - 1 cuts divide the values into as many groups of the same size."""
    values = sorted(numbers(values))
    cuts = statistics.quantiles(values, n=parts, method="inclusive") if len(values) > 1 else values * (parts - 1)
    return {
        "count": len(values),
        "mean": statistics.fmean(values),
        "median": statistics.median(values),
        "quantiles": cuts,
        "least": values[0],
        "most": values[-1],
    }


def argument(request, name, kind):
    value = request.get(name) if isinstance(request, dict) else None
    if not isinstance(value, kind):
        raise Refusal("INVALID_ARGUMENTS", f"{name} is missing or of another type")
    return value
