"""What several figures share: their look, rows, marks, legends and layout, and how one is saved.

Figures are plain objects, made without pyplot's global state, so that no display and no backend is needed and nothing
stays behind.
"""

import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

from attnbench.analysis.frames import finished
from attnbench.report import labels, scales, units
from attnbench.report.prepare import Panel
from attnbench.report.style import FONT, SHADES, Style, shade
from attnbench.stats import powers

PANELS = 6
"""A figure holds at most so many panels; a report with more draws several figures."""

GREY = labels.GREY
LINE = 0.21  # inches a line of a legend
_NONE: Mapping[str, str] = MappingProxyType({})
_SMALLEST_ERROR = 1e-9  # a smaller error, or none at all, is drawn here: a logarithm has no zero

styled = matplotlib.rc_context(
    {
        **sns.axes_style("whitegrid"),
        **sns.plotting_context("notebook", font_scale=0.85),
        "font.family": [FONT],
        "text.color": "#1a1a1a",
        "axes.labelcolor": "#1a1a1a",
        "axes.titlesize": 10.5,
        "figure.titlesize": 11,
        "legend.fontsize": 8.5,
        "legend.frameon": False,
        "grid.color": "#e4e4e4",
        "grid.linewidth": 0.8,
        "lines.linewidth": 1.6,
        "svg.hashsalt": "attnbench",
    }
)
"""Decorates what draws: it runs under the report's look, which ends with the call."""


@styled
def save(figure: Figure, stem: Path) -> None:
    """Writes stem.png and stem.svg; the same figure gives the same bytes every time."""
    lay_out(figure)
    figure.savefig(stem.with_suffix(".png"), dpi=130, metadata={"Software": None})
    figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None, "Creator": None})


# Rows and their parts


def drawable(frame: pd.DataFrame, column: str) -> pd.DataFrame:
    """Finished rows whose `column` a logarithm can show."""
    rows = finished(frame)
    return rows[rows[column] > 0]


def with_error(frame: pd.DataFrame, column: str) -> pd.DataFrame:
    """The rows that have an error in `column`, with it as a logarithm can show it in a column `error`."""
    values = frame[column].astype(float)
    return frame.assign(error=values.where(np.isfinite(values)).clip(lower=_SMALLEST_ERROR)).dropna(subset=["error"])


def baseline_name(rows: pd.DataFrame, style: Style) -> str:
    names = [name for name in rows["baseline"].dropna().unique() if name]
    if len(names) != 1:
        return "its baseline"
    return style.figure_name(names[0]) if names[0] in style.names else "the baseline"


def ends(values: Iterable[pd.Series | pd.DataFrame]) -> tuple[float, float]:
    """The smallest and the largest number above 0."""
    flat = np.concatenate([part.to_numpy(dtype=float).ravel() for part in values])
    flat = flat[np.isfinite(flat) & (flat > 0)]
    return float(flat.min()), float(flat.max())


# Marks


def lines(
    ax: Axes,
    rows: pd.DataFrame,
    style: Style,
    y: str,
    low: str = "",
    high: str = "",
    *,
    more: Mapping[str, str] = _NONE,
) -> None:
    """One line a plugin, named at its end, with a band and bars for its interval.

    Dashed where what ran only stands in for the variant, a hollow marker where it did not converge. more: what is told
    of a plugin behind its name.
    """
    for name, part in rows.groupby("plugin"):
        plugin = str(name)
        colour, marker = style.colours[plugin], style.markers[plugin]
        dashes = "--" if part["emulated"].any() else "-"
        ax.plot(part["length"], part[y], dashes, color=colour, marker=marker, markersize=6.5, markeredgecolor="white",
                markeredgewidth=0.8, zorder=3)  # fmt: skip
        if low:
            known = part.dropna(subset=[low, high])
            ax.fill_between(known["length"], known[low], known[high], color=colour, alpha=0.13, linewidth=0, zorder=2)
            ax.vlines(known["length"], known[low], known[high], color=colour, linewidth=1.2, zorder=2)
            loose = part[part["converged"].eq(False)]
            ax.plot(loose["length"], loose[y], linestyle="", marker=marker, markersize=6.5, markerfacecolor="white",
                    markeredgecolor=colour, markeredgewidth=1.4, zorder=4)  # fmt: skip
    labels.at_ends(ax, rows, y, style, more)


def exponents(panel: Panel, column: str) -> dict[str, str]:
    """Of each plugin the power of the length l that `column` grows by."""
    found = {}
    for plugin, part in drawable(panel.frame, column).groupby("plugin"):
        if fit := powers.fit_exponent(list(part["length"]), list(part[column])):
            found[str(plugin)] = f"$l^{{\\,{fit.value:z.2f}}}$"  # z: what rounds to zero has no sign
    return found


def ratios(rows: pd.DataFrame, column: str) -> dict[str, str]:
    """Of each plugin the last of its ratios."""
    return {str(plugin): units.ratio(float(part[column].iloc[-1])) for plugin, part in rows.groupby("plugin")}


