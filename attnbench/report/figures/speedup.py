"""The figure of speedups over the baseline, as measured in pairs."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from attnbench.report import drawing, scales
from attnbench.report.prepare import Panel
from attnbench.report.style import Style

READ = (
    "Measured in pairs with the baseline, round by round; above 1x is faster. Where a band holds 1x, the two were "
    "not told apart."
)


def speedup(panels: Sequence[Panel], style: Style) -> Figure | None:
    """Paired speedup over the baseline against length, with its 95% interval; 1x is the baseline itself."""
    loose = any(drawing.any_loose(drawing.drawable(panel.frame, "speedup")) for panel in panels)
    extra = [drawing.LOOSE] if loose else []
    return drawing.draw(panels, style, "Speedup over the baseline", "speedup", fill, extra)


def fill(ax: Axes, panel: Panel, style: Style, shared: Sequence[Panel]) -> None:
    """See `drawing.Fill`."""
    columns = ["speedup", "speedup_low", "speedup_high"]
    rows = drawing.drawable(panel.frame, "speedup")
    drawing.lines(ax, rows[rows["plugin"] != rows["baseline"]], style, *columns)
    _baselines(ax, rows, style)
    everywhere = [drawing.drawable(each.frame, "speedup")[columns] for each in shared]
    scales.ratio_axis(ax, *drawing.ends([pd.Series([1.0]), *everywhere]))
    drawing.against_length(ax, panel, f"speedup over {drawing.baseline_name(rows, style)}", always=True)


def _baselines(ax: Axes, rows: pd.DataFrame, style: Style) -> None:
    """The line at 1, in the baseline's own colour where there is one baseline, with its points on it."""
    names = rows["baseline"].dropna().unique()
    colour = style.colours.get(names[0], drawing.GREY) if len(names) == 1 else drawing.GREY
    ax.axhline(1.0, color=colour, linewidth=1.6, linestyle="--", zorder=1)
    drawing.lines(ax, rows[rows["plugin"] == rows["baseline"]], style, "speedup")
