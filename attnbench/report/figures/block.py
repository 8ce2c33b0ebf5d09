"""The figures of the transformer block: attention's share of its time, and what a speedup comes to in it."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from attnbench.report import drawing, scales
from attnbench.report.prepare import Panel
from attnbench.report.style import Style

READ_SHARE = (
    "Latency of attention alone over that of the transformer block around it; the rest is projections, FFN and "
    "norms, which no faster attention can shorten. The two are measured one after the other, so where a variant's "
    "latency varies from minute to minute a share may even pass 100%; its interval says how far to trust it."
)

READ_AMDAHL = (
    "Solid: the block's speedup over the baseline's block, as measured. Dotted: what Amdahl's law makes of the "
    "speedup of attention alone and of attention's share of the baseline's block. Where the solid line lies lower, "
    "the variant costs the rest of the block something: caches, or the layout of its output; or the machine was "
    "slower while attention alone was measured than while the block was."
)

_PREDICTED = Line2D([], [], color=drawing.GREY, linestyle=":", linewidth=1.4, label="by Amdahl's law")


def _fill_share(ax: Axes, panel: Panel, style: Style, _: Sequence[Panel]) -> None:
    columns = ["share", "share_low", "share_high"]
    rows = drawing.drawable(panel.frame, "share")
    rows = rows.assign(**100 * rows[columns])
    drawing.lines(ax, rows, style, *columns)
    ax.set_ylim(0, max(100.0, 1.05 * np.nanmax(rows[["share", "share_high"]])))
    drawing.against_length(ax, panel, "share of the block's time (%)")


def _fill_amdahl(ax: Axes, panel: Panel, style: Style, _: Sequence[Panel]) -> None:
    rows, columns = drawing.drawable(panel.frame, "amdahl"), ["speedup", "speedup_low", "speedup_high"]
    drawing.lines(ax, rows, style, *columns, more=drawing.ratios(rows, "speedup"))
    for plugin, part in rows.groupby("plugin"):
        ax.plot(part["length"], part["amdahl"], color=style.colours[str(plugin)], linestyle=":", linewidth=1.4)
    scales.ratio_axis(ax, *drawing.ends([pd.Series([1.0]), rows[[*columns, "amdahl"]]]))
    ax.axhline(1.0, color=drawing.GREY, linewidth=1, zorder=1)
    drawing.against_length(ax, panel, f"block's speedup over {drawing.baseline_name(rows, style)}", always=True)


attention_share = partial(drawing.draw, title="Attention's share of the block's time", column="share", fill=_fill_share)
"""Attention's share of the block's time against length. The frames carry share, share_low and share_high."""

amdahl = partial(
    drawing.draw, title="What survives in the block", column="amdahl", fill=_fill_amdahl, extra=[_PREDICTED]
)
"""The block's speedup, measured and after Amdahl's law, against length. The frames carry amdahl."""
