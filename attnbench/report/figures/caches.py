"""The figure of KV caches: what a cache keeps of each number against what the model loses, with the Pareto front."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from adjustText import adjust_text
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import Bbox

from attnbench.analysis import compare
from attnbench.report import drawing, labels, scales, units
from attnbench.report.style import Style

READ = (
    "Left is smaller, down is closer to the model with nothing lost. A bar is the interval over documents; hollow is "
    "what it does not tell from the exact model. Circled caches are on the front: nothing is smaller and closer. "
    "Caches of the same size stand side by side."
)
_LEAST = 1e-4  # of perplexity: what is gained, or lost within 0.01%, is drawn here
_STEP = 1.035  # from one cache to the next of the same size
_HOLLOW = Line2D([], [], color=drawing.GREY, marker="o", linestyle="", markerfacecolor="white", markeredgewidth=1.4,
                 label="hollow: not told from exact")  # fmt: skip
_RINGED = Line2D([], [], color=drawing.GREY, marker="o", linestyle="", markersize=11, markerfacecolor="none",
                 label="ringed: nothing is smaller and closer")  # fmt: skip


@drawing.styled
def caches(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """rows: of `attnbench cache` that are ok, of one model and length. The reference is the axis, and not drawn."""
    frame = _placed(pd.DataFrame(rows))
    style = Style.of(frame[["plugin", "variant", "family"]])
    figure, (ax,) = drawing.grid(1, height=4.6)
    front = frame[frame["front"]]
    ax.scatter(front["x"], front["lost"], s=190, fc="none", ec=drawing.GREY, linewidth=1.2, zorder=2)
    for row in frame.to_dict("records"):
        colour = style.colours[row["plugin"]]
        inside, edge, width = ("white", colour, 1.4) if row["alike"] else (colour, "white", 0.8)
        ax.vlines(row["x"], row["low"], row["high"], color=colour, linewidth=1.2, zorder=2)
        ax.plot(row["x"], row["lost"], linestyle="", marker=style.markers[row["plugin"]], markersize=7,
                markerfacecolor=inside, markeredgecolor=edge, markeredgewidth=width, zorder=3)  # fmt: skip
    bits = [tick / 1.15 for tick in frame["x"]], [tick * 1.15 for tick in frame["x"]]
    scales.log_axis(ax, min(bits[0]), max(bits[1]), lambda x: f"{x:g}", 2, ((1,), (1, 1.5)), axis="x")
    most = max(10 * _LEAST, float(frame[["lost", "high"]].to_numpy().max()))
    scales.log_axis(ax, _LEAST, most, lambda lost: f"{100 * lost:g}%", 10, scales.TENS)
    ax.set_xlabel("bits kept for a number of a key or value, with scales and all")
    ax.set_ylabel("perplexity above the exact model's")
    first = frame.iloc[0]
    drawing.legend(figure, style, frame["plugin"], [_RINGED, *([_HOLLOW] if frame["alike"].any() else [])])
    drawing.suptitle(figure, f"KV caches in {first['model']}, {units.length(first['seq'])} tokens")
    drawing.lay_out(figure)
    _names(figure, ax, frame, style)
    return figure


def _placed(frame: pd.DataFrame) -> pd.DataFrame:
    """With columns plugin and variant as a style wants them; x, and of what is lost what a logarithm can show: lost,
    low, high; alike, where the interval holds an unchanged perplexity; and front."""
    if (frame["cache"] != "exact").any():
        frame = frame[frame["cache"] != "exact"]
    frame = frame.sort_values(["bits_per_value", "perplexity_ratio"])
    ratio, low, high = (pd.to_numeric(frame[f"perplexity_ratio{end}"]) for end in ("", "_low", "_high"))
    lost, place = (ratio - 1).clip(lower=_LEAST), frame.groupby("bits_per_value").cumcount()
    return frame.assign(
        plugin=frame["cache"],
        variant=frame["cache"].str.partition(":")[0],
        x=frame["bits_per_value"] * _STEP**place,
        lost=lost,
        low=(low.fillna(ratio) - 1).clip(lower=_LEAST),
        high=(high.fillna(ratio) - 1).clip(lower=_LEAST),
        alike=(low <= 1) & (high >= 1) | (ratio - 1 < _LEAST),
        front=compare.pareto_front(list(lost), list(1 / frame["bits_per_value"])),
    )


def _names(figure: Figure, ax: Axes, frame: pd.DataFrame, style: Style) -> None:
    """Names beside the points, each where it covers neither a point nor another name; the layout must be final."""
    reach, back = 7 * figure.dpi / 72, ax.transData.inverted()
    points = ax.transData.transform(frame[["x", "lost"]].to_numpy(dtype=float))
    texts = [
        ax.text(row["x"], row["lost"], style.figure_name(row["plugin"]), fontsize=8, zorder=2.5, va="bottom",
                fontweight="bold" if row["front"] else "normal", color=labels.ink(style.colours[row["plugin"]]))
        for row in frame.to_dict("records")
    ]  # fmt: skip
    covered = [Bbox(back.transform([point - reach, point + reach])) for point in points]
    adjust_text(texts, objects=covered, avoid_self=False, force_explode=0.0, force_pull=0.0, iter_lim=500, ax=ax)
