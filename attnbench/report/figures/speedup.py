"""The figure of speedups over the baseline, as measured in pairs."""

from __future__ import annotations

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


@drawing.styled
def speedup(panels: Sequence[Panel], style: Style) -> Figure | None:
    """Paired speedup over the baseline against length, with its 95% interval; 1x is the baseline itself."""
    panels = [panel for panel in panels if len(drawing.compared(panel.frame))]
    if not panels:
        return None
    figure, axes = drawing.grid(len(panels), height=3.4)
    for ax, panel in zip(axes, panels, strict=True):
        fill(ax, panel, style, panels)
    rows = pd.concat([drawing.compared(panel.frame) for panel in panels])
    drawing.legend(figure, style, rows["plugin"], [drawing.LOOSE] if drawing.any_loose(rows) else [])
    return drawing.titled(figure, "Speedup over the baseline", panels)


def fill(ax: Axes, panel: Panel, style: Style, shared: Sequence[Panel]) -> None:
    """One panel's speedups, on a scale that fits all the `shared` panels."""
    columns = ["speedup", "speedup_low", "speedup_high"]
    rows = drawing.compared(panel.frame)
    drawing.lines(ax, rows[rows["plugin"] != rows["baseline"]], style, *columns)
    _baselines(ax, rows, style)
    everywhere = [drawing.compared(each.frame)[columns] for each in shared]
    scales.ratio_axis(ax, *drawing.ends([pd.Series([1.0]), *everywhere]))
    drawing.length_axis(ax, panel)
    drawing.ylabel(ax, f"speedup over {drawing.baseline_name(rows, style)}", always=True)
    ax.set_title(drawing.folded(panel.title, 58))


def _baselines(ax: Axes, rows: pd.DataFrame, style: Style) -> None:
    """The line at 1, in the baseline's own colour where there is one baseline, with its points on it."""
    names = rows["baseline"].dropna().unique()
    colour = style.colours.get(names[0], drawing.GREY) if len(names) == 1 else drawing.GREY
    ax.axhline(1.0, color=colour, linewidth=1.6, linestyle="--", zorder=1)
    own = rows[rows["plugin"] == rows["baseline"]]
    drawing.lines(ax, own, style, "speedup")
