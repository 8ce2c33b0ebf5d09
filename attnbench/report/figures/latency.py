"""The figure of latency: what one call takes at each length, and how that grows."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from attnbench.analysis.rows import finished
from attnbench.report import drawing, scales
from attnbench.report.prepare import Panel
from attnbench.report.style import Style

READ = (
    "Lower is faster, and a straight line is a power of the length l: the legend names the fitted power with its "
    "95% interval (over the lengths from an eighth of the longest up). Points are medians; bands and bars are "
    "their 95% intervals, often narrower than the marker. A cross at the top is a cell without a number."
)


@drawing.styled
def latency(panels: Sequence[Panel], style: Style) -> Figure | None:
    """Median latency of a call against length, log-log, with its 95% interval and the fitted exponent."""
    panels = [panel for panel in panels if len(timed(panel.frame))]
    if not panels:
        return None
    entries = [drawing.entries(panel, style, "latency_s") for panel in panels]
    figure, axes = drawing.grid(len(panels), height=3.8 + drawing.LINE * max(map(len, entries)))
    for ax, panel, handles in zip(axes, panels, entries, strict=True):
        fill(ax, panel, style, panels)
        drawing.legend_below(ax, handles)
    return drawing.titled(figure, "Latency of one call", panels)


def fill(ax: Axes, panel: Panel, style: Style, shared: Sequence[Panel]) -> None:
    """One panel's latencies, on a scale that fits all the `shared` panels."""
    columns = ["latency_s", "latency_low_s", "latency_high_s"]
    drawing.lines(ax, timed(panel.frame), style, *columns)
    scales.time_axis(ax, *drawing.ends([timed(each.frame)[columns] for each in shared]))
    drawing.length_axis(ax, panel)
    drawing.mark_missing(ax, panel, style, shared)
    drawing.ylabel(ax, "median latency of a call")
    ax.set_title(drawing.folded(panel.title, 58))


def timed(frame: pd.DataFrame) -> pd.DataFrame:
    """Finished rows whose latency a logarithm can show."""
    rows = finished(frame)
    return rows[drawing.positive(rows, "latency_s")]
