"""The figures of a report. Each function takes panels and a style and returns a matplotlib `Figure`.

None is returned where there is nothing to draw. Figures are plain objects, made without pyplot's global state, so
that no display and no backend is needed and nothing stays behind.
"""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import ParamSpec, TypeVar

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.transforms import Bbox, ScaledTranslation

from attnbench.analysis import compare
from attnbench.analysis.rows import finished
from attnbench.report import scales, units
from attnbench.report.panels import Panel
from attnbench.report.style import FONT, Style
from attnbench.stats import powers

PANELS = 6
"""A figure holds at most so many panels; a report with more draws several figures."""

GREY = "#555555"
RED = "#b00020"
_LINE = 0.21  # inches a line of a legend
_SMALLEST_ERROR = 1e-9  # a smaller error, or none at all, is drawn here: a logarithm has no zero

P = ParamSpec("P")
R = TypeVar("R")


def styled(function: Callable[P, R]) -> Callable[P, R]:
    """Runs `function` under the report's look, which ends with the call."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        look = {
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
        with matplotlib.rc_context(look):
            return function(*args, **kwargs)

    return wrapped


@styled
def save(figure: Figure, stem: Path) -> None:
    """Writes stem.png and stem.svg; the same figure gives the same bytes every time."""
    _lay_out(figure)
    figure.savefig(stem.with_suffix(".png"), dpi=130, metadata={"Software": None})
    figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None, "Creator": None})


@styled
def latency(panels: Sequence[Panel], style: Style) -> Figure | None:
    """Median latency of a call against length, log-log, with its 95% interval and the fitted exponent."""
    panels = [panel for panel in panels if len(_timed(panel.frame))]
    if not panels:
        return None
    entries = [_entries(panel, style, "latency_s") for panel in panels]
    figure, axes = _grid(len(panels), height=3.8 + _LINE * max(map(len, entries)))
    for ax, panel, handles in zip(axes, panels, entries, strict=True):
        _latency(ax, panel, style, panels)
        _legend_below(ax, handles)
    return _titled(figure, "Latency of one call", panels)


@styled
def memory(panels: Sequence[Panel], style: Style) -> Figure | None:
    """Peak memory of a call (inputs, output and workspace) against length, log-log, with the fitted exponent."""
    panels = [panel for panel in panels if _positive(finished(panel.frame), "peak_bytes").any()]
    if not panels:
        return None
    entries = [[*_entries(panel, style, "peak_bytes"), _FLOOR] for panel in panels]
    figure, axes = _grid(len(panels), height=3.8 + _LINE * max(map(len, entries)))
    for ax, panel, handles in zip(axes, panels, entries, strict=True):
        _memory(ax, panel, style, panels)
        _legend_below(ax, handles)
    return _titled(figure, "Peak memory of one call", panels)


@styled
def speedup(panels: Sequence[Panel], style: Style) -> Figure | None:
    """Paired speedup over the baseline against length, with its 95% interval; 1x is the baseline itself."""
    panels = [panel for panel in panels if len(_compared(panel.frame))]
    if not panels:
        return None
    figure, axes = _grid(len(panels), height=3.4)
    for ax, panel in zip(axes, panels, strict=True):
        _speedup(ax, panel, style, panels)
    rows = pd.concat([_compared(panel.frame) for panel in panels])
    _legend(figure, style, rows["plugin"], [_LOOSE] if _any_loose(rows) else [])
    return _titled(figure, "Speedup over the baseline", panels)


@styled
def errors(panels: Sequence[Panel], style: Style) -> Figure | None:
    """Both errors against length, side by side: whether a variant is right, and what it costs.

    The tolerance that the implementation error is held to is drawn on the left; a wrong cell is a cross.
    """
    kinds = ("implementation_rel_l2", "approximation_rel_l2")
    panels = [panel for panel in panels if any(_drawable_errors(panel.frame, kind).notna().any() for kind in kinds)]
    if not panels:
        return None
    figure, axes = _grid(2 * len(panels), height=3.4)
    titles = (
        "Is it right? Implementation error,\nagainst the function that the variant defines",
        "What does it cost? Approximation error,\nagainst exact softmax attention",
    )
    tolerances = {panel.title: _tolerances(panel.frame) for panel in panels}
    values = pd.concat([_drawable_errors(panel.frame, kind) for panel in panels for kind in kinds]).dropna()
    drawn = [*values, *(tolerance for known in tolerances.values() for tolerance, _ in known)]
    for i, panel in enumerate(panels):
        for ax, kind, title in zip(axes[2 * i : 2 * i + 2], kinds, titles, strict=True):
            rows = panel.frame.assign(error=_drawable_errors(panel.frame, kind)).dropna(subset=["error"])
            _lines(ax, rows[rows["status"] == "ok"], style, "error")
            wrong = rows[rows["status"] == "wrong"]
            ax.scatter(wrong["length"], wrong["error"], marker="x", s=70, linewidths=2, zorder=4, clip_on=False,
                       color=[style.colours[p] for p in wrong["plugin"]])  # fmt: skip
            _lengths(ax, panel)
            scales.error_axis(ax, min(drawn), max(drawn))
            _ylabel(ax, "relative l2 error")
            ax.set_title(f"{_title(panel.title, 58)}\n{title}".strip())
        for number, (tolerance, who) in enumerate(tolerances[panel.title]):
            _tolerance_line(axes[2 * i], tolerance, who, left=number % 2 == 1)
    extra = [_WRONG] if any((panel.frame["status"] == "wrong").any() for panel in panels) else []
    _legend(figure, style, [plugin for panel in panels for plugin in panel.frame["plugin"]], extra)
    return _titled(figure, "Two errors that mean different things", panels)


@styled
def speed_vs_error(panel: Panel, style: Style) -> Figure | None:
    """Speedup against approximation error, one axis for each of the longest lengths, with the Pareto front."""
    rows = _traded(panel.frame)
    lengths = sorted(set(rows["length"]))[-PANELS:]
    if not lengths:
        return None
    figure, axes = _grid(len(lengths), height=3.2, columns=3 if len(lengths) > 4 else 2)
    rows = rows[rows["length"].isin(lengths)]
    for ax, length in zip(axes, lengths, strict=True):
        _trade(ax, rows[rows["length"] == length], style, rows)
        ax.set_title(f"{panel.axis} {units.length(length)}")
    _legend(figure, style, rows["plugin"], [_FRONT])
    _titled(figure, f"Speed against error: {panel.title}" if panel.title else "Speed against error", [panel])
    _lay_out(figure)
    for ax, length in zip(axes, lengths, strict=True):
        _label_front(figure, ax, rows[rows["length"] == length], style)
    return figure


@styled
def attention_share(panels: Sequence[Panel], style: Style) -> Figure | None:
    """Attention's share of the block's time against length. The frames carry share, share_low and share_high."""
    panels = [panel for panel in panels if panel.frame["share"].notna().any()]
    if not panels:
        return None
    figure, axes = _grid(len(panels), height=3.4)
    for ax, panel in zip(axes, panels, strict=True):
        rows = panel.frame.dropna(subset=["share"])
        rows = rows.assign(**{name: 100 * rows[name] for name in ("share", "share_low", "share_high")})
        _lines(ax, rows, style, "share", "share_low", "share_high")
        _lengths(ax, panel)
        ax.set_ylim(0, max(100.0, 1.05 * np.nanmax(rows[["share", "share_high"]])))
        _ylabel(ax, "share of the block's time (%)")
        ax.set_title(_title(panel.title, 58))
    _legend(figure, style, [plugin for panel in panels for plugin in panel.frame.dropna(subset=["share"])["plugin"]])
    return _titled(figure, "Attention's share of the block's time", panels)


@styled
def amdahl(panels: Sequence[Panel], style: Style) -> Figure | None:
    """The block's speedup, measured and after Amdahl's law, against length. The frames carry amdahl."""
    panels = [panel for panel in panels if panel.frame["amdahl"].notna().any()]
    if not panels:
        return None
    figure, axes = _grid(len(panels), height=3.4)
    columns = ["speedup", "speedup_low", "speedup_high"]
    for ax, panel in zip(axes, panels, strict=True):
        rows = panel.frame.dropna(subset=["amdahl"])
        _lines(ax, rows, style, *columns)
        for plugin, part in rows.groupby("plugin"):
            ax.plot(part["length"], part["amdahl"], color=style.colours[str(plugin)], linestyle="--", linewidth=1.2)
        scales.ratio_axis(ax, *_ends([pd.Series([1.0]), rows[[*columns, "amdahl"]]]))
        ax.axhline(1.0, color=GREY, linewidth=1, linestyle=":", zorder=1)
        _lengths(ax, panel)
        _ylabel(ax, f"block's speedup over {_baseline_name(rows, style)}", always=True)
        ax.set_title(_title(panel.title, 58))
    shown = [plugin for panel in panels for plugin in panel.frame.dropna(subset=["amdahl"])["plugin"]]
    _legend(figure, style, shown, [_PREDICTED])
    return _titled(figure, "What survives in the block", panels)


@styled
def overview(panel: Panel, style: Style, machine: str) -> Figure | None:
    """Latency, memory, speedup and speed against error of one panel in one picture."""
    done = _timed(panel.frame)
    if not len(done):
        return None
    figure, axes = _grid(4, height=3.3)
    _latency(axes[0], panel, style, [panel])
    axes[0].set_title("Latency")
    if _positive(done, "peak_bytes").any():
        _memory(axes[1], panel, style, [panel])
    else:
        _empty(axes[1], "no memory was measured")
    axes[1].set_title("Peak memory")
    if len(_compared(panel.frame)):
        _speedup(axes[2], panel, style, [panel])
    else:
        _empty(axes[2], "no speedup: the baseline has no number")
    axes[2].set_title("Speedup over the baseline")
    traded = _traded(panel.frame)
    if len(traded):
        # The longest length among those that the most variants finished.
        counts = traded.groupby("length")["plugin"].nunique()
        length = counts[counts == counts.max()].index.max()
        traded = traded[traded["length"] == length]
        _trade(axes[3], traded, style, traded)
        axes[3].set_title(f"Speed against error at {panel.axis} {units.length(length)}")
    else:
        _empty(axes[3], "no error was measured")
        axes[3].set_title("Speed against error")
    _legend(figure, style, panel.frame["plugin"], [*_explained(panel), _FLOOR, _FRONT])
    _suptitle(figure, ", ".join(part for part in (panel.title, panel.shared) if part), machine)
    _lay_out(figure)
    if len(traded):
        _label_front(figure, axes[3], traded, style)
    return figure


# What fills one axis


def _latency(ax: Axes, panel: Panel, style: Style, shared: Sequence[Panel]) -> None:
    """One panel's latencies, on a scale that fits all the `shared` panels."""
    columns = ["latency_s", "latency_low_s", "latency_high_s"]
    _lines(ax, _timed(panel.frame), style, *columns)
    scales.time_axis(ax, *_ends([_timed(each.frame)[columns] for each in shared]))
    _lengths(ax, panel)
    _mark_missing(ax, panel, style, shared)
    _ylabel(ax, "median latency of a call")
    ax.set_title(_title(panel.title, 58))