def against_length(ax: Axes, panel: Panel, label: str, always: bool = False) -> None:
    """The panel's lengths below, and what is shown against them on the left (see `ylabel`)."""
    scales.length_axis(ax, list(panel.frame["length"]), f"{panel.axis} (tokens)")
    ylabel(ax, label, always)


# Legends and layout

_LOOSE = Line2D([], [], color=GREY, marker="o", linestyle="", markerfacecolor="white", markeredgewidth=1.4,
               label="hollow: less precise than asked")  # fmt: skip
_EMULATED = Line2D([], [], color=GREY, linestyle="--", label="dashed: emulated, its time is not the variant's own")


def explained(frame: pd.DataFrame, loose: bool = True) -> list[Line2D]:
    """Entries of a legend for the marks that rows have: hollow ones, where those are drawn, and dashes."""
    rows = finished(frame)
    hollow = [_LOOSE] if loose and rows["converged"].eq(False).any() else []
    return [*hollow, *([_EMULATED] if rows["emulated"].any() else [])]


def legend(figure: Figure, style: Style, plugins: Iterable[str], extra: Sequence[Line2D] = ()) -> None:
    """What the colours of families mean, and `extra`, under the whole figure, which grows by what they take."""
    present = {style.families[plugin] for plugin in plugins}
    handles = [Line2D([], [], color=shade(family), linewidth=5, solid_capstyle="butt", label=family)
               for family in SHADES if family in present and family]  # fmt: skip
    handles += extra
    if not handles:
        return
    room = figure.get_figwidth() * 13  # characters
    columns = next((n for n in range(len(handles), 1, -1) if _characters(handles, n) <= room), 1)
    by_rows = [handle for column in range(columns) for handle in handles[column::columns]]
    figure.legend(handles=by_rows, loc="outside lower center", ncols=columns)
    figure.set_figheight(figure.get_figheight() + LINE * -(-len(handles) // columns))


def _characters(handles: Sequence[Line2D], columns: int) -> int:
    """About how wide a legend of `columns` columns is."""
    parts = [[len(str(handle.get_label())) + 7 for handle in handles[column::columns]] for column in range(columns)]
    return sum(max(part) for part in parts)


def lay_out(figure: Figure) -> None:
    """Places everything for good: once, for both files, and before positions are looked up in pixels."""
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
        figure.set_layout_engine("none")
        labels.spread(figure)


Fill = Callable[[Axes, Panel, Style, Sequence[Panel]], None]
"""Draws a panel, on a scale that fits all the panels that it is given last."""


@styled
def draw(
    panels: Sequence[Panel],
    style: Style,
    title: str,
    column: str,
    fill: Fill,
    extra: Sequence[Line2D] = (),
    height: float = 3.6,
    loose: bool = True,
    pad: float = 6.0,
) -> Figure | None:
    """A figure with axes for each panel that has `drawable` rows of `column`; None where there is no such panel.

    extra: entries of the legend behind the families'. height: of the axes, inches. loose: whether `fill` draws hollow
    what did not converge. pad: points between axes and their title.
    """
    panels = [panel for panel in panels if len(drawable(panel.frame, column))]
    if not panels:
        return None
    figure, axes = grid(len(panels), height)
    for ax, panel in zip(axes, panels, strict=True):
        fill(ax, panel, style, panels)
        ax.set_title(folded(panel.title, 58), pad=pad)
        labels.below(ax, panel, style)
    shown = pd.concat([drawable(panel.frame, column) for panel in panels])
    legend(figure, style, shown["plugin"], [*explained(shown, loose), *extra])
    suptitle(figure, title, panels[0].shared)
    lay_out(figure)
    return figure


def grid(count: int, height: float, columns: int = 2) -> tuple[Figure, list[Axes]]:
    """A figure of `count` axes in rows of `columns`, each `height` inches high."""
    columns = min(count, columns)
    rows = -(-count // columns)
    width = {1: 7.2, 2: 5.1, 3: 3.7}[columns]
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)  # inches around each axes
    figure = Figure(figsize=(columns * width, rows * height + 0.6), layout=layout)
    axes = [figure.add_subplot(rows, columns, i + 1) for i in range(count)]
    for ax in axes:
        sns.despine(ax=ax)
    return figure, axes


def ylabel(ax: Axes, text: str, always: bool = False) -> None:
    """Neighbours in a row share what their y axis shows: the first says it."""
    spec = ax.get_subplotspec()
    if always or spec is None or spec.is_first_col():
        ax.set_ylabel(text)
    else:
        ax.set_ylabel("")


def suptitle(figure: Figure, *lines: str) -> None:
    figure.suptitle("\n".join(folded(line, int(12 * figure.get_figwidth())) for line in lines if line))


def folded(text: str, width: int) -> str:
    """Broken into lines of so many characters, and no mathematics."""
    return textwrap.fill(text, width).replace("$", r"\$")
