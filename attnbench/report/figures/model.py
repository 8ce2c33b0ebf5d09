"""The figure of whole models: what a variant costs in quality against what it gains in speed."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from adjustText import adjust_text
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from attnbench.report import drawing, labels, scales, units
from attnbench.report.style import Style

READ = (
    "Up is a faster model, left one whose predictions stay where exact attention has them: the mean KL divergence of "
    "its next tokens, or for an encoder 1 less the cosine of its embeddings."
)
_LEAST = 1e-8  # what rounding does in float32: exact variants stand there


@drawing.styled
def quality(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """rows: of `attnbench model` that are ok. A panel for each model and length."""
    frame = _placed(pd.DataFrame(rows))
    style = Style.of(frame[["plugin", "variant", "family"]].drop_duplicates())
    panels = [part for _, part in frame.groupby(["model", "seq"], sort=False)]
    figure, axes = drawing.grid(len(panels), height=3.6)
    speeds = [1.0, *frame["speed"]]
    for ax, part in zip(axes, panels, strict=True):
        first = part.iloc[0]
        ax.axhline(1.0, color="#a0a0a0", linewidth=1, zorder=1)
        for plugin, x, y in zip(part["plugin"], part["lost"], part["speed"], strict=True):
            look: dict[str, Any] = {"marker": style.markers[plugin], "color": style.colours[plugin]}
            ax.scatter(x, y, s=60, edgecolor="white", zorder=3, **look)
        scales.error_axis(ax, part["lost"].min() / 2, part["lost"].max() * 2, axis="x")
        scales.ratio_axis(ax, min(speeds) / 1.15, max(speeds) * 1.15)
        encodes = first["cosine"] is not None and pd.notna(first["cosine"])
        ax.set_xlabel("1 - cosine of embeddings" if encodes else "KL divergence of next tokens, nats")
        ax.set_ylabel("speedup of the model's prefill")
        ax.set_title(f"{first['model']}, {units.length(first['seq'])} tokens")
    ratios = ["beside a name: its perplexity over exact's"] if frame["perplexity_ratio"].notna().any() else []
    drawing.suptitle(figure, "Does the model still work?", *ratios)
    drawing.lay_out(figure)
    for ax, part in zip(axes, panels, strict=True):
        _names(figure, ax, part, style)
    return figure


def _placed(frame: pd.DataFrame) -> pd.DataFrame:
    """With what is lost and gained: columns `lost` and `speed`, in both of which a logarithm can show it."""
    cosine, kl = (pd.to_numeric(frame[name]) for name in ("cosine", "kl_mean"))
    lost, speed = (1 - cosine).fillna(kl).clip(lower=_LEAST), pd.to_numeric(frame["prefill_speedup"])
    return frame.assign(lost=lost, speed=speed).dropna(subset=["lost", "speed"])


def _names(figure: Figure, ax: Axes, part: pd.DataFrame, style: Style) -> None:
    """Names beside the points; of a decoder with how many times exact's its perplexity is.

    The layout must be final: positions are looked up in pixels.
    """
    reach = 6 * figure.dpi / 72  # pixels: a point
    back = ax.transData.inverted()
    points = ax.transData.transform(part[["lost", "speed"]].to_numpy(dtype=float))
    texts = []
    for _, row in part.iterrows():
        plugin, ratio = str(row["plugin"]), row["perplexity_ratio"]
        name = style.figure_name(plugin) + ("" if pd.isna(ratio) else f"  {ratio:.4g}x")
        ink = labels.ink(style.colours[plugin])
        texts.append(ax.text(row["lost"], row["speed"], name, fontsize=8, color=ink, zorder=2.5))
    boxes = [Bbox(back.transform([point - reach, point + reach])) for point in points]
    adjust_text(texts, objects=boxes, avoid_self=False, force_explode=0.0, force_pull=0.0, iter_lim=500, ax=ax)
