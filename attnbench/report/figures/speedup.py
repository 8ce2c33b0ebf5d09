"""The figure of speedups over the baseline, as measured in pairs."""

import math
from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from attnbench.report import drawing, scales
from attnbench.report.figures import winners
from attnbench.report.prepare import Panel
from attnbench.report.style import Style

READ = (
    "Measured in pairs with the baseline, round by round; above 1x is faster. Where a band holds 1x, the two were "
    f"not told apart. {winners.READ}"
)


def speedup(panels: Sequence[Panel], style: Style) -> Figure | None:
    """Paired speedup over the baseline against length, with its 95% interval; 1x is the baseline itself."""
    return drawing.draw(panels, style, "Speedup over the baseline", "speedup", fill, pad=winners.PAD)


def fill(ax: Axes, panel: Panel, style: Style, shared: Sequence[Panel]) -> None:
    """See `drawing.Fill`."""
    columns = ["speedup", "speedup_low", "speedup_high"]
    rows = drawing.drawable(panel.frame, "speedup")
    others = rows[rows["plugin"] != rows["baseline"]]
    # One call for all names, so that they are told apart; the baseline has no interval over itself.
    own = rows.loc[rows["plugin"] == rows["baseline"]].assign(speedup_low=math.nan, speedup_high=math.nan)
    drawing.lines(ax, pd.concat([others, own]), style, *columns, more=drawing.ratios(others, "speedup"))
    ax.axhline(1.0, color=drawing.GREY, linewidth=1, zorder=1)
    everywhere = [drawing.drawable(each.frame, "speedup")[columns] for each in shared]
    scales.ratio_axis(ax, *drawing.ends([pd.Series([1.0]), *everywhere]))
    drawing.against_length(ax, panel, f"speedup over {drawing.baseline_name(rows, style)}", always=True)
    winners.strip(ax, panel, style)