def _memory(ax: Axes, panel: Panel, style: Style, shared: Sequence[Panel]) -> None:
    rows = finished(panel.frame)
    _lines(ax, rows[_positive(rows, "peak_bytes")], style, "peak_bytes")
    floor = _floor(panel)
    ax.plot(floor.index, floor, color=GREY, linestyle=":", linewidth=1.4, zorder=1)
    peaks = [finished(each.frame)["peak_bytes"] for each in shared]
    scales.byte_axis(ax, *_ends([*peaks, *(_floor(each) for each in shared)]))
    _lengths(ax, panel)
    _mark_missing(ax, panel, style, shared)
    _ylabel(ax, "peak memory of a call")
    ax.set_title(_title(panel.title, 58))


def _speedup(ax: Axes, panel: Panel, style: Style, shared: Sequence[Panel]) -> None:
    columns = ["speedup", "speedup_low", "speedup_high"]
    rows = _compared(panel.frame)
    _lines(ax, rows[rows["plugin"] != rows["baseline"]], style, *columns)
    _baselines(ax, rows, style)
    scales.ratio_axis(ax, *_ends([pd.Series([1.0]), *(_compared(each.frame)[columns] for each in shared)]))
    _lengths(ax, panel)
    _ylabel(ax, f"speedup over {_baseline_name(rows, style)}", always=True)
    ax.set_title(_title(panel.title, 58))


