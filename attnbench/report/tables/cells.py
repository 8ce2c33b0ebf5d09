"""Tables of cells: results, what the GPU did, what has no number and why, and the commands that repeat each."""

from collections.abc import Callable, Sequence
from typing import Any

from attnbench.analysis.frames import as_rows, finished
from attnbench.records.schema import Row
from attnbench.report import units
from attnbench.report.prepare import GRADIENTS, Panel
from attnbench.report.repeat import repeat_command
from attnbench.report.style import Style
from attnbench.report.tables.table import Table, by_row
from attnbench.workload import DEVICES


def results(panel: Panel, style: Style) -> Table:
    """One row a finished cell; columns in which no row has anything to say are left out."""
    columns: dict[str, Callable[[Row], str]] = {
        "latency (median, 95%)": lambda row: units.seconds(*(row[f"latency{end}_s"] for end in ("", "_low", "_high"))),
        "speedup (95%)": lambda row: units.ratio(row["speedup"], row["speedup_low"], row["speedup_high"]),
        "peak memory": lambda row: units.size(row["peak_bytes"]),
        "workspace": lambda row: units.size(row["workspace_bytes"]),
        "saved": lambda row: units.size(row["saved_bytes"]),
        "state": lambda row: units.size(row["cache_bytes"]),
        "implementation error": lambda row: units.error(row["implementation_rel_l2"]),
        "gradient error": lambda row: units.error(
            max((row[n] for n in GRADIENTS if units.known(row[n])), default=None)
        ),
        "approximation error": lambda row: units.error(row["approximation_rel_l2"]),
        "rate": lambda row: units.rate(row["flops_per_s"]),
        "of attainable": lambda row: units.percent(row["roofline_fraction"]),
        "density": lambda row: units.percent(row["density"]),
        "set-up": lambda row: units.seconds(row["setup_s"]),
        "rounds": _rounds,
    }
    return by_row(panel, as_rows(finished(panel.frame)), style, columns)


def on_the_gpu(panel: Panel, style: Style) -> Table:
    """One row a cell that a GPU finished: how it was timed, and what the GPU said of itself at its start and end."""
    rows = [row for row in as_rows(finished(panel.frame)) if not DEVICES[row["device"]].host]
    columns: dict[str, Callable[[Row], str]] = {
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
        "other processes": lambda row: _both_ends(row, "other_processes", _told),
    }
    return by_row(panel, rows, style, columns)


def _told(value: Any) -> str:
    """A text, or a whole number."""
    if isinstance(value, str):
        return value or units.NOTHING
    return str(int(value)) if units.known(value) else units.NOTHING


def _both_ends(row: Row, name: str, text: Callable[[Any], str]) -> str:
    """What the GPU said at the cell's start and end."""
    ends = [text(row[f"{end}_{name}"]) for end in ("start", "end")]
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


def _rounds(row: Row) -> str:
    return _told(row["rounds"]) + ("" if row["converged"] else ", not converged")


def commands(panel: Panel, style: Style) -> str:
    """For each row, finished or not, a comment and the command that repeats it."""
    lines = []
    for row in as_rows(panel.frame):
        state = "" if row["status"] == "ok" else f" ({row['status']})"
        lines += [f"# {_where(row, style)}{state}", repeat_command(row)]
    return "\n".join(lines)


def _where(row: Row, style: Style) -> str:
    return f"{style.names[row['plugin']]} at {units.length(row['length'])}"


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
                of = f", {panel.title}" if panel.title else ""
                kept.append((_where(row, style) + of, row["traceback"]))
    return kept
