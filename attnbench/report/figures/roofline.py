"""The roofline of a report: what each variant reached, under what the machine could do."""

from collections.abc import Sequence
from functools import partial

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from attnbench.report import drawing, labels, scales, units
from attnbench.report.prepare import Panel
from attnbench.report.style import Style

READ = (
    "How fast a variant computes, against how many operations it has for each byte that has to move (inputs, "
    "weights and output); operations are the variant's own, so one that leaves work out is not the faster here. "
    "The grey line is what this machine reached at best, in products of each format and, the slope, in reading "
    "memory: the closer below it, the less is left to gain for the same operations. Where tensors fit the caches "
    "the slope is no bound. A larger marker is a longer length."
)

_SMALLEST, _LARGEST = 5.0, 9.5  # points: markers of the shortest and of the longest length
_LONGER = Line2D([], [], color=drawing.GREY, marker="o", markersize=_LARGEST, markeredgecolor="white", linewidth=1,
                 label="larger marker: longer")  # fmt: skip


def _fill(ax: Axes, panel: Panel, style: Style, shared: Sequence[Panel]) -> None:
    rows = drawing.drawable(panel.frame, _COLUMN)
    everywhere = pd.concat([drawing.drawable(each.frame, _COLUMN) for each in shared])
    lengths = sorted(set(everywhere["length"]))
    for plugin, part in rows.groupby("plugin"):
        colour = style.colours[str(plugin)]
        dashes = "--" if part["emulated"].any() else "-"
        ax.plot(part["intensity"], part["achieved_flops_per_s"], dashes, color=colour, linewidth=1, zorder=2)
        points = list(zip(part["intensity"], part["achieved_flops_per_s"], part["length"], strict=True))
        for x, y, length in reversed(points):  # the small ones on top
            size = _SMALLEST + (_LARGEST - _SMALLEST) * (lengths.index(length) + 1) / len(lengths)
            ax.plot(x, y, color=colour, marker=style.markers[str(plugin)], markersize=size, markeredgecolor="white",
                    markeredgewidth=0.8, zorder=3)  # fmt: skip
    ridges = everywhere["ceiling_flops_per_s"] / everywhere["ceiling_bytes_per_s"]
    left, right = drawing.ends([everywhere["intensity"], ridges])
    right = max(1.3 * right, 4 * float(ridges.max()))  # room for the roofs' names
    low, high = drawing.ends([everywhere[["achieved_flops_per_s", "ceiling_flops_per_s"]]])
    scales.log_axis(ax, left / 4, right, lambda value: f"{value:g}", base=10, steps=scales.TENS, axis="x")
    scales.log_axis(ax, low / 1.3, high * 1.3, lambda value: scales.trim(units.rate(value)), 10, scales.TENS)
    _roofs(ax, rows)
    labels.at_ends(ax, rows, "achieved_flops_per_s", style, x="intensity")
    ax.set_xlabel("operations a byte that has to move")
    drawing.ylabel(ax, "operations a second")


def _roofs(ax: Axes, rows: pd.DataFrame) -> None:
    """A broken line for each ceiling: memory's slope up to the rate of the products, and from there on that rate."""
    left, right = ax.get_xlim()
    roofs = rows[["ceiling", "ceiling_flops_per_s", "ceiling_bytes_per_s"]].drop_duplicates()
    for name, rate, memory in roofs.itertuples(index=False):
        ridge = rate / memory
        ax.plot([left, ridge, right], [left * memory, rate, rate], color=drawing.GREY, linewidth=1.4, zorder=1)
        # Beside the points: they are far to one side of the ridge, mostly.
        free_left = (rows["intensity"] > ridge).mean() > 0.5
        ax.annotate(f"{name}: {scales.trim(units.rate(rate))}", (ridge if free_left else right, rate),
                    (10 if free_left else -4, 3), textcoords="offset points", ha="left" if free_left else "right",
                    fontsize=8, color=drawing.GREY)  # fmt: skip
    for memory in sorted(set(roofs["ceiling_bytes_per_s"])):
        # To the left of the slope there is nothing: nobody reads faster from memory.
        rate = roofs.loc[roofs["ceiling_bytes_per_s"] == memory, "ceiling_flops_per_s"].min()
        ax.annotate(f"memory:\n{units.size(memory)}/s", (rate / memory, rate), (-6, 2), textcoords="offset points",
                    ha="right", va="bottom", fontsize=8, color=drawing.GREY)  # fmt: skip


_TITLE, _COLUMN = "What was reached of what is attainable", "achieved_flops_per_s"
roofline = partial(drawing.draw, title=_TITLE, column=_COLUMN, fill=_fill, extra=[_LONGER], height=3.8, loose=False)
"""Operations a second against operations a byte, log-log, under the roofs of memory and of matrix products.

The frames carry what `analysis.attainable.columns` gives.
"""