def _baselines(ax: Axes, rows: pd.DataFrame, style: Style) -> None:
    """The line at 1, in the baseline's own colour where there is one baseline, with its points on it."""
    names = rows["baseline"].dropna().unique()
    colour = style.colours.get(names[0], GREY) if len(names) == 1 else GREY
    ax.axhline(1.0, color=colour, linewidth=1.6, linestyle="--", zorder=1)
    own = rows[rows["plugin"] == rows["baseline"]]
    _lines(ax, own, style, "speedup")


def _trade(ax: Axes, rows: pd.DataFrame, style: Style, all_rows: pd.DataFrame) -> None:
    """Speedup against error of one workload; `all_rows` sets the limits, so that neighbours compare."""
    ax.axhline(1.0, color="#a0a0a0", linewidth=1, linestyle="--", zorder=1)
    front = rows[_on_front(rows)].sort_values("error")
    ax.step(front["error"], front["speedup"], where="post", color=GREY, linewidth=1, linestyle=":", zorder=1)
    ax.scatter(front["error"], front["speedup"], s=190, facecolor="none", edgecolor=GREY, linewidth=1.2, zorder=2)
    sns.scatterplot(
        data=rows,
        x="error",
        y="speedup",
        hue="plugin",
        style="plugin",
        palette=style.colours,
        markers=style.markers,
        s=70,
        legend=False,
        ax=ax,
        zorder=3,
    )
    low, high = all_rows["error"].min(), all_rows["error"].max()
    scales.error_axis(ax, low / 2, high * 2, axis="x")
    scales.ratio_axis(ax, min(1.0, all_rows["speedup"].min()) / 1.15, max(1.0, all_rows["speedup"].max()) * 1.15)
    ax.set_xlabel("approximation error (relative l2)")
    _ylabel(ax, f"speedup over {_baseline_name(rows, style)}", always=True)


