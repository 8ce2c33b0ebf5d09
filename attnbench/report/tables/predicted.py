"""Tables that put what was measured beside what theory says of it (`analysis.growth` and its neighbours)."""

import math
from collections.abc import Callable, Sequence

import pandas as pd

from attnbench.analysis import growth, memory, shares
from attnbench.analysis.frames import as_rows, workload_of
from attnbench.records.schema import Meta, Row
from attnbench.report import units
from attnbench.report.prepare import Panel
from attnbench.report.style import Style
from attnbench.report.tables.table import Table
from attnbench.stats.powers import BEFORE, BEYOND

MEMORIES = {"8 GiB": 2**33, "80 GB": 80 * 10**9}
"""A small computer's, and that of an A100 or H100 (whose makers count in 10^9); beside what a run was given."""

LOOSE = 4.0
"""An extrapolated length whose interval is wider than this factor says nothing."""


def tables(frame: pd.DataFrame, panels: Sequence[Panel], runs: Sequence[Meta], style: Style) -> list[Table]:
    """Measured beside predicted: those of the six tables that have rows.

    frame: all rows, as `prepare.prepared` gives them. panels: as `prepare.arrange` makes them of it.
    """
    of_panels = (_growth, _workspace, _shares, _crossings)
    found = [*(table(panels, style) for table in of_panels), _longest(panels, runs, style), _saved(frame, style)]
    return [table for table in found if table.rows]


def _whose(panel: Panel, row: Row, style: Style) -> list[str]:
    """The first two columns: the panel, with the layers where it has stacks of several, and the variant."""
    layers = f", {units.count(int(row['layers']), 'layer')}" if panel.frame["layers"].nunique() > 1 else ""
    return [panel.name + layers, style.names[row["plugin"]] if row["plugin"] else "one l x l matrix a head"]


def _growth(panels: Sequence[Panel], style: Style) -> Table:
    """A row a variant: how its operations grow, and the exponents of latency and memory."""
    quantities = ("latency", "peak memory", "workspace")
    rows = []
    for panel in panels:
        for _, fits in growth.growth(panel.frame).groupby(["plugin", "layers"], sort=False):
            fit = {str(row["quantity"]): row for row in as_rows(fits)}
            first = next(iter(fit.values()))
            powers = [text for quantity in quantities for text in _powers(fit.get(quantity))]
            over = units.lengths([first["shortest"], first["longest"]])
            rows.append([*_whose(panel, first, style), first["order"] or units.NOTHING, *powers, over])
    columns = [f"{quantity}: {kind}" for quantity in quantities for kind in ("predicted", "measured")]
    return Table(
        ["cells", "variant", "operations grow as", *columns, "fitted over"],
        rows,
        "Growth",
        text="p in l^p with the 95% interval of the fit. Predicted is the same fit to the variant's operations, to "
        "tensors with workspace, and to workspace, at the same lengths, so that terms of lower order are in both. How "
        "operations grow is taken from the two longest lengths.",
    )


def _powers(fit: Row | None) -> tuple[str, str]:
    if fit is None:
        return units.NOTHING, units.NOTHING
    theory = f"{fit['predicted']:.2f}" if units.known(fit["predicted"]) else units.NOTHING
    return theory, f"{fit['measured']:.2f} [{fit['low']:.2f}, {fit['high']:.2f}]"


def _workspace(panels: Sequence[Panel], style: Style) -> Table:
    """A row a variant: its workspace as measured over its own prediction."""
    rows = []
    for panel in panels:
        for row in as_rows(memory.workspace(panel.frame)):
            sizes = " to ".join(dict.fromkeys(units.size(row[name]) for name in ("predicted_least", "predicted_most")))
            ratio = units.ratio(row["ratio"], row["least"], row["most"])
            rows.append([*_whose(panel, row, style), sizes, ratio, str(row["cells"])])
    measured = "measured over predicted: median [least, most]"
    return Table(
        ["cells", "variant", "predicted", measured, "over cells"],
        rows,
        "Workspace",
        frozenset({measured, "over cells"}),
        "What a call holds beside inputs and output. A plugin predicts the most that it may hold, and a sweep skips "
        "cells by it: above 1x is worse than below. In a block what its other layers hold is added by formula.",
    )


def _shares(panels: Sequence[Panel], style: Style) -> Table:
    """A row a variant, a column a length: attention's share of the block's operations, time and memory."""
    found = [(panel, shares.shares(panel.frame)) for panel in panels]
    lengths = sorted({float(length) for _, table in found for length in table["length"]})
    rows = []
    for panel, table in found:
        for _, part in table.groupby("plugin", sort=False):
            of_variant = as_rows(part)
            texts = {float(row["length"]): _share(row) for row in of_variant}
            cells = [texts.get(length, units.NOTHING) for length in lengths]
            rows.append([*_whose(panel, of_variant[0], style), *cells])
    return Table(
        ["cells", "variant", *map(units.length, lengths)],
        rows,
        "Attention's share of a block",
        text="Of its operations, as predicted; then of its time, as measured, with its interval. Of operations it is "
        "what stands in place of QK^T and PV; projections count as the block's. A larger share of time than of "
        "operations means that attention computes at a lower rate than the products around it. Of memory: attention's "
        "workspace, measured alone, over the block's peak.",
    )


