"""Words at the data: names at the ends of lines, and the line below the axes for what has no number."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.transforms import ScaledTranslation
from scipy.optimize import isotonic_regression

from attnbench.analysis.frames import as_rows, finished
from attnbench.report import units
from attnbench.report.prepare import Panel
from attnbench.report.style import Style

GREY = "#555555"
_SIZE = 8  # points
_END, _BELOW = "end of a line", "no number"


def ink(colour: str) -> tuple[float, float, float]:
    """The colour, darkened until letters in it can be read on white (a contrast of 4.5)."""
    red, green, blue = to_rgb(colour)
    while _luminance(red, green, blue) > 0.183:
        red, green, blue = 0.95 * red, 0.95 * green, 0.95 * blue
    return red, green, blue


def _luminance(*channels: float) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(np.dot((0.2126, 0.7152, 0.0722), linear))


def at_ends(
    ax: Axes,
    rows: pd.DataFrame,
    y: str,
    style: Style,
    more: Mapping[str, str] = MappingProxyType({}),
    x: str = "length",
) -> None:
    """Each line's name to the right of the axes, joined to its last point. `spread` must follow, after the layout.

    rows: those drawn, sorted by length. more: what stands behind a plugin's name.
    """
    for plugin, part in rows.dropna(subset=[y]).groupby("plugin"):
        name, last = str(plugin), part.iloc[-1]
        ax.annotate(
            " ".join(filter(None, [style.figure_name(name), more.get(name, "")])),
            (last[x], last[y]),
            (1.02, 0.5),
            textcoords="axes fraction",
            va="center",
            fontsize=_SIZE,
            color=ink(style.colours[name]),
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": style.colours[name], "linewidth": 0.6, "alpha": 0.7,
                        "relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 4},
            gid=_END,
        )  # fmt: skip


def spread(figure: Figure) -> None:
    """Moves the names at ends to the height of their points, and apart where they would cover each other."""
    for ax in figure.axes:
        found = [text for text in ax.texts if isinstance(text, Annotation) and text.get_gid() == _END]
        if not found:
            continue
        height = ax.get_window_extent().height
        step = 1.3 * _SIZE * figure.dpi / 72 / height  # of the axes' height, a line of text
        points = [float(ax.transAxes.inverted().transform(ax.transData.transform(text.xy))[1]) for text in found]
        for text, place in zip(found, _apart(points, step), strict=True):
            text.set_position((1.02, place))


def _apart(places: Sequence[float], step: float) -> list[float]:
    """Places at least `step` from each other, in their order and as near to where they were as can be."""
    order = np.argsort(places, kind="stable")
    room = step * np.arange(len(places))
    moved = isotonic_regression(np.asarray(places)[order] - room).x
    # Within the axes, where they are not too many for that.
    moved = np.clip(moved, min(0.0, 1 - room[-1]), max(0.0, 1 - room[-1])) + room
    placed = np.empty(len(places))
    placed[order] = moved
    return [float(place) for place in placed]


def below(ax: Axes, panel: Panel, style: Style) -> None:
    """What has no number in one line below the axes, and why, so that a line that ends says that it ends."""
    width = int(panel_width(ax) * 13)  # characters
    if told := missing(panel, style, width):
        place = ax.transAxes + ScaledTranslation(0, -40 / 72, ax.figure.dpi_scale_trans)
        ax.text(0, 0, told.replace("$", r"\$"), transform=place, va="top", fontsize=_SIZE, color=GREY, gid=_BELOW)


def panel_width(ax: Axes) -> float:
    """Inches that axes have with all that is around them."""
    figure, spec = ax.get_figure(root=True), ax.get_subplotspec()
    return (figure.get_figwidth() if figure else 0.0) / (spec.get_gridspec().ncols if spec else 1)


def missing(panel: Panel, style: Style, width: int) -> str:
    """ "no number: naive 16k (skipped: 17 GiB are over 12 GiB)"; reasons, then names, go where it is too long."""
    told = [_whose(group, panel, style) for _, group in _gone(panel).groupby(["plugin", "status"], sort=False)]
    if not told:
        return ""
    for long in (True, False):
        line = "no number: " + ", ".join(with_reason if long else short for short, with_reason in told)
        if len(line) <= width:
            return line
    kept = [short for short, _ in told]
    while len(kept) > 1 and len(line) > width:
        kept.pop()
        line = f"no number: {', '.join(kept)} and {len(told) - len(kept)} more (see the tables)"
    return line


def _whose(group: pd.DataFrame, panel: Panel, style: Style) -> tuple[str, str]:
    """Without its reason, and with it."""
    first, lengths = as_rows(group.head(1))[0], sorted(set(group["length"]))
    everywhere = len(lengths) == panel.frame["length"].nunique()
    name = style.figure_name(first["plugin"]).replace(r"\$", "$") + ("" if everywhere else f" {units.lengths(lengths)}")
    reason = first["reason"] if isinstance(first["reason"], str) and first["reason"] else ""
    reason = " ".join(reason.split())
    return f"{name} ({first['status']})", f"{name} ({first['status']}{f': {reason}' if reason else ''})"


def _gone(panel: Panel) -> pd.DataFrame:
    """A panel's cells without a number."""
    return panel.frame.drop(index=finished(panel.frame).index)