def _empty(ax: Axes, text: str) -> None:
    ax.set_axis_off()
    ax.text(0.5, 0.5, text, ha="center", va="center", color=GREY, transform=ax.transAxes)


# Rows and their parts


def _positive(frame: pd.DataFrame, column: str) -> pd.Series:
    return frame[column].notna() & (frame[column] > 0)


def _timed(frame: pd.DataFrame) -> pd.DataFrame:
    """Finished rows whose latency a logarithm can show."""
    rows = finished(frame)
    return rows[_positive(rows, "latency_s")]


def _compared(frame: pd.DataFrame) -> pd.DataFrame:
    rows = finished(frame)
    return rows[_positive(rows, "speedup")]


def _traded(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows with both a speedup and an approximation error, the error where a logarithm can show it."""
    rows = _compared(frame)
    return rows.assign(error=_drawable_errors(rows, "approximation_rel_l2")).dropna(subset=["error"])


def _drawable_errors(frame: pd.DataFrame, column: str) -> pd.Series:
    values = frame[column].astype(float)
    return values.where(np.isfinite(values)).clip(lower=_SMALLEST_ERROR)


def _on_front(rows: pd.DataFrame) -> list[bool]:
    return compare.pareto_front(list(rows["error"]), list(rows["speedup"]), compare.rounding_floor(rows))


def _tolerances(frame: pd.DataFrame) -> list[tuple[float, str]]:
    """The tolerances of a panel, each with whom it holds for; nobody is named where it is the same for all."""
    known = frame[_positive(frame, "tolerance")]
    families = known.groupby("tolerance")["family"].agg(lambda values: ", ".join(sorted(set(values))))
    return [(float(str(tolerance)), who if len(families) > 1 else "") for tolerance, who in families.items()]


def _baseline_name(rows: pd.DataFrame, style: Style) -> str:
    names = [name for name in rows["baseline"].dropna().unique() if name]
    if len(names) != 1:
        return "its baseline"
    return style.figure_name(names[0]) if names[0] in style.names else "the baseline"


def _floor(panel: Panel) -> pd.Series:
    """What a call can't do without: bytes of inputs and output by length."""
    rows = panel.frame
    floor = (rows["input_bytes"] + rows["output_bytes"]).groupby(rows["length"]).min().dropna()
    return floor[floor > 0]


def _ends(values: Iterable[pd.Series | pd.DataFrame]) -> tuple[float, float]:
    """The smallest and the largest number above 0."""
    flat = np.concatenate([part.to_numpy(dtype=float).ravel() for part in values])
    flat = flat[np.isfinite(flat) & (flat > 0)]
    return float(flat.min()), float(flat.max())


def _gone(panel: Panel) -> pd.DataFrame:
    """A panel's cells without a number."""
    return panel.frame.drop(index=finished(panel.frame).index)


def _any_loose(rows: pd.DataFrame) -> bool:
    return bool(rows["converged"].eq(False).any())


# Marks


def _lines(ax: Axes, rows: pd.DataFrame, style: Style, y: str, low: str = "", high: str = "") -> None:
    """One line a plugin, with a band and bars for its interval; a hollow marker where it did not converge."""
    if rows.empty:
        return
    sns.lineplot(
        data=rows,
        x="length",
        y=y,
        hue="plugin",
        style="plugin",
        palette=style.colours,
        markers=style.markers,
        dashes=False,
        estimator=None,
        markersize=6.5,
        markeredgewidth=0.8,
        legend=False,
        ax=ax,
        zorder=3,
    )
    for plugin, part in rows.groupby("plugin"):
        colour, marker = style.colours[str(plugin)], style.markers[str(plugin)]
        if low:
            known = part.dropna(subset=[low, high])
            ax.fill_between(known["length"], known[low], known[high], color=colour, alpha=0.2, linewidth=0, zorder=2)
            ax.vlines(known["length"], known[low], known[high], color=colour, linewidth=1.2, zorder=2)
            loose = part[part["converged"].eq(False)]
            ax.plot(loose["length"], loose[y], linestyle="", marker=marker, markersize=6.5, markerfacecolor="white",
                    markeredgecolor=colour, markeredgewidth=1.4, zorder=4)  # fmt: skip


def _mark_missing(ax: Axes, panel: Panel, style: Style, shared: Sequence[Panel]) -> None:
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


def _tolerance_line(ax: Axes, tolerance: float, who: str, left: bool) -> None:
    ax.axhline(tolerance, color=RED, linewidth=1.2, linestyle="--", zorder=1)
    ax.annotate(f"tolerance{f' ({who})' if who else ''}", (0.005 if left else 0.995, tolerance),
                xycoords=("axes fraction", "data"), xytext=(0, 2), textcoords="offset points",
                ha="left" if left else "right", va="bottom", fontsize=8, color=RED)  # fmt: skip


def _lengths(ax: Axes, panel: Panel) -> None:
    label = f"{panel.axis} (tokens)"
    scales.length_axis(ax, list(panel.frame["length"]), label)


def _label_front(figure: Figure, ax: Axes, rows: pd.DataFrame, style: Style) -> None:
    """Names beside the points of the front, each where it covers neither a point nor another name.

    The layout must be final: positions are looked up in pixels.
    """
    points = ax.transData.transform(rows[["error", "speedup"]].to_numpy(dtype=float))
    reach = 8 * figure.dpi / 72
    taken = [Bbox.from_extents(x - reach, y - reach, x + reach, y + reach) for x, y in points]
    renderer = FigureCanvasAgg(figure).get_renderer()  # type: ignore[no-untyped-call]
    room = ax.get_window_extent()
    front = _on_front(rows)
    for (_, row), on_front in zip(rows.iterrows(), front, strict=True):
        if not on_front:
            continue
        best: tuple[float, Artist, Bbox] | None = None
        # The front's line leaves a point to the right and reaches it from below: look above and to the left first.
        for dx, dy in ((-8, 8), (-11, 0), (0, 11), (8, 8), (-8, -8), (11, 0), (8, -8), (0, -11), (-11, 18), (11, 18)):
            text = ax.annotate(
                style.figure_name(str(row["plugin"])),
                (row["error"], row["speedup"]),
                (dx, dy),
                textcoords="offset points",
                ha="left" if dx > 0 else "right" if dx < 0 else "center",
                va="bottom" if dy > 0 else "top" if dy < 0 else "center",
                fontsize=8,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5},
                zorder=2.5,
            )
            box = text.get_window_extent(renderer)
            inside = Bbox.intersection(box, room)
            cut = _area(box) - (_area(inside) if inside else 0)
            overlap = cut + sum(_area(both) for other in taken if (both := Bbox.intersection(box, other)))
            if best is None or overlap < best[0]:
                if best:
                    best[1].remove()
                best = (overlap, text, box)
            else:
                text.remove()
            if overlap == 0:
                break
        assert best is not None
        taken.append(best[2])


