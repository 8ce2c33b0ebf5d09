"""The figure of three levels: what of a speedup is left in a block, and in a model."""

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from attnbench.analysis.frames import as_rows
from attnbench.analysis.levels import LEVELS
from attnbench.report import drawing, labels, scales, units
from attnbench.report.style import Style

READ = (
    "Each line is a variant's speedup over exact attention, by itself, with a block around it, and in a published "
    "model, whose other layers take the time that they take. Behind its name stands what became of the model: its "
    "perplexity over exact attention's, or the cosine of its embeddings to those."
)


@drawing.styled
def levels(found: pd.DataFrame, style: Style) -> Figure | None:
    """found: of `analysis.levels`. A panel for each model, at its longest length."""
    longest = found.groupby("model")["seq"].transform("max")
    parts = [part for _, part in found[found["seq"] == longest].groupby("model", sort=False)]
    if not parts:
        return None
    figure, axes = drawing.grid(len(parts), height=3.8)
    low, high = drawing.ends(part[list(LEVELS)] for part in parts)
    for ax, part in zip(axes, parts, strict=True):
        ax.axhline(1.0, color="#a0a0a0", linewidth=1, zorder=1)
        _fill(ax, part, style)
        scales.ratio_axis(ax, min(low, 1.0), max(high, 1.0))
        drawing.ylabel(ax, "speedup over exact attention")
        ax.set_xticks(range(len(LEVELS)), list(LEVELS.values()))
        ax.set_xlim(-0.2, len(LEVELS) - 0.9)
        ax.set_title(f"{part['model'].iloc[0]}, {units.length(part['seq'].iloc[0])} tokens")
    drawing.legend(figure, style, pd.concat(parts)["plugin"])
    drawing.suptitle(figure, "From the kernel to the model")
    drawing.lay_out(figure)
    return figure


def _fill(ax: Axes, part: pd.DataFrame, style: Style) -> None:
    points = pd.DataFrame(
        [
            {"plugin": row["plugin"], "level": level, "speedup": row[name], "low": row[f"{name}_low"],
             "high": row[f"{name}_high"]}
            for row in as_rows(part)
            for level, name in enumerate(LEVELS)
            if units.known(row[name])
        ]
    )  # fmt: skip
    for name, own in points.groupby("plugin"):
        plugin = str(name)
        look: dict[str, Any] = {"color": style.colours[plugin]}
        ax.plot(own["level"], own["speedup"], marker=style.markers[plugin], markersize=6.5, markeredgecolor="white",
                markeredgewidth=0.8, zorder=3, **look)  # fmt: skip
        ax.vlines(own["level"], own["low"], own["high"], linewidth=1.2, zorder=2, **look)
    more = {row["plugin"]: _became(row) for row in as_rows(part)}
    labels.at_ends(ax, points, "speedup", style, more, x="level")


def _became(row: dict[str, Any]) -> str:
    if units.known(row["perplexity_ratio"]):
        return f"perplexity {row['perplexity_ratio']:.4g}x"
    return f"cos {row['cosine']:.3g}" if units.known(row["cosine"]) else ""
