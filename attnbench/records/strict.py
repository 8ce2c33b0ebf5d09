"""JSON as its standard has it: a number is finite (RFC 8259, section 6), whatever Python's reader and writer take."""

import json
import math
from typing import Any


def dumps(value: Any, indent: int | None = None) -> str:
    """The text of a value, in which NaN and infinity become null."""
    return json.dumps(_plain(value), indent=indent, allow_nan=False)


def loads(text: str) -> Any:
    """Raises: ValueError: it is no JSON, or has a number that is not finite; the message says so."""
    try:
        return json.loads(text, parse_constant=_finite, parse_float=_finite)
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except json.JSONDecodeError:
        raise ValueError("is no JSON") from None


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"has {text}, which is no number in JSON; put null there")
    return number


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value
