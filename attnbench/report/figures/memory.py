"""The figure of memory: a call's peak at each length, and what no variant can avoid."""

from collections.abc import Sequence
from functools import partial

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from attnbench.report import drawing, scales
from attnbench.report.prepare import Panel
from attnbench.report.style import Style

READ = (
    "Inputs, output and workspace of one call, lower is leaner. The dotted line is inputs and output alone, which "
    "no variant can avoid: what lies above it is workspace. Behind a name stands the fitted power of the length l."
)

FLOOR = Line2D([], [], color=drawing.GREY, linestyle=":", linewidth=1.4, label="inputs and output alone")


def fill(ax: Axes, panel: Panel, style: Style, shared: Sequence[Panel]) -> None:
    """See `drawing.Fill`."""
    drawing.lines(
        ax,
        drawing.drawable(panel.frame, "peak_bytes"),
        style,
        "peak_bytes",
        more=drawing.exponents(panel, "peak_bytes"),
    )
    floor = _floor(panel)
    ax.plot(floor.index, floor, color=drawing.GREY, linestyle=":", linewidth=1.4, zorder=1)
    peaks = [drawing.drawable(each.frame, "peak_bytes")["peak_bytes"] for each in shared]
    scales.byte_axis(ax, *drawing.ends([*peaks, *(_floor(each) for each in shared)]))
    drawing.against_length(ax, panel, "peak memory of a call")


def _floor(panel: Panel) -> pd.Series:
    """What a call can't do without: bytes of inputs and output by length."""
    rows = panel.frame
    floor = (rows["input_bytes"] + rows["output_bytes"]).groupby(rows["length"]).min().dropna()
    return floor[floor > 0]


memory = partial(
    drawing.draw, title="Peak memory of one call", column="peak_bytes", fill=fill, extra=[FLOOR], loose=False
)
"""Peak memory of a call (inputs, output and workspace) against length, log-log, with the fitted exponent."""
