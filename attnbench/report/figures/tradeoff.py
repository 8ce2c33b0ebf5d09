"""The figure of speed against error, with its Pareto front."""

from __future__ import annotations

import pandas as pd
import seaborn as sns
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import Bbox

from attnbench.analysis import compare
from attnbench.report import drawing, scales, units
from attnbench.report.prepare import Panel
from attnbench.report.style import Style

READ = (
    "Up is faster, left is closer to exact attention. Circled variants are on the Pareto front: no other is both "
    "faster and closer. Exact variants count as equally close, since they differ by rounding only."
)

FRONT = Line2D([], [], color=drawing.GREY, marker="o", linestyle=":", linewidth=1, markersize=11,
               markerfacecolor="none", label="Pareto front: nothing is both faster and closer")  # fmt: skip


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
    drawing.legend(figure, style, rows["plugin"], [FRONT])
    drawing.suptitle(figure, f"Speed against error{panel.title and f': {panel.title}'}", panel.shared)
    drawing.lay_out(figure)
    for ax, length in zip(axes, lengths, strict=True):
        label_front(figure, ax, rows[rows["length"] == length], style)
    return figure


def fill(ax: Axes, rows: pd.DataFrame, style: Style, all_rows: pd.DataFrame) -> None:
    """Speedup against error of one workload; `all_rows` sets the limits, so that neighbours compare."""
    ax.axhline(1.0, color="#a0a0a0", linewidth=1, linestyle="--", zorder=1)
    front = rows[_on_front(rows)].sort_values("error")
    ax.step(front["error"], front["speedup"], where="post", color=drawing.GREY, linewidth=1, linestyle=":", zorder=1)
    ax.scatter(front["error"], front["speedup"], s=190, fc="none", ec=drawing.GREY, linewidth=1.2, zorder=2)
    sns.scatterplot(rows, x="error", y="speedup", s=70, ax=ax, zorder=3, **style.marks)
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


def label_front(figure: Figure, ax: Axes, rows: pd.DataFrame, style: Style) -> None:
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
