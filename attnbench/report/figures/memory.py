"""The figure of memory: a call's peak at each length, and what no variant can avoid."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from attnbench.analysis.rows import finished
from attnbench.report import drawing, scales
from attnbench.report.prepare import Panel
from attnbench.report.style import Style

READ = (
    "Inputs, output and workspace of one call, lower is leaner. The dotted line is inputs and output alone, which "
    "no variant can avoid: what lies above it is workspace."
)

FLOOR = Line2D([], [], color=drawing.GREY, linestyle=":", linewidth=1.4, label="inputs and output alone")


@drawing.styled
def memory(panels: Sequence[Panel], style: Style) -> Figure | None:
    """Peak memory of a call (inputs, output and workspace) against length, log-log, with the fitted exponent."""
    panels = [panel for panel in panels if drawing.positive(finished(panel.frame), "peak_bytes").any()]
    if not panels:
        return None
    entries = [[*drawing.entries(panel, style, "peak_bytes"), FLOOR] for panel in panels]
    figure, axes = drawing.grid(len(panels), height=3.8 + drawing.LINE * max(map(len, entries)))
    for ax, panel, handles in zip(axes, panels, entries, strict=True):
        fill(ax, panel, style, panels)
        drawing.legend_below(ax, handles)
    return drawing.titled(figure, "Peak memory of one call", panels)


def fill(ax: Axes, panel: Panel, style: Style, shared: Sequence[Panel]) -> None:
    """One panel's peaks, on a scale that fits all the `shared` panels."""
    rows = finished(panel.frame)
    drawing.lines(ax, rows[drawing.positive(rows, "peak_bytes")], style, "peak_bytes")
    floor = _floor(panel)
    ax.plot(floor.index, floor, color=drawing.GREY, linestyle=":", linewidth=1.4, zorder=1)
    peaks = [finished(each.frame)["peak_bytes"] for each in shared]
    scales.byte_axis(ax, *drawing.ends([*peaks, *(_floor(each) for each in shared)]))
    drawing.length_axis(ax, panel)
    drawing.mark_missing(ax, panel, style, shared)
    drawing.ylabel(ax, "peak memory of a call")
    ax.set_title(drawing.folded(panel.title, 58))


def _floor(panel: Panel) -> pd.Series:
    """What a call can't do without: bytes of inputs and output by length."""
    rows = panel.frame
    floor = (rows["input_bytes"] + rows["output_bytes"]).groupby(rows["length"]).min().dropna()
    return floor[floor > 0]
