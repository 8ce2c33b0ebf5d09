"""How many calls one timed block holds."""

from math import ceil

BLOCK_SECONDS = 0.02  # a block is at least this long: a thousand times what reading the clock and a wake-up cost
HEAD_SECONDS = 0.02  # calls shorter than this get an untimed one first, since a turn begins with cold caches


def block_size(call_seconds: float) -> tuple[int, int]:
    """(calls, untimed head calls) of a block for a call of this length."""
    calls = max(1, ceil(BLOCK_SECONDS / max(call_seconds, 1e-7)))
    return calls, 1 if call_seconds < HEAD_SECONDS else 0
