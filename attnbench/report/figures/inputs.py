"""The figure of errors by inputs: how far a variant is off on noise, and how far on a model's own activations."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from attnbench.analysis.frames import as_rows
from attnbench.analysis.inputs import at_longest, error_by_inputs, sorts
from attnbench.report import drawing, labels, scales, units
from attnbench.report.prepare import Panel, alike
from attnbench.report.style import Style

READ = (
    "A variant's errors on each sort of inputs, at the longest length that most have. At the top stands who looks "
    "better on noise than they are; the number says how many times as far off they are on what a model computes. "
    "Normal numbers have no structure for a window or a feature map to catch, and no outliers for a scale to trip on."
)

_MARKS = ("o", "^", "D", "s", "P", "X")


@drawing.styled
def inputs(panels: Sequence[Panel], style: Style) -> Figure | None:
    """Each variant's approximation errors on several sorts of inputs, one axes for each problem that has them."""
    groups = [(group[0], found) for group in alike(panels, "inputs") if len(found := at_longest(_errors(group)))]
    if not groups:
        return None
    names = sorts(pd.concat([panel.frame for panel in panels]))
    marks = dict(zip(names, _MARKS, strict=False))
    figure, axes = drawing.grid(len(groups), height=1.2 + 0.32 * max(len(found) for _, found in groups))
    low, high = drawing.ends(found[[n for n in names if n in found]] for _, found in groups)
    for ax, (panel, found) in zip(axes, groups, strict=True):
        _fill(ax, found, style, [name for name in names if name in found], marks)
        scales.error_axis(ax, low, high * (high / low) ** 0.12, axis="x")  # room for the ratios
        ax.set_xlabel("approximation error (relative l2)")
        own = [word for word in panel.title.split(", ") if word != panel.words["inputs"]]
        own.append(f"{panel.axis} {units.length(found['length'].iloc[0])}")
        ax.set_title(drawing.folded(", ".join(own), 58))
    handles = [
        Line2D([], [], color=drawing.GREY, marker=mark, linestyle="", markersize=7, label=f"on {name} inputs",
               markerfacecolor="white" if name == names[0] else drawing.GREY)
        for name, mark in marks.items()
    ]  # fmt: skip
    drawing.legend(figure, style, pd.concat([found["plugin"] for _, found in groups]), handles)
    drawing.suptitle(figure, "Who looks better on noise than they are", panels[0].shared)
    drawing.lay_out(figure)
    return figure


def _errors(panels: Sequence[Panel]) -> pd.DataFrame:
    return error_by_inputs(pd.concat([panel.frame for panel in panels], ignore_index=True))


def _fill(ax: Axes, found: pd.DataFrame, style: Style, names: Sequence[str], marks: dict[str, str]) -> None:
    rows = as_rows(found)
    for y, row in enumerate(rows):
        colour = style.colours[row["plugin"]]
        known = {name: row[name] for name in names if units.known(row[name])}
        ax.plot([min(known.values()), max(known.values())], [y, y], color=colour, linewidth=2, alpha=0.45, zorder=2)
        for name, error in known.items():
            ax.plot(error, y, marker=marks[name], markersize=7, color=colour, zorder=3, markeredgewidth=1.4,
                    markerfacecolor="white" if name == names[0] else colour)  # fmt: skip
        ax.annotate(units.ratio(row["ratio"]), (max(known.values()), y), xytext=(8, 0), va="center", fontsize=8,
                    textcoords="offset points", color=labels.ink(colour))  # fmt: skip
    ax.set_yticks(range(len(rows)), [style.figure_name(row["plugin"]) for row in rows])
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.grid(axis="y", visible=False)
