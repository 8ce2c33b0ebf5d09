"""What several figures share: their look, rows, marks, legends and layout, and how one is saved.

Figures are plain objects, made without pyplot's global state, so that no display and no backend is needed and nothing
stays behind.
"""

import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.transforms import ScaledTranslation

from attnbench.analysis.frames import finished
from attnbench.report import scales
from attnbench.report.prepare import Panel
from attnbench.report.style import FONT, Style
from attnbench.stats import powers

PANELS = 6
"""A figure holds at most so many panels; a report with more draws several figures."""

GREY = "#555555"
LINE = 0.21  # inches a line of a legend
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


def _gone(panel: Panel) -> pd.DataFrame:
    """A panel's cells without a number."""
    return panel.frame.drop(index=finished(panel.frame).index)


def any_loose(rows: pd.DataFrame) -> bool:
    return bool(rows["converged"].eq(False).any())


# Marks


def lines(ax: Axes, rows: pd.DataFrame, style: Style, y: str, low: str = "", high: str = "") -> None:
    """One line a plugin, with a band and bars for its interval; a hollow marker where it did not converge."""
    if rows.empty:
        return
    size = {"markersize": 6.5, "markeredgewidth": 0.8}
    sns.lineplot(rows, x="length", y=y, dashes=False, estimator=None, ax=ax, zorder=3, **style.marks, **size)
    for plugin, part in rows.groupby("plugin"):
        colour, marker = style.colours[str(plugin)], style.markers[str(plugin)]
        if low:
            known = part.dropna(subset=[low, high])
            ax.fill_between(known["length"], known[low], known[high], color=colour, alpha=0.2, linewidth=0, zorder=2)
            ax.vlines(known["length"], known[low], known[high], color=colour, linewidth=1.2, zorder=2)
            loose = part[part["converged"].eq(False)]
            ax.plot(loose["length"], loose[y], linestyle="", marker=marker, markersize=6.5, markerfacecolor="white",
                    markeredgecolor=colour, markeredgewidth=1.4, zorder=4)  # fmt: skip


def mark_missing(ax: Axes, panel: Panel, style: Style, shared: Sequence[Panel]) -> None:
    """A cross at the top for each cell without a number, so that a line that ends says that it ends.

    Panels that share a scale leave the same room for it.
    """
    height = max(0.045 * _gone(each)["plugin"].nunique() for each in shared)
    if not height:
        return
    gone = _gone(panel)
    plugins = [plugin for plugin in style.plugins if plugin in set(gone["plugin"])]
    height += 0.02
    low, high = ax.get_ylim()
    ax.set_ylim(low, high * (high / low) ** (height / (1 - height)))
    for row, plugin in enumerate(plugins):
        lengths = gone.loc[gone["plugin"] == plugin, "length"]
        ax.plot(lengths, [1 - 0.025 - 0.045 * row] * len(lengths), linestyle="", marker="x", markersize=6,
                markeredgewidth=1.6, color=style.colours[plugin], transform=ax.get_xaxis_transform())  # fmt: skip


def against_length(ax: Axes, panel: Panel, label: str, always: bool = False) -> None:
    """The panel's lengths below, and what is shown against them on the left (see `ylabel`)."""
    scales.length_axis(ax, list(panel.frame["length"]), f"{panel.axis} (tokens)")
    ylabel(ax, label, always)


# Legends and layout

LOOSE = Line2D([], [], color=GREY, marker="o", linestyle="", markerfacecolor="white", markeredgewidth=1.4,
               label="hollow: less precise than asked")  # fmt: skip
_MISSING = Line2D([], [], color=GREY, marker="x", linestyle="", markeredgewidth=1.6, label="no number (see the tables)")


def _handle(style: Style, plugin: str, label: str) -> Line2D:
    return Line2D([], [], color=style.colours[plugin], marker=style.markers[plugin], markeredgecolor="white",
                  markersize=7, label=label)  # fmt: skip


def explained(panel: Panel) -> list[Line2D]:
    """Entries for the marks that a panel has: hollow ones and crosses."""
    loose = [LOOSE] if any_loose(finished(panel.frame)) else []
    return [*loose, *([_MISSING] if len(_gone(panel)) else [])]


def entries(panel: Panel, style: Style, column: str) -> list[Line2D]:
    """A panel's legend: each plugin, a cross or a line, with the exponent fitted to its `column`."""
    rows = drawable(panel.frame, column)
    handles = []
    for plugin in style.plugins:
        if plugin in set(panel.frame["plugin"]):
            part = rows[rows["plugin"] == plugin]
            fit = powers.fit_exponent(list(part["length"]), list(part[column]))
            # z: what rounds to zero has no sign
            growth = f"   $l^{{\\,{fit.value:z.2f}}}$  [{fit.low:z.2f}, {fit.high:z.2f}]" if fit else ""
            handles.append(_handle(style, plugin, style.figure_name(plugin) + growth))
    return [*handles, *(mark for mark in explained(panel) if mark is not LOOSE or column == "latency_s")]


def _legend_below(ax: Axes, handles: Sequence[Line2D]) -> None:
    below = ax.transAxes + ScaledTranslation(0, -42 / 72, ax.figure.dpi_scale_trans)
    ax.legend(handles=handles, loc="upper left", bbox_to_anchor=(0, 0), bbox_transform=below, borderaxespad=0)


def legend(figure: Figure, style: Style, plugins: Iterable[str], extra: Sequence[Line2D] = ()) -> None:
    """One legend for the whole figure, under it; the figure grows by what the legend takes."""
    present = set(plugins)
    handles = [_handle(style, p, style.figure_name(p)) for p in style.plugins if p in present]
    handles += extra
    room = figure.get_figwidth() * 13  # characters
    columns = next((n for n in range(len(handles), 1, -1) if _characters(handles, n) <= room), 1)
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)
    figure.set_figheight(figure.get_figheight() + LINE * -(-len(handles) // columns))


def _characters(handles: Sequence[Line2D], columns: int) -> int:
    """About how wide a legend of `columns` columns is; matplotlib fills it column by column."""
    parts = np.array_split([len(str(handle.get_label())) + 7 for handle in handles], columns)
    return sum(int(part.max()) for part in parts)


def lay_out(figure: Figure) -> None:
    """Places everything for good: once, for both files, and before positions are looked up in pixels."""
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
        figure.set_layout_engine("none")


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
    height: float = 3.4,
    exponents: bool = False,
) -> Figure | None:
    """A figure with axes for each panel that has `drawable` rows of `column`; None where there is no such panel.

    extra: entries of the legend behind the plugins'. height: of the axes, inches. exponents: whether those fitted to
    `column` are told, in a legend below each panel in place of the one for all.
    """
    panels = [panel for panel in panels if len(drawable(panel.frame, column))]
    if not panels:
        return None
    below = [[*entries(panel, style, column), *extra] for panel in panels if exponents]
    figure, axes = grid(len(panels), height + 0.4 * exponents + LINE * max(map(len, below), default=0))
    for ax, panel in zip(axes, panels, strict=True):
        fill(ax, panel, style, panels)
        ax.set_title(folded(panel.title, 58))
    for ax, handles in zip(axes, below, strict=False):
        _legend_below(ax, handles)
    if not below:
        shown = pd.concat([drawable(panel.frame, column)["plugin"] for panel in panels])
        legend(figure, style, shown, extra)
    suptitle(figure, title, panels[0].shared)
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
