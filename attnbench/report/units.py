"""Numbers, and lists of names, as people read them: 3.42 ms, 170 MiB, 2.31x [2.25, 2.38], "a, b and c".

Whatever is missing becomes a dash.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

NOTHING = "-"

_SECONDS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))
_BYTES = ((2.0**40, "TiB"), (2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"), (1.0, "B"))
_JOULES = ((1.0, "J"), (1e-3, "mJ"), (1e-6, "µJ"))
_FLOPS = ((1e12, "TFLOP/s"), (1e9, "GFLOP/s"), (1e6, "MFLOP/s"), (1.0, "FLOP/s"))


def known(*values: float | None) -> bool:
    """Whether all the values are finite numbers."""
    return all(value is not None and math.isfinite(value) for value in values)


def _decimals(value: float, margin: float = 0.0) -> int:
    """Decimals that show three digits of `value`, or up to two more where its interval would collapse otherwise."""
    places = 2 - math.floor(math.log10(abs(float(f"{value:.3g}")))) if value else 2
    if margin > 0:
        places = max(places, min(-math.floor(math.log10(margin)), places + 2))
    return min(max(places, 0), 9)


def _scaled(value: float | None, low: float | None, high: float | None, units: tuple[tuple[float, str], ...]) -> str:
    """`value` in the largest unit that it fills, with its interval in the same unit."""
    if value is None or not math.isfinite(value):
        return NOTHING
    factor, unit = next((u for u in units if abs(value) >= u[0] * 0.9995), units[-1])
    return _with_interval(value / factor, f" {unit}", *(x / factor if x is not None else x for x in (low, high)))


def _with_interval(value: float, unit: str, low: float | None, high: float | None) -> str:
    if low is None or high is None or not known(low, high):
        return f"{value:.{_decimals(value)}f}{unit}"
    places = _decimals(value, (high - low) / 2)
    return f"{value:.{places}f}{unit} [{low:.{places}f}, {high:.{places}f}]"


def seconds(value: float | None, low: float | None = None, high: float | None = None) -> str:
    """ "3.42 ms [3.40, 3.45]" """
    return "0 s" if value == 0 else _scaled(value, low, high, _SECONDS)


def size(value: float | None) -> str:
    """ "170 MiB", of bytes."""
    if value is not None and known(value) and abs(value) < 1024:
        return f"{value:.0f} B"
    return _scaled(value, None, None, _BYTES)


def rate(value: float | None) -> str:
    """ "184 GFLOP/s", of floating-point operations a second."""
    return _scaled(value, None, None, _FLOPS)


def ratio(value: float | None, low: float | None = None, high: float | None = None) -> str:
    """ "2.31x [2.25, 2.38]"; exactly one, a baseline's own, is "1x"."""
    if value is None or not math.isfinite(value):
        return NOTHING
    if value == 1.0 and not known(low, high):
        return "1x"
    return "1x" if value == low == high == 1.0 else _with_interval(value, "x", low, high)


def error(value: float | None) -> str:
    """Two digits: "3.1e-7", "0.0088"."""
    if value is None or not math.isfinite(value):
        return NOTHING
    if value == 0:
        return "0"
    if abs(value) >= 1e-3:
        return f"{value:.{min(max(1 - math.floor(math.log10(abs(value))), 0), 9)}f}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def energy(value: float | None) -> str:
    """ "3.2 mJ"."""
    return _scaled(value, None, None, _JOULES)


def frequency(value: float | None) -> str:
    """ "1755 MHz", of hertz."""
    return _whole(None if value is None else value / 1e6, "MHz")


def power(value: float | None) -> str:
    """ "412 W"."""
    return _whole(value, "W")


def temperature(value: float | None) -> str:
    """ "41 °C"."""
    return _whole(value, "°C")


def _whole(value: float | None, unit: str) -> str:
    return f"{value:.0f} {unit}" if value is not None and known(value) else NOTHING


def percent(value: float | None) -> str:
    """ "12.5%", of a fraction."""
    return f"{100 * value:.3g}%" if value is not None and known(value) else NOTHING


def length(value: float) -> str:
    """A number of tokens: "512", "1k" (1024), "1.5k", "1000", "128k", "1M"."""
    count = int(value)
    for unit, name in ((2**20, "M"), (2**10, "k")):
        if count >= unit and count % (unit // 2) == 0:
            return f"{count / unit:g}{name}"
    return str(count)


def lengths(values: list[float]) -> str:
    """ "512 to 4k", or the one there is."""
    first, last = length(min(values)), length(max(values))
    return first if first == last else f"{first} to {last}"


def count(number: int, noun: str, plural: str | None = None) -> str:
    """ "1 cell", "3 cells"."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def listed(names: Sequence[str]) -> str:
    """ "a, b and c" """
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
