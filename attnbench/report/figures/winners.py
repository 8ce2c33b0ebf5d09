"""A strip above axes against length: who is the fastest there, of all and of the exact variants."""

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import pandas as pd
from matplotlib.axes import Axes

from attnbench.analysis import compare
from attnbench.report.labels import GREY, panel_width
from attnbench.report.prepare import Panel
from attnbench.report.style import Style

READ = "The strip above it names the fastest at each length; pale where others are not told apart from it."
PAD = 38  # points from the axes to their title, which leave room for the strip
_SHARES = (0.025, 0.155)  # of the axes' height: from where to where above them it stands
_CHARACTER = 4.6  # points, about


class Span(NamedTuple):
    """Neighbouring lengths with one winner. left, right: on the length axis. told: it is told apart from the others."""

    plugin: str
    told: bool
    left: float
    right: float


def strip(ax: Axes, panel: Panel, style: Style) -> None:
    """Two rows of names above the axes, each over the lengths at which it wins. The length axis must be set."""
    low, high = _SHARES
    inset = ax.inset_axes((0, 1 + low, 1, high - low))
    inset.set_xscale("log", base=2)
    inset.set_xlim(*ax.get_xlim())
    inset.set_ylim(0, 2)
    inset.set_axis_off()
    exact = panel.frame[panel.frame["family"] == "exact"]
    for bottom, label, rows in ((1, "fastest ", panel.frame), (0, "if exact ", exact)):
        inset.text(0, bottom + 0.45, label, transform=inset.get_yaxis_transform(), ha="right", va="center",
                   fontsize=7.5, color=GREY)  # fmt: skip
        for span in spans(rows, ax.get_xlim()):
            colour = style.colours[span.plugin]
            inset.barh(bottom + 0.45, span.right - span.left, 0.84, span.left, color=colour, edgecolor="white",
                       linewidth=1.5, alpha=1 if span.told else 0.3)  # fmt: skip
            name = _cut(style.figure_name(span.plugin), _points(ax, span) / _CHARACTER)
            inset.text(math.sqrt(span.left * span.right), bottom + 0.43, name, ha="center", va="center", fontsize=7.5,
                       color="white" if span.told else "#1a1a1a")  # fmt: skip


def spans(rows: pd.DataFrame, limits: tuple[float, float]) -> Iterator[Span]:
    """The winners by length, from the left end of the axis to its right end."""
    found = [(float(str(length)), compare.fastest(cell)) for length, cell in rows.groupby("length")]
    inner = [math.sqrt(one * other) for (one, _), (other, _) in itertools.pairwise(found)]
    ends = itertools.pairwise([limits[0], *inner, limits[1]])
    cells = [(best.plugin, not best.tied, *both) for (_, best), both in zip(found, ends, strict=False) if best]
    for (plugin, told), same in itertools.groupby(cells, key=lambda cell: cell[:2]):
        parts = list(same)
        yield Span(plugin, told, parts[0][2], parts[-1][3])


def _points(ax: Axes, span: Span) -> float:
    """About how wide a span will be."""
    left, right = ax.get_xlim()
    return panel_width(ax) * 0.62 * 72 * math.log(span.right / span.left) / math.log(right / left)


def _cut(name: str, room: float) -> str:
    return name if len(name) <= room else f"{name[: max(1, int(room) - 1)]}\u2026"
