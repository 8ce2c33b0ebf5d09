"""The figure of KV caches: what a cache keeps of each number against what the model loses, with the Pareto front."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
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
    "Left is smaller, down is closer to the model with nothing lost. A bar is the interval over documents; hollow is a "
    "perplexity that it does not tell from the exact model's. Circled caches are on the front: nothing is smaller and "
    "closer. Caches of the same size stand side by side."
)
_LEAST = {"kl_mean": 1e-6, "perplexity_ratio": 1e-4}  # what is less, or gained, is drawn here
_STEP = 1.035  # from one cache to the next of the same size
_HOLLOW = Line2D([], [], color=drawing.GREY, marker="o", linestyle="", markerfacecolor="white", markeredgewidth=1.4,
                 label="hollow: not told from exact")  # fmt: skip
_RINGED = Line2D([], [], color=drawing.GREY, marker="o", linestyle="", markersize=11, markerfacecolor="none",
                 label="ringed: nothing is smaller and closer")  # fmt: skip


@drawing.styled
def caches(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """rows: of `attnbench cache` that are ok, of one model and length. The reference is the axis, and not drawn."""
    frame = _named(pd.DataFrame(rows))
    style = Style.of(frame[["plugin", "variant", "family"]])
    # Options count also where a cache is there once: 3 bits are not 4.
    style = replace(style, names={name: name.replace(":", " ") for name in style.names})
    figure, axes = drawing.grid(2, height=4.6)
    panels = [_placed(frame, column) for column in _LEAST]
    for ax, part in zip(axes, panels, strict=True):
        _fill(ax, part, style)
    axes[0].set_ylabel("KL divergence of next tokens, nats")
    axes[1].set_ylabel("perplexity above the exact model's")
    hollow = [_HOLLOW] if any(part["alike"].any() for part in panels) else []
    drawing.legend(figure, style, frame["plugin"], [_RINGED, *hollow])
    first = frame.iloc[0]
    drawing.suptitle(figure, f"KV caches in {first['model']}, {units.length(first['seq'])} tokens")
    drawing.lay_out(figure)
    for ax, part in zip(axes, panels, strict=True):
        _names(figure, ax, part, style)
    return figure


def _fill(ax: Axes, frame: pd.DataFrame, style: Style) -> None:
    front = frame[frame["front"]]
    ax.scatter(front["x"], front["lost"], s=190, fc="none", ec=drawing.GREY, linewidth=1.2, zorder=2)
    for row in frame.to_dict("records"):
        colour = style.colours[row["plugin"]]
        inside, edge, width = ("white", colour, 1.4) if row["alike"] else (colour, "white", 0.8)
        ax.vlines(row["x"], row["low"], row["high"], color=colour, linewidth=1.2, zorder=2)
        ax.plot(row["x"], row["lost"], linestyle="", marker=style.markers[row["plugin"]], markersize=7,
                markerfacecolor=inside, markeredgecolor=edge, markeredgewidth=width, zorder=3)  # fmt: skip
    scales.log_axis(ax, frame["x"].min() / 1.5, frame["x"].max() * 1.5, lambda x: f"{x:g}", 2, ((1,), (1, 1.5)), "x")
    least, most = float(frame["low"].min()), float(frame[["lost", "high"]].to_numpy().max())
    if frame.attrs["column"] == "kl_mean":
        scales.error_axis(ax, least, max(10 * least, most))
    else:
        scales.log_axis(ax, least, max(10 * least, most), lambda lost: f"{100 * lost:g}%", 10, scales.TENS)
    ax.set_xlabel("bits kept for a number of a key or value, scales and all")


def _named(frame: pd.DataFrame) -> pd.DataFrame:
    """With columns plugin and variant, as a style wants them, and x."""
    if (frame["cache"] != "exact").any():
        frame = frame[frame["cache"] != "exact"]
    frame = frame.sort_values(["bits_per_value", "kl_mean"])
    side_by_side = frame.groupby("bits_per_value").cumcount()
    return frame.assign(
        plugin=frame["cache"],
        variant=frame["cache"].str.partition(":")[0],
        x=frame["bits_per_value"] * _STEP**side_by_side,
    )


def _placed(frame: pd.DataFrame, column: str) -> pd.DataFrame:
    """With what is lost as a logarithm can show it: lost, low, high; alike, where it may be none; front."""
    least, none = _LEAST[column], 1.0 if column == "perplexity_ratio" else 0.0
    value, low, high = (pd.to_numeric(frame[f"{column}{end}"]) for end in ("", "_low", "_high"))
    lost = (value - none).clip(lower=least)
    placed = frame.assign(
        lost=lost,
        low=(low.fillna(value) - none).clip(lower=least),
        high=(high.fillna(value) - none).clip(lower=least),
        alike=(low <= none) & (high >= none) | (value - none < least),
        front=compare.pareto_front(list(lost), list(1 / frame["bits_per_value"])),
    )
    placed.attrs["column"] = column
    return placed


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
    line = {"arrowstyle": "-", "color": drawing.GREY, "linewidth": 0.6, "shrinkB": 5}
    adjust_text(texts, x=list(frame["x"]), y=list(frame["lost"]), objects=covered, avoid_self=False, force_explode=0.0,
                iter_lim=500, ax=ax, arrowprops=line, min_arrow_len=12)  # fmt: skip
