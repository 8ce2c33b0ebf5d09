"""A map as a picture and as a table for a terminal."""

from __future__ import annotations

from pathlib import Path

from attnbench.advice.map import Chart, Spot
from attnbench.errors import AttnbenchError
from attnbench.records.run import as_frame
from attnbench.records.schema import Row
from attnbench.report import units
from attnbench.report.names import short_names
from attnbench.workload import Workload

FORMATS = (".png", ".svg")


def check(path: Path) -> None:
    """Raises: AttnbenchError: a picture can't be drawn there, said before anything is measured."""
    if path.suffix.lower() not in FORMATS:
        raise AttnbenchError(f"--map {str(path)!r}: a picture's name ends with {' or '.join(FORMATS)}")
    if path.is_dir() or not path.parent.is_dir():
        raise AttnbenchError(f"--map {str(path)!r}: {path.parent} is no folder, or the picture would be one")


def draw(chart: Chart, path: Path) -> None:
    """Writes the picture.

    Raises:
        AttnbenchError: it can't be written.
    """
    import pandas as pd

    from attnbench.report.figures import map as figure
    from attnbench.report.prepare import machine_name
    from attnbench.report.style import Style

    plugins = as_frame(
        [{"plugin": p, "variant": variant, "family": chart.families[p]} for p, variant in chart.variants.items()]
    )
    x, y = chart.axes[0], chart.axes[1] if len(chart.axes) > 1 else None
    cells = pd.DataFrame([_square(chart, spot) for spot in chart.spots])
    grid = figure.Grid(
        (x.name, x.values),
        (y.name, y.values) if y else None,
        cells,
        short_names(chart.variants)[chart.baseline],
        "Which variant is the fastest: " + common(chart),
        f"{machine_name({'machine': dict(chart.machine)})}: {effort(chart)}",
    )
    try:
        figure.save(figure.winners(grid, Style.of(plugins)), path)
    except OSError as error:
        raise AttnbenchError(f"can't write {path}: {error.strerror}") from None


def _square(chart: Chart, spot: Spot) -> Row:
    places = [axis.values.index(value) for axis, value in zip(chart.axes, spot.at, strict=True)]
    x, y = (*places, 0)[:2]
    told: Row = {"plugin": spot.plugin or "", "speedup": spot.speedup, "measured": spot.measured}
    return {"x": x, "y": y} | told | {"tied": spot.tied[0] if spot.tied else ""}


def common(chart: Chart) -> str:
    """What all workloads share, and the limits."""
    w, axes = chart.spots[0].workload, {axis.name for axis in chart.axes}
    words = {
        "phase": "" if w.phase == "forward" else w.phase,
        "scope": "attention" if w.scope == "attention" else f"{w.block} block",
        "mask": f"{w.mask} mask",
        "dtype": w.dtype,
        "batch": f"batch {w.batch}",
        "seq": _length(w),
        "heads": _heads(w, axes),
        "head_dim": f"head dim {w.head_dim}",
    }
    if "kv_seq" in axes:
        words["seq"] = units.count(w.seq, "query", "queries")
    limits = []
    if chart.limits.error is not None:
        limits.append(f"error against exact attention at most {chart.limits.error:g}")
    if chart.limits.memory is not None:
        limits.append(f"memory at most {units.size(chart.limits.memory)}")
    return ", ".join([*(word for name, word in words.items() if word and name not in axes), *limits])


def _length(w: Workload) -> str:
    return f"length {w.kv_seq}" if w.seq == w.kv_seq else f"{units.count(w.seq, 'query', 'queries')}, {w.kv_seq} keys"


def _heads(w: Workload, axes: set[str]) -> str:
    heads = units.count(w.heads, "head")
    return heads if w.kv_heads == w.heads or "kv_heads" in axes else f"{heads} on {units.count(w.kv_heads, 'kv head')}"


def effort(chart: Chart) -> str:
    """How much of it was measured, and in how long."""
    every = units.count(len(chart.spots), "workload")
    return f"{chart.measured} of {every} measured, in {chart.seconds:.0f} s"


def table(chart: Chart) -> tuple[list[str], list[list[str]]]:
    """Heads and rows: the first axis across, the other one down; in each cell the fastest and its gain."""
    names, across = short_names(chart.variants), chart.axes[0]
    down = chart.axes[1] if len(chart.axes) > 1 else None
    spots = {spot.at: spot for spot in chart.spots}
    body = []
    for value in down.values if down else [None]:
        ats = [(each, value) if down else (each,) for each in across.values]
        body.append([str(value) if down else "fastest", *(_cell(spots.get(at), names) for at in ats)])
    corner = f"{down.name} \\ {across.name}" if down else across.name
    return [corner, *map(str, across.values)], body


def _cell(spot: Spot | None, names: dict[str, str]) -> str:
    if spot is None or spot.plugin is None:
        return "none" if spot else ""
    marks = ("" if spot.measured else "~") + ("=" if spot.tied else "")
    return f"{names[spot.plugin]}\n{units.ratio(spot.speedup)}{marks and ' ' + marks}"