def _area(box: Bbox) -> float:
    return float(box.width * box.height)


# Legends and layout

_FLOOR = Line2D([], [], color=GREY, linestyle=":", linewidth=1.4, label="inputs and output alone")
_LOOSE = Line2D([], [], color=GREY, marker="o", linestyle="", markerfacecolor="white", markeredgewidth=1.4,
                label="hollow: less precise than asked")  # fmt: skip
_MISSING = Line2D([], [], color=GREY, marker="x", linestyle="", markeredgewidth=1.6, label="no number (see the tables)")
_WRONG = Line2D([], [], color=GREY, marker="x", linestyle="", markeredgewidth=2, label="wrong (reason in the tables)")
_PREDICTED = Line2D([], [], color=GREY, linestyle="--", linewidth=1.2, label="by Amdahl's law")
_FRONT = Line2D([], [], color=GREY, marker="o", linestyle=":", linewidth=1, markersize=11, markerfacecolor="none",
                label="Pareto front: nothing is both faster and closer")  # fmt: skip


def _handle(style: Style, plugin: str, label: str) -> Line2D:
    return Line2D([], [], color=style.colours[plugin], marker=style.markers[plugin], markeredgecolor="white",
                  markersize=7, label=label)  # fmt: skip


def _explained(panel: Panel) -> list[Line2D]:
    """Entries for the marks that a panel has: hollow ones and crosses."""
    loose = [_LOOSE] if _any_loose(finished(panel.frame)) else []
    return [*loose, *([_MISSING] if len(_gone(panel)) else [])]