def _share(row: Row) -> str:
    time = units.percent(row["measured"])
    if units.known(row["low"], row["high"]):
        time += f" [{100 * row['low']:.3g}, {100 * row['high']:.3g}]"
    memory = f"; {units.percent(row['memory'])} of memory" if units.known(row["memory"]) else ""
    return f"{units.percent(row['predicted'])}; {time}{memory}"


def _crossings(panels: Sequence[Panel], style: Style) -> Table:
    """A row a crossing: the length at which attention outgrows something, predicted and measured."""
    rows = []
    for panel in panels:
        found = as_rows(growth.crossings(panel.frame))
        came = list(dict.fromkeys(row["what"] for row in found))
        for row in sorted(found, key=lambda row: came.index(row["what"])):
            cells, who = _whose(panel, row, style)
            ends = [_length(row[name], row) for name in ("measured", "low", "high")]
            measured = ends[0] if units.NOTHING in ends or len({*ends}) == 1 else f"{ends[0]} [{ends[1]}, {ends[2]}]"
            rows.append([cells, str(row["what"]), who, _length(row["predicted"], row), measured])
    return Table(
        ["cells", "crossing", "variant", "predicted at", "measured at"],
        rows,
        "Where attention outgrows the rest of a block",
        text="Lengths from which on QK^T and PV exceed the FFN, in operations (predicted) and in time (measured: of "
        "what attention leaves of the block's time, the FFN gets its part of the operations), and from which on scores "
        "take more bytes than other tensors: one matrix by formula, or the workspace of a variant that holds them. "
        "Between measured lengths they are interpolated in log-log; intervals are where the bounds of the share cross.",
    )


def _length(value: float, row: Row) -> str:
    if value == BEFORE:
        return f"below {units.length(row['shortest'])}"
    if value == BEYOND:
        return f"beyond {units.length(row['longest'])}" if units.known(row["longest"]) else "at no length"
    return _tokens(value)


def _longest(panels: Sequence[Panel], runs: Sequence[Meta], style: Style) -> Table:
    """A row a variant, two columns a memory: the longest l that fits, predicted and measured."""
    limits = [int(m) for run in runs if (m := (run.get("args") or {}).get("memory"))]
    whose = "the run's limit" if len(runs) == 1 else "the runs' least limit"
    memories = ({f"{units.size(min(limits))} ({whose})": min(limits)} if limits else {}) | MEMORIES
    rows = []
    for panel in panels:
        for _, part in memory.longest(panel.frame, memories).groupby(["plugin", "layers"], sort=False):
            found = {str(row["memory"]): row for row in as_rows(part)}
            first = next(iter(found.values()))
            texts = [text for name in memories for text in _fits(found[name])]
            rows.append([*_whose(panel, first, style), *texts])
    columns = [f"{name}: {kind}" for name in memories for kind in ("predicted", "measured")]
    return Table(
        ["cells", "variant", *columns],
        rows,
        "The longest length that fits",
        frozenset(columns),
        "Tokens at which one call's peak memory fills the memory named: inputs, output, weights, workspace, and in "
        "training what the backward pass needs. * is extrapolated beyond the longest length measured: tensors by "
        "formula, the rest by its fitted power and the interval of that (unclear where it spans more than a factor "
        f"of {LOOSE:g}). Of training, the prediction leaves out what the backward pass holds for a moment.",
    )


def _fits(row: Row) -> tuple[str, str]:
    found = row["measured"]
    if units.known(row["low"], row["high"]) and row["high"] > LOOSE * row["low"]:
        return _tokens(row["predicted"]), "unclear"
    measured = f"below {units.length(row['shortest'])}" if found == BEFORE else _tokens(found)
    if units.known(row["low"], row["high"]) and _tokens(row["low"]) != _tokens(row["high"]):
        measured += f" [{_tokens(row['low'])}, {_tokens(row['high'])}]"
    star = "*" if row["extrapolated"] and measured != units.NOTHING else ""
    return _tokens(row["predicted"]), measured + star


def _saved(frame: pd.DataFrame, style: Style) -> Table:
    """A row a variant and number of layers: what training keeps, and what inference holds."""
    columns: dict[str, Callable[[Row], str]] = {
        "layers": lambda row: str(int(row["layers"])),
        "kept: predicted": lambda row: units.size(row["predicted"]),
        "kept: measured": lambda row: units.size(row["measured"]),
        "measured over predicted": lambda row: units.ratio(row["ratio"]),
        "inference holds: predicted": lambda row: units.size(row["inference_predicted"]),
        "inference holds: measured": lambda row: units.size(row["inference"]),
    }
    rows = []
    for row in as_rows(memory.saved(frame)):
        cells = workload_of(row).replace(layers=1).label()
        rows.append([cells, style.names[row["plugin"]], *(told(row) for told in columns.values())])
    return Table(
        ["cells", "variant", *columns],
        rows,
        "Kept for the backward pass",
        frozenset(columns),
        "What the forward pass of a training step keeps beside inputs, parameters and output grows with the layers; it "
        "is predicted for exact attention, fused or with its softmax in memory. Inference throws each layer's tensors "
        "away, and what it holds at its peak beside inputs and output does not grow.",
    )


def _tokens(value: float) -> str:
    """Three digits, in the units of a report's lengths: "628", "1.87k" (of 1024), "9.31M"."""
    if not math.isfinite(value):
        return "any" if value == math.inf else units.NOTHING
    for unit, name in ((2**20, "M"), (2**10, "k")):
        if value >= unit:
            scaled = value / unit
            return f"{scaled:.{max(0, 2 - int(math.log10(scaled)))}f}{name}"
    return f"{value:.0f}"
