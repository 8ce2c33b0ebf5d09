"""The figure of latency: what one call takes at each length, and how that grows."""

from collections.abc import Sequence
from functools import partial

from matplotlib.axes import Axes

from attnbench.report import drawing, scales
from attnbench.report.prepare import Panel
from attnbench.report.style import Style

READ = (
    "Lower is faster, and a straight line is a power of the length l, which stands behind its name (fitted over the "
    "lengths from an eighth of the longest up; the table of growth has its interval). Points are medians; bands and "
    "bars are their 95% intervals, often narrower than the marker."
)


def fill(ax: Axes, panel: Panel, style: Style, shared: Sequence[Panel]) -> None:
    """See `drawing.Fill`."""
    columns = ["latency_s", "latency_low_s", "latency_high_s"]
    more = drawing.exponents(panel, "latency_s")
    drawing.lines(ax, drawing.drawable(panel.frame, "latency_s"), style, *columns, more=more)
    scales.time_axis(ax, *drawing.ends([drawing.drawable(each.frame, "latency_s")[columns] for each in shared]))
    drawing.against_length(ax, panel, "median latency of a call")


latency = partial(drawing.draw, title="Latency of one call", column="latency_s", fill=fill)
"""Median latency of a call against length, log-log, with its 95% interval and the fitted exponent."""
