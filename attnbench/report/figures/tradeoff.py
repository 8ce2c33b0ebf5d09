"""The figure of speed against error, with its Pareto front."""

from __future__ import annotations

import pandas as pd
from adjustText import adjust_text
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import Bbox

from attnbench.analysis import compare
from attnbench.report import drawing, labels, scales, units
from attnbench.report.prepare import Panel
from attnbench.report.style import Style

READ = (
    "Up is faster, left is closer to exact attention. Circled variants are on the Pareto front: no other is both "
    "faster and closer. Exact variants count as equally close, since they differ by rounding only."
)

FRONT = Line2D([], [], color=drawing.GREY, marker="o", linestyle=":", linewidth=1, markersize=11,
               markerfacecolor="none", label="ringed: nothing is faster and closer")  # fmt: skip


@drawing.styled
def tradeoff(panel: Panel, style: Style) -> Figure | None:
    """Speedup against approximation error, one axis for each of the longest lengths, with the Pareto front."""
    rows = traded(panel.frame)
    lengths = sorted(set(rows["length"]))[-drawing.PANELS :]
    if not lengths:
        return None
    figure, axes = drawing.grid(len(lengths), height=3.2, columns=3 if len(lengths) > 4 else 2)
    rows = rows[rows["length"].isin(lengths)]
    for ax, length in zip(axes, lengths, strict=True):
        fill(ax, rows[rows["length"] == length], style, rows)
        ax.set_title(f"{panel.axis} {units.length(length)}")
    drawing.legend(figure, style, rows["plugin"], [*drawing.explained(rows, loose=False), FRONT])
    drawing.suptitle(figure, f"Speed against error{panel.title and f': {panel.title}'}", panel.shared)
    drawing.lay_out(figure)
    for ax, length in zip(axes, lengths, strict=True):
        label(figure, ax, rows[rows["length"] == length], style)
    return figure


def fill(ax: Axes, rows: pd.DataFrame, style: Style, all_rows: pd.DataFrame) -> None:
    """Speedup against error of one workload; `all_rows` sets the limits, so that neighbours compare."""
    ax.axhline(1.0, color="#a0a0a0", linewidth=1, zorder=1)
    front = rows[_on_front(rows)].sort_values("error")
    ax.step(front["error"], front["speedup"], where="post", color=drawing.GREY, linewidth=1, linestyle=":", zorder=1)
    ax.scatter(front["error"], front["speedup"], s=190, fc="none", ec=drawing.GREY, linewidth=1.2, zorder=2)
    for plugin, part in rows.groupby("plugin"):
        ax.scatter(part["error"], part["speedup"], s=60, zorder=3, marker=style.markers[str(plugin)],
                   color=style.colours[str(plugin)], edgecolor="white")  # fmt: skip
    low, high = all_rows["error"].min(), all_rows["error"].max()
    scales.error_axis(ax, low / 2, high * 2, axis="x")
    scales.ratio_axis(ax, min(1.0, all_rows["speedup"].min()) / 1.15, max(1.0, all_rows["speedup"].max()) * 1.15)
    ax.set_xlabel("approximation error (relative l2)")
    drawing.ylabel(ax, f"speedup over {drawing.baseline_name(rows, style)}", always=True)


def traded(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows with both a speedup and an approximation error, the error where a logarithm can show it."""
    return drawing.with_error(drawing.drawable(frame, "speedup"), "approximation_rel_l2")


def _on_front(rows: pd.DataFrame) -> list[bool]:
    return compare.pareto_front(list(rows["error"]), list(rows["speedup"]), compare.rounding_floor(rows))


def label(figure: Figure, ax: Axes, rows: pd.DataFrame, style: Style) -> None:
    """Names beside the points, bold on the front, each where it covers neither a point nor another name.

    The layout must be final: positions are looked up in pixels.
    """
    reach = 8 * figure.dpi / 72  # pixels: a point with its circle
    back = ax.transData.inverted()
    points = ax.transData.transform(rows[["error", "speedup"]].to_numpy(dtype=float))
    texts = [
        # The front's line leaves a point to the right and reaches it from below: its names go up and to the left.
        ax.text(
            row["error"],
            row["speedup"],
            style.figure_name(str(row["plugin"])),
            ha="right" if on_front else "left",
            va="bottom" if on_front else "top",
            fontsize=8,
            fontweight="bold" if on_front else "normal",
            color=labels.ink(style.colours[str(row["plugin"])]),
            zorder=2.5,
        )
        for on_front, (_, row) in zip(_on_front(rows), rows.iterrows(), strict=True)
    ]
    adjust_text(
        texts,
        objects=[Bbox(back.transform([point - reach, point + reach])) for point in points],
        avoid_self=False,
        # Neither flung out at first nor pulled back: the last step is then one that found nothing covered.
        force_explode=0.0,
        force_pull=0.0,
        iter_lim=500,  # a limit in seconds would draw another picture on a slower machine
        ax=ax,
    )
