"""Axes in the units of the thing: lengths as they were asked for, times, binary bytes and speedups."""

import math
import re
from collections.abc import Callable, Sequence
from functools import partial

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from attnbench.report import units


def length_axis(ax: Axes, lengths: Sequence[float], label: str) -> None:
    """A logarithmic x axis whose ticks are the lengths themselves; some go unlabelled where they would collide."""
    lengths = sorted(set(lengths))
    ax.set_xscale("log", base=2)
    ax.set_xlim(lengths[0] / 1.3, lengths[-1] * 1.3)
    # Labels of four characters need about a twelfth of the axis each.
    room = math.log(lengths[-1] / lengths[0] * 1.3**2) / 12
    shown = [lengths[-1]]
    for length in reversed(lengths[:-1]):
        if math.log(shown[-1] / length) >= room:
            shown.append(length)
    ax.xaxis.set_major_locator(FixedLocator(shown[::-1]))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: units.length(round(x))))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel(label)


def trim(text: str) -> str:
    """ "1.00 ms" as "1 ms"."""
    return re.sub(r"\.0+ |(\.\d*?)0+ ", r"\1 ", text)


def _power(value: float) -> str:
    exponent = math.log10(value)
    return f"{value:g}" if -3 < exponent < 4 else f"{value:.0e}".replace("e-0", "e-")


Steps = Sequence[Sequence[float]]


def log_axis(
    ax: Axes, low: float, high: float, text: Callable[[float], str], base: int, steps: Steps, axis: str = "y"
) -> None:
    """A logarithmic axis over [low, high] and a margin, with a few labelled ticks at round values."""
    margin = max((high / low) ** 0.06, 1.05)
    low, high = low / margin, high * margin
    target = ax.yaxis if axis == "y" else ax.xaxis
    (ax.set_yscale if axis == "y" else ax.set_xscale)("log", base=base)
    (ax.set_ylim if axis == "y" else ax.set_xlim)(low, high)
    ticks = _ticks(low, high, base, steps, most=8 if axis == "y" else 5)
    target.set_major_locator(FixedLocator(ticks))
    target.set_major_formatter(FuncFormatter(lambda value, _: text(value)))
    target.set_minor_locator(NullLocator())
    target.set_minor_formatter(NullFormatter())


TENS = ((1,), (1, 3), (1, 2, 5))
_TWOS = ((1,), (1, 1.5))
time_axis = partial(
    log_axis, text=lambda value: trim(units.seconds(value)), base=10, steps=(*TENS, (1, 1.5, 2, 3, 5, 7))
)
byte_axis = partial(log_axis, text=lambda value: trim(units.size(value)), base=2, steps=_TWOS)
ratio_axis = partial(log_axis, text=lambda value: f"{value:g}x", base=2, steps=_TWOS)
error_axis = partial(log_axis, text=_power, base=10, steps=TENS)


def _ticks(low: float, high: float, base: int, steps: Steps, most: int) -> list[float]:
    """Round values in [low, high]: multiples of the base's powers, denser or sparser until they are 3 to `most`."""
    powers = range(math.floor(math.log(low, base)) - 1, math.ceil(math.log(high, base)) + 1)
    best: list[float] = []
    for step in steps:
        best = [base**power * s for power in powers for s in step if low <= base**power * s <= high]
        if len(best) >= 3:
            break
    else:
        return [tick for tick in MaxNLocator(5).tick_values(low, high) if low <= tick <= high]
    # Every second, third ... power, counted from 1 so that two panels agree.
    if len(best) > most:
        stride = math.ceil(len(best) / most)
        best = [base**power for power in powers if power % stride == 0 and low <= base**power <= high]
    return best