def _entries(panel: Panel, style: Style, column: str) -> list[Line2D]:
    """A panel's legend: each plugin, a cross or a line, with the exponent fitted to its `column`."""
    rows = finished(panel.frame)
    entries = []
    for plugin in style.plugins:
        if plugin in set(panel.frame["plugin"]):
            part = rows[(rows["plugin"] == plugin) & _positive(rows, column)]
            fit = powers.fit_exponent(list(part["length"]), list(part[column]))
            # z: what rounds to zero has no sign
            growth = f"   $l^{{\\,{fit.value:z.2f}}}$  [{fit.low:z.2f}, {fit.high:z.2f}]" if fit else ""
            entries.append(_handle(style, plugin, style.figure_name(plugin) + growth))
    return [*entries, *(mark for mark in _explained(panel) if mark is not _LOOSE or column == "latency_s")]


def _legend_below(ax: Axes, handles: Sequence[Line2D]) -> None:
    below = ax.transAxes + ScaledTranslation(0, -42 / 72, ax.figure.dpi_scale_trans)
    ax.legend(handles=handles, loc="upper left", bbox_to_anchor=(0, 0), bbox_transform=below, borderaxespad=0)


def _legend(figure: Figure, style: Style, plugins: Iterable[str], extra: Sequence[Line2D] = ()) -> None:
    """One legend for the whole figure, under it; the figure grows by what the legend takes."""
    present = set(plugins)
    handles = [_handle(style, p, style.figure_name(p)) for p in style.plugins if p in present]
    handles += extra
    room = figure.get_figwidth() * 13  # characters
    columns = next((n for n in range(len(handles), 1, -1) if _characters(handles, n) <= room), 1)
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)
    figure.set_figheight(figure.get_figheight() + _LINE * -(-len(handles) // columns))


def _characters(handles: Sequence[Line2D], columns: int) -> int:
    """About how wide a legend of `columns` columns is; matplotlib fills it column by column."""
    parts = np.array_split([len(str(handle.get_label())) + 7 for handle in handles], columns)
    return sum(int(part.max()) for part in parts)


def _lay_out(figure: Figure) -> None:
    """Places everything for good: once, for both files, and before positions are looked up in pixels."""
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
        figure.set_layout_engine("none")


def _grid(count: int, height: float, columns: int = 2) -> tuple[Figure, list[Axes]]:
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


def _ylabel(ax: Axes, text: str, always: bool = False) -> None:
    """Neighbours in a row share what their y axis shows: the first says it."""
    spec = ax.get_subplotspec()
    if always or spec is None or spec.is_first_col():
        ax.set_ylabel(text)
    else:
        ax.set_ylabel("")


def _titled(figure: Figure, title: str, panels: Sequence[Panel]) -> Figure:
    _suptitle(figure, title, panels[0].shared)
    return figure


def _suptitle(figure: Figure, *lines: str) -> None:
    figure.suptitle("\n".join(_title(line, int(12 * figure.get_figwidth())) for line in lines if line))


def _title(text: str, width: int) -> str:
    """Broken into lines of so many characters, and no mathematics."""
    return textwrap.fill(text, width).replace("$", r"\$")
