"""Numbers, and lists of names, as people read them: 3.42 ms, 170 MiB, 2.31x [2.25, 2.38], "a, b and c".

Whatever is missing becomes a dash.
"""

import math
from collections.abc import Sequence
from functools import partial

NOTHING = "-"

_SECONDS = ((1.0, " s"), (1e-3, " ms"), (1e-6, " µs"), (1e-9, " ns"))
_BYTES = ((2.0**40, " TiB"), (2.0**30, " GiB"), (2.0**20, " MiB"), (2.0**10, " KiB"))
_JOULES = ((1.0, " J"), (1e-3, " mJ"), (1e-6, " µJ"))
_FLOPS = ((1e12, " TFLOP/s"), (1e9, " GFLOP/s"), (1e6, " MFLOP/s"), (1.0, " FLOP/s"))
_TIMES = ((1.0, "x"),)


def known(*values: float | None) -> bool:
    """Whether all the values are finite numbers."""
    return all(value is not None and math.isfinite(value) for value in values)


def _decimals(value: float, margin: float = 0.0) -> int:
    """Decimals that show three digits of `value`, or up to two more where its interval would collapse otherwise."""
    places = 2 - math.floor(math.log10(abs(float(f"{value:.3g}")))) if value else 2
    if margin > 0:
        places = max(places, min(-math.floor(math.log10(margin)), places + 2))
    return min(max(places, 0), 9)


def _scaled(
    value: float | None, low: float | None = None, high: float | None = None, *, units: Sequence[tuple[float, str]]
) -> str:
    """`value` in the largest unit that it fills, with its interval in the same unit."""
    if value is None or not math.isfinite(value):
        return NOTHING
    factor, unit = next((u for u in units if abs(value) >= u[0] * 0.9995), units[-1])
    value /= factor
    if low is None or high is None or not known(low, high):
        return f"{value:.{_decimals(value)}f}{unit}"
    low, high = low / factor, high / factor
    places = _decimals(value, (high - low) / 2)
    return f"{value:.{places}f}{unit} [{low:.{places}f}, {high:.{places}f}]"


def _plain(value: float | None, *, unit: str, digits: str = ".0f", factor: float = 1.0) -> str:
    return f"{value / factor:{digits}}{unit}" if value is not None and math.isfinite(value) else NOTHING


rate = partial(_scaled, units=_FLOPS)  # "184 GFLOP/s", of floating-point operations a second
energy = partial(_scaled, units=_JOULES)  # "3.20 mJ"
frequency = partial(_plain, unit=" MHz", factor=1e6)  # "1755 MHz", of hertz
power = partial(_plain, unit=" W")  # "412 W"
temperature = partial(_plain, unit=" °C")  # "41 °C"
percent = partial(_plain, unit="%", digits=".3g", factor=0.01)  # "12.5%", of a fraction


def seconds(value: float | None, low: float | None = None, high: float | None = None) -> str:
    """ "3.42 ms [3.40, 3.45]" """
    return "0 s" if value == 0 else _scaled(value, low, high, units=_SECONDS)


def size(value: float | None) -> str:
    """ "170 MiB", of bytes."""
    return f"{value:.0f} B" if value is not None and abs(value) < 1024 else _scaled(value, units=_BYTES)


def ratio(value: float | None, low: float | None = None, high: float | None = None) -> str:
    """ "2.31x [2.25, 2.38]"; exactly one, a baseline's own, is "1x"."""
    alone = value == 1.0 and (not known(low, high) or low == high == 1.0)
    return "1x" if alone else _scaled(value, low, high, units=_TIMES)


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


def hits(found: Sequence[bool]) -> str:
    """ "3 of 5", a dash where nothing was tried."""
    return f"{sum(found)} of {len(found)}" if found else NOTHING


def listed(names: Sequence[str]) -> str:
    """ "a, b and c" """
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
