"""The figure of both errors: whether a variant is right, and what its function costs."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from attnbench.report import drawing, labels, scales
from attnbench.report.prepare import Panel
from attnbench.report.style import Style

READ = (
    "Left: is the code right? Its output against the function that the variant itself defines; it has to stay "
    "under its tolerance. Right: what does that function cost? The same output against exact softmax attention on "
    "these inputs; a variant can be perfectly right on the left and useless on the right."
)

_RED = "#b00020"


@drawing.styled
def deviation(panels: Sequence[Panel], style: Style) -> Figure | None:
    """Both errors against length, side by side: whether a variant is right, and what it costs.

    The tolerance that the implementation error is held to is drawn on the left; a wrong cell is named below it.
    """
    kinds = ("implementation_rel_l2", "approximation_rel_l2")
    panels = [panel for panel in panels if any(len(drawing.with_error(panel.frame, kind)) for kind in kinds)]
    if not panels:
        return None
    figure, axes = drawing.grid(2 * len(panels), height=3.6)
    titles = (
        "Is it right? Implementation error,\nagainst the function that the variant defines",
        "What does it cost? Approximation error,\nagainst exact softmax attention",
    )
    tolerances = {panel.title: _tolerances(panel.frame) for panel in panels}
    drawn = [tolerance for known in tolerances.values() for tolerance, _ in known]
    drawn += [e for panel in panels for kind in kinds for e in drawing.with_error(panel.frame, kind)["error"]]
    for i, panel in enumerate(panels):
        for ax, kind, title in zip(axes[2 * i : 2 * i + 2], kinds, titles, strict=True):
            rows = drawing.with_error(panel.frame, kind)
            drawing.lines(ax, rows[rows["status"] == "ok"], style, "error")
            scales.error_axis(ax, min(drawn), max(drawn))
            drawing.against_length(ax, panel, "relative l2 error")
            ax.set_title(f"{drawing.folded(panel.title, 58)}\n{title}".strip())
        labels.below(axes[2 * i], panel, style)
        for number, (tolerance, who) in enumerate(tolerances[panel.title]):
            _tolerance_line(axes[2 * i], tolerance, who, above=number % 2 == 1)
    shown = pd.concat([panel.frame for panel in panels])
    drawing.legend(figure, style, shown["plugin"], drawing.explained(shown, loose=False))
    drawing.suptitle(figure, "Two errors that mean different things", panels[0].shared)
    drawing.lay_out(figure)
    return figure


def _tolerances(frame: pd.DataFrame) -> list[tuple[float, str]]:
    """The tolerances of a panel, each with whom it holds for; nobody is named where it is the same for all."""
    known = frame[frame["tolerance"] > 0]
    families = known.groupby("tolerance")["family"].agg(lambda values: ", ".join(sorted(set(values))))
    return [(float(str(tolerance)), who if len(families) > 1 else "") for tolerance, who in families.items()]


def _tolerance_line(ax: Axes, tolerance: float, who: str, above: bool) -> None:
    ax.axhline(tolerance, color=_RED, linewidth=1, zorder=1)
    ax.annotate(f"tolerance{f' ({who})' if who else ''}", (0.005, tolerance),
                xycoords=("axes fraction", "data"), xytext=(0, 2 if above else -2), textcoords="offset points",
                ha="left", va="bottom" if above else "top", fontsize=8, color=_RED)  # fmt: skip
