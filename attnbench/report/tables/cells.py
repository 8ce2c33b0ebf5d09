"""Tables of cells: results, what the GPU did, what has no number and why, and the commands that repeat each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from attnbench.analysis.frames import as_rows, finished
from attnbench.records.schema import Row
from attnbench.report import units
from attnbench.report.prepare import GRADIENTS, Panel
from attnbench.report.repeat import repeat_command
from attnbench.report.style import Style
from attnbench.report.tables.table import Table, by_row


def results(panel: Panel, style: Style) -> Table:
    """One row a finished cell; columns in which no row has anything to say are left out."""
    rows = as_rows(finished(panel.frame))
    columns: dict[str, Callable[[Row], str]] = {
        panel.axis: lambda row: units.length(row["length"]),
        "variant": lambda row: style.names[row["plugin"]],
        "latency (median, 95%)": _latency,
        "speedup (95%)": lambda row: units.ratio(row["speedup"], row["speedup_low"], row["speedup_high"]),
        "peak memory": lambda row: units.size(row["peak_bytes"]),
        "workspace": lambda row: units.size(row["workspace_bytes"]),
        "saved": lambda row: units.size(row["saved_bytes"]),
        "state": lambda row: units.size(row["cache_bytes"]),
        "implementation error": lambda row: units.error(row["implementation_rel_l2"]),
        "gradient error": lambda row: units.error(max((row[name] for name in GRADIENTS), key=_known)),
        "approximation error": lambda row: units.error(row["approximation_rel_l2"]),
        "rate": lambda row: units.rate(row["flops_per_s"]),
        "of attainable": lambda row: units.percent(row["roofline_fraction"]),
        "density": lambda row: units.percent(row["density"]),
        "set-up": lambda row: units.seconds(row["setup_s"]),
        "rounds": _rounds,
    }
    return by_row(rows, columns, panel.heading)


def on_the_gpu(panel: Panel, style: Style) -> Table:
    """One row a cell that a GPU finished: how it was timed, and what the GPU said of itself at its start and end."""
    rows = [row for row in as_rows(finished(panel.frame)) if row["device"] == "cuda"]
    columns: dict[str, Callable[[Row], str]] = {
        panel.axis: lambda row: units.length(row["length"]),
        "variant": lambda row: style.names[row["plugin"]],
        "timed by": lambda row: _told(row["timing"]),
        "latency": lambda row: units.seconds(row["latency_s"]),
        "wall time": lambda row: units.seconds(row["wall_s"]),
        "energy a call": lambda row: units.energy(row["energy_j"]),
        "reserved": lambda row: units.size(row["reserved_bytes"]),
        "process": lambda row: units.size(row["process_bytes"]),
        "clock": lambda row: _both_ends(row, "clock_hz", units.frequency),
        "memory clock": lambda row: _both_ends(row, "memory_clock_hz", units.frequency),
        "power": lambda row: _both_ends(row, "power_w", units.power),
        "cap": lambda row: _both_ends(row, "power_cap_w", units.power),
        "temperature": lambda row: _both_ends(row, "temperature_c", units.temperature),
        "held down by": lambda row: _both_ends(row, "throttled", _told),
        "other processes": lambda row: _both_ends(row, "other_processes", _number),
    }
    return by_row(rows, columns, panel.heading)


def _known(value: float) -> float:
    return value if units.known(value) else -1.0


def _latency(row: Row) -> str:
    return units.seconds(row["latency_s"], row["latency_low_s"], row["latency_high_s"])


def _told(text: Any) -> str:
    return text if isinstance(text, str) and text else units.NOTHING


def _number(value: float) -> str:
    return str(int(value)) if units.known(value) else units.NOTHING


def _both_ends(row: Row, name: str, text: Callable[[Any], str]) -> str:
    """What the GPU said at the cell's start and end."""
    ends = [text(row[f"{end}_{name}"]) for end in ("start", "end")]
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


def _rounds(row: Row) -> str:
    rounds = str(int(row["rounds"])) if units.known(row["rounds"]) else units.NOTHING
    return rounds if row["converged"] else f"{rounds}, not converged"


def commands(panel: Panel, style: Style) -> str:
    """For each row, finished or not, a comment and the command that repeats it."""
    lines = []
    for row in as_rows(panel.frame):
        state = "" if row["status"] == "ok" else f" ({row['status']})"
        lines += [f"# {style.names[row['plugin']]} at {units.length(row['length'])}{state}", repeat_command(row)]
    return "\n".join(lines)


def missing(panels: Sequence[Panel], style: Style) -> Table:
    """Every cell without a number, and why."""
    rows = []
    for panel in panels:
        for row in as_rows(panel.frame.drop(index=finished(panel.frame).index)):
            reason = row["reason"] if isinstance(row["reason"], str) and row["reason"] else "no reason was recorded"
            name, length = style.names[row["plugin"]], units.length(row["length"])
            rows.append([panel.name, length, name, str(row["status"]), reason])
    return Table(["cells", "length", "variant", "status", "reason"], rows, numeric=frozenset({"length"}))


def tracebacks(panels: Sequence[Panel], style: Style) -> list[tuple[str, str]]:
    """(whose, text) of every traceback that was kept."""
    kept = []
    for panel in panels:
        for row in as_rows(panel.frame):
            if isinstance(row["traceback"], str) and row["traceback"]:
                where = f"{style.names[row['plugin']]} at {units.length(row['length'])}"
                kept.append((f"{where}, {panel.title}" if panel.title else where, row["traceback"]))
    return kept
