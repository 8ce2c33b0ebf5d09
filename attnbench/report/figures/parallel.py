"""The figure of attention across processes: time and each process's peak memory, against their number."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from attnbench.report import drawing, labels, scales
from attnbench.report.across import heading
from attnbench.report.style import Style

READ = (
    "Lower is better on both sides. Dotted is what one process would take over the number of processes: where time "
    "leaves it, sending or waiting costs; where memory does, a process holds what others hold too. Hollow: its "
    "processes have more threads together than there are cores, so that its time says little."
)
_PANELS = {
    "latency_s": ("seconds of a call", scales.time_axis),
    "peak_bytes": ("peak memory of a process", scales.byte_axis),
}


@drawing.styled
def parallel(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """rows: of `attnbench parallel` that are ok, of one problem."""
    frame = pd.DataFrame(rows).assign(plugin=lambda found: found["scheme"], family="exact")
    style = Style.of(frame)
    panels = {column: panel for column, panel in _PANELS.items() if frame[column].notna().any()}
    figure, axes = drawing.grid(len(panels), height=3.8)
    for ax, (column, (label, axis)) in zip(axes, panels.items(), strict=True):
        _fill(ax, frame.dropna(subset=[column]), column, style)
        shown = [*frame[column].dropna(), *_even(frame, column).values()]
        axis(ax, min(shown), max(shown))
        ax.set_ylabel(label)
        _worlds(ax, sorted(set(frame["world"])))
    handles = [Line2D([], [], color=drawing.GREY, linestyle=":", label="one process over their number")]
    if frame["warnings"].map(lambda kinds: "crowded" in kinds).any():
        handles.append(
            Line2D([], [], color=drawing.GREY, marker="o", linestyle="", markerfacecolor="white",
                   markeredgewidth=1.4, label="hollow: more threads than cores")
        )  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    drawing.suptitle(figure, "One attention, several processes", heading(dict(frame.iloc[0])))
    drawing.lay_out(figure)
    return figure


def _fill(ax: Axes, frame: pd.DataFrame, column: str, style: Style) -> None:
    for scheme, part in frame.groupby("scheme"):
        part, name = part.sort_values("world"), str(scheme)
        colour, marker = style.colours[name], style.markers[name]
        ax.plot(part["world"], part[column], color=colour, zorder=2)
        for world, value, kinds in zip(part["world"], part[column], part["warnings"], strict=True):
            hollow = column == "latency_s" and "crowded" in kinds
            ax.plot(world, value, marker=marker, markersize=6.5, markerfacecolor="white" if hollow else colour,
                    markeredgecolor=colour if hollow else "white", zorder=3)  # fmt: skip
    even = _even(frame, column)
    ax.plot(list(even), list(even.values()), ":", color=drawing.GREY, zorder=1)
    labels.at_ends(ax, frame.sort_values("world"), column, style, x="world")


def _even(frame: pd.DataFrame, column: str) -> dict[int, float]:
    """What the best scheme takes in one process, over each number of processes; nothing where none ran in one."""
    alone = frame[(frame["world"] == 1) & frame[column].notna()][column]
    return {world: float(alone.min()) / world for world in sorted(set(frame["world"]))} if len(alone) else {}


def _worlds(ax: Axes, worlds: Sequence[int]) -> None:
    ax.set_xscale("log", base=2)
    ax.set_xlim(worlds[0] / 1.15, worlds[-1] * 1.15)
    ax.xaxis.set_major_locator(FixedLocator(worlds))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{round(x)}"))
    ax.set_xlabel("processes")
