"""The figure of which variant is the fastest over a range of sizes, and by how much."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from scipy.ndimage import label

from attnbench.analysis.frames import as_rows
from attnbench.records.schema import Row
from attnbench.report import drawing, units
from attnbench.report.style import Style

LABELS = {
    "seq": "length (tokens)", "kv_seq": "keys (tokens)", "batch": "batch (sequences)", "heads": "heads",
    "kv_heads": "key and value heads", "head_dim": "head dim", "value_dim": "value dim", "layers": "layers",
    "phase": "phase", "mask": "mask", "dtype": "dtype",
}  # fmt: skip
_LEVELS = (0.5, 0.75, 1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10, 15, 20, 30, 50, 75, 100, 200, 500, 1000)
_MOST_LEVELS, _NONE = 6, "#e8e8e8"


@dataclass(frozen=True)
class Grid:
    """What is drawn. cells: x, y (which value of its axis, from 0), plugin ("": nothing holds the limits), speedup,
    measured, tied (another plugin that is not told apart, or "").
    """

    x: tuple[str, Sequence[object]]
    y: tuple[str, Sequence[object]] | None
    cells: pd.DataFrame
    baseline: str
    title: str
    below: str

    @property
    def is_plane(self) -> bool:
        """Whether both axes are numbers, so that there is something between two squares."""
        axes = [self.x[1], self.y[1]] if self.y else []
        return bool(axes) and all(len(values) > 1 and isinstance(values[0], int) for values in axes)

    def wide(self, column: str) -> np.ndarray:
        """(rows, columns) of one column; rows from the bottom up."""
        table = self.cells.pivot(index="y", columns="x", values=column)
        shape = range(len(self.y[1]) if self.y else 1), range(len(self.x[1]))
        return table.reindex(index=shape[0], columns=shape[1]).to_numpy()


@drawing.styled
def winners(grid: Grid, style: Style) -> Figure:
    """A square a workload, in the colour of what is fastest there, with lines of equal gain."""
    columns, rows = len(grid.x[1]), len(grid.y[1]) if grid.y else 1
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    figure = Figure(figsize=(min(11.0, max(6.4, 1.6 + 0.95 * columns)), 2.4 + 0.72 * max(rows, 1.4)), layout=layout)
    ax = figure.add_subplot()
    for cell in as_rows(grid.cells):
        _square(ax, cell, style)
    _name_regions(ax, grid, style)
    _contours(ax, grid)
    _axis(ax, "x", grid.x)
    _axis(ax, "y", grid.y)
    ax.set_xlim(-0.5, columns - 0.5)
    ax.set_ylim(-0.5, rows - 0.5)
    ax.grid(False)
    for side in ax.spines.values():
        side.set_visible(False)
    _legend(figure, grid, style)
    drawing.suptitle(figure, ", ".join(part.replace(" ", "\u00a0") for part in grid.title.split(", ")))
    ax.set_title(drawing.folded(grid.below, 100), fontsize=8.5, color=drawing.GREY)
    return figure


def _square(ax: Axes, cell: Row, style: Style) -> None:
    x, y, plugin, tied = cell["x"], cell["y"], cell["plugin"], cell["tied"]
    colour = style.colours[plugin] if plugin else _NONE
    ax.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=colour, edgecolor="white", linewidth=1.5, zorder=1))
    if tied:
        with mpl.rc_context({"hatch.linewidth": 3.0}):
            ax.add_patch(
                Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor="none", edgecolor=style.colours[tied],
                          hatch="/", linewidth=0, zorder=1.5)
            )  # fmt: skip
    if cell["measured"]:
        ax.plot([x - 0.38], [y - 0.34], marker="o", markersize=4.5, color="white", markeredgecolor="#333333",
                markeredgewidth=0.8, zorder=5)  # fmt: skip


def _outlined(colour: str = "white", width: float = 2.5) -> list[patheffects.AbstractPathEffect]:
    return [patheffects.withStroke(linewidth=width, foreground=colour)]


def _name_regions(ax: Axes, grid: Grid, style: Style) -> None:
    """Each connected region's name, in the square of it that is nearest to its middle."""
    plugins = grid.wide("plugin")
    for plugin in sorted({str(p) for p in plugins.ravel() if p}):
        regions, count = label(plugins == plugin)
        for number in range(1, count + 1):
            where = np.argwhere(regions == number)
            middle = where[((where - where.mean(axis=0)) ** 2).sum(axis=1).argmin()]
            dark = sum(to_rgb(style.colours[plugin])) < 1.5
            ax.text(middle[1], middle[0] + 0.2, style.figure_name(plugin), ha="center", va="center", fontsize=10,
                    fontweight="bold", color="white" if dark else "#111111", zorder=6,
                    path_effects=_outlined(style.colours[plugin], 3))  # fmt: skip


