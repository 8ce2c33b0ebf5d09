"""The figure of latency: what one call takes at each length, and how that grows."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from attnbench.report import drawing, scales
from attnbench.report.prepare import Panel
from attnbench.report.style import Style

READ = (
    "Lower is faster, and a straight line is a power of the length l: the legend names the fitted power with its "
    "95% interval (over the lengths from an eighth of the longest up). Points are medians; bands and bars are "
    "their 95% intervals, often narrower than the marker. A cross at the top is a cell without a number."
)


def latency(panels: Sequence[Panel], style: Style) -> Figure | None:
    """Median latency of a call against length, log-log, with its 95% interval and the fitted exponent."""
    return drawing.draw(panels, style, "Latency of one call", timed, fill, height=3.8, exponent="latency_s")


def fill(ax: Axes, panel: Panel, style: Style, shared: Sequence[Panel]) -> None:
    """See `drawing.Fill`."""
    columns = ["latency_s", "latency_low_s", "latency_high_s"]
    drawing.lines(ax, timed(panel.frame), style, *columns)
    scales.time_axis(ax, *drawing.ends([timed(each.frame)[columns] for each in shared]))
    drawing.against_length(ax, panel, "median latency of a call")
    drawing.mark_missing(ax, panel, style, shared)


timed = partial(drawing.drawable, column="latency_s")
