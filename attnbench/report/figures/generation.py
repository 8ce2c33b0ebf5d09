"""The figure of two-phase inference: seconds for each new token with a cache and without, and all of them together."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from attnbench.report import drawing, scales
from attnbench.report.style import Style

_WAYS = {"without_s": "--", "with_s": "-"}


@drawing.styled
def generation(results: Sequence[Mapping[str, Any]], prompt: int, title: str) -> Figure:
    """results: one a plugin, with "plugin", "variant", "prompt_s", "with_s" and "without_s"."""
    style = Style.of(pd.DataFrame(results)[["plugin", "variant"]])
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    axes = figure.subplots(1, 2)
    for result in results:
        tokens = range(prompt + 1, prompt + 1 + len(result["with_s"]))
        colour = style.colours[result["plugin"]]
        for way, line in _WAYS.items():
            axes[0].plot(tokens, result[way], line, color=colour)
            axes[1].plot(tokens, [result["prompt_s"] + s for s in accumulate(result[way])], line, color=colour)
    _finish(axes[0], "seconds for one token", [s for r in results for w in _WAYS for s in r[w]])
    totals = [s for r in results for w in _WAYS for s in (r["prompt_s"] + r[w][0], r["prompt_s"] + sum(r[w]))]
    _finish(axes[1], "seconds since the prompt began", totals)
    handles = [Line2D([], [], color=style.colours[p], label=style.figure_name(p)) for p in style.plugins]
    handles.append(Line2D([], [], color=drawing.GREY, linestyle="-", label="with a cache"))
    handles.append(Line2D([], [], color=drawing.GREY, linestyle="--", label="without: all tokens again"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)))
    figure.suptitle(title)
    return figure


def _finish(ax: Axes, label: str, seconds: Sequence[float]) -> None:
    scales.time_axis(ax, min(seconds), max(seconds))
    ax.set_xlabel("tokens so far, prompt included")
    ax.set_ylabel(label)