def _contours(ax: Axes, grid: Grid) -> None:
    gains = grid.wide("speedup").astype(float)
    known = gains[np.isfinite(gains)]
    if not grid.is_plane or not len(known):
        for cell in as_rows(grid.cells):
            if units.known(cell["speedup"]):
                ax.text(cell["x"], cell["y"] - 0.15, f"{cell['speedup']:.2g}x", ha="center", va="center",
                        path_effects=_outlined(), zorder=6)  # fmt: skip
        return
    levels = [level for level in _LEVELS if known.min() < level < known.max()]
    while len(levels) > _MOST_LEVELS:
        levels = levels[::2]
    if levels:
        xs, ys = (np.array([-0.5, *range(n), n - 0.5]) for n in gains.shape[::-1])
        lines = ax.contour(xs, ys, _to_the_edges(np.log(gains)), levels=np.log(levels), colors="#111111",
                           linewidths=1.4, zorder=4)  # fmt: skip
        lines.set_path_effects(_outlined(width=3))
        texts = ax.clabel(lines, fmt={float(np.log(v)): f"{v:g}x" for v in levels}, fontsize=9.5, inline=False)
        for text in texts:
            text.set(path_effects=_outlined(), zorder=6, rotation=0)


def _to_the_edges(values: np.ndarray) -> np.ndarray:
    """Values in the middles of squares, carried on by half a square on every side as they change there."""
    for _ in range(2):
        first, last = values[:1], values[-1:]
        values = np.concatenate([1.5 * first - 0.5 * values[1:2], values, 1.5 * last - 0.5 * values[-2:-1]]).T
    return values


def _axis(ax: Axes, which: str, axis: tuple[str, Sequence[object]] | None) -> None:
    name, values = axis or ("", [""])
    texts = [units.length(value) if isinstance(value, int) and "seq" in name else str(value) for value in values]
    if which == "x":
        ax.set_xticks(range(len(texts)), texts)
        ax.set_xlabel(LABELS.get(name, name))
    else:
        ax.set_yticks(range(len(texts)), texts)
        ax.set_ylabel(LABELS.get(name, name))
    ax.tick_params(length=0)


def _legend(figure: Figure, grid: Grid, style: Style) -> None:
    cells = grid.cells
    present = [plugin for plugin in style.plugins if plugin in {*cells["plugin"], *cells["tied"]}]
    handles: list[Patch | Line2D] = [Patch(color=style.colours[p], label=style.figure_name(p)) for p in present]
    if cells["plugin"].eq("").any():
        handles.append(Patch(color=_NONE, label="nothing holds the limits"))
    if cells["tied"].ne("").any():
        striped = "striped: the two are not told apart"
        handles.append(Patch(facecolor="white", edgecolor=drawing.GREY, hatch="///", label=striped))
    measured = "measured; all else is predicted"
    handles.append(Line2D([], [], color="white", marker="o", markeredgecolor="#333333", label=measured))
    gain = f"so many times as fast as {grid.baseline}"
    if grid.is_plane:
        handles.append(Line2D([], [], color="#111111", linewidth=1.3, label=gain))
    else:
        handles.append(Line2D([], [], color="#111111", linestyle="", marker="$2x$", markersize=11, label=gain))
    longest = max(len(str(handle.get_label())) for handle in handles) + 8
    columns = max(1, int(13 * figure.get_figwidth() // longest))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)
    figure.set_figheight(figure.get_figheight() + drawing.LINE * -(-len(handles) // columns))


@drawing.styled
def save(figure: Figure, path: Path) -> None:
    """Writes it in the format that the name ends with; the same figure gives the same bytes every time."""
    drawing.lay_out(figure)
    blank = {"Software": None} if path.suffix.lower() == ".png" else {"Date": None, "Creator": None}
    figure.savefig(path, dpi=130, metadata=blank)
