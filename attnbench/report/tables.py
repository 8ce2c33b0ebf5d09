"""The tables of a report, as plain text: how they are escaped is the page's business."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from attnbench.analysis import compare
from attnbench.analysis.rows import Row, finished, records
from attnbench.report import units
from attnbench.report.panels import Panel, command_line
from attnbench.report.repeat import repeat_command
from attnbench.report.style import Style
from attnbench.report.verdict import listed, warning_kinds
from attnbench.stats.doubts import explain

GRADIENTS = tuple(f"{name}_gradient_rel_l2" for name in ("query", "key", "value", "gate"))
ERROR_BOUND = 0.01
"""One column names the fastest variant whose approximation error (relative l2) is at most this."""


@dataclass(frozen=True)
class Table:
    """Rows of text under columns of text. numeric: the columns that are set flush right."""

    columns: list[str]
    rows: list[list[str]]
    title: str = ""
    numeric: frozenset[str] = field(default_factory=frozenset)


def best_by_length(panel: Panel, style: Style) -> Table:
    """Per length: the fastest exact variant, the fastest within the error bound, and the fastest whatever its error."""
    rows = []
    for length, cell in panel.frame.groupby("length"):
        error, is_exact = cell["approximation_rel_l2"], cell["family"] == "exact"
        candidates = (cell[is_exact], cell[(error <= ERROR_BOUND) | (error.isna() & is_exact)], cell)
        exact, close, fastest = (_best(rows_, style) for rows_ in candidates)
        answers = [exact, *(_unless_same(*pair) for pair in ((close, exact), (fastest, close)))]
        rows.append([units.length(float(str(length))), *answers])
    bound = units.percent(ERROR_BOUND)
    return Table([panel.axis, "fastest exact", f"fastest within {bound} error", "fastest of all"], rows, panel.heading)


def _unless_same(answer: str, before: str) -> str:
    return "the same" if answer == before != units.NOTHING else answer


def _best(rows: pd.DataFrame, style: Style) -> str:
    found = compare.fastest(rows)
    if not found:
        return units.NOTHING
    best = found.row
    facts = [units.seconds(best["latency_s"])]
    if best["plugin"] != best["baseline"] and units.known(best["speedup"]):
        facts.append(units.ratio(best["speedup"], best["speedup_low"], best["speedup_high"]))
    if best["family"] != "exact" and units.known(best["approximation_rel_l2"]):
        facts.append(f"error {units.error(best['approximation_rel_l2'])}")
    tail = f"; not told apart from {listed([style.names[name] for name in found.tied])}" if found.tied else ""
    tail += "" if found.certain else "; no interval"
    return f"{style.names[best['plugin']]}: {', '.join(facts)}{tail}"


def average_speedups(panels: Sequence[Panel], style: Style) -> Table:
    """Geometric means over what all finished, with how many cells of how many."""
    rows = []
    for panel in panels:
        found = compare.averages(panel.frame)
        over = f"{found.cells} of {found.of}"
        for plugin, mean in sorted(found.speedups.items(), key=lambda item: -item[1]):
            rows.append([panel.name, style.names[plugin], units.ratio(mean), over])
        if not found.speedups:
            rows.append([panel.name, "none: no cell was finished by all", units.NOTHING, over])
        rows += [[panel.name, style.names[plugin], units.NOTHING, "finished none"] for plugin in found.absent]
    return Table(["cells", "variant", "mean speedup", "over cells"], rows, numeric=frozenset({"mean speedup"}))


def results(panel: Panel, style: Style) -> Table:
    """One row a finished cell; columns in which no row has anything to say are left out."""
    rows = records(finished(panel.frame))
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
    return _by_row(rows, columns, panel.heading)


def on_the_gpu(panel: Panel, style: Style) -> Table:
    """One row a cell that a GPU finished: how it was timed, and what the GPU said of itself at its start and end."""
    rows = [row for row in records(finished(panel.frame)) if row["device"] == "cuda"]
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
    return _by_row(rows, columns, panel.heading)


def _by_row(rows: Sequence[Row], columns: dict[str, Callable[[Row], str]], title: str) -> Table:
    """Columns of text, without those in which no row has anything to say; the run's name where there are several."""
    if len({row["run"] for row in rows}) > 1:
        columns["run"] = lambda row: str(row["run"])
    body = {name: [text(row) for row in rows] for name, text in columns.items()}
    shown = [name for name, texts in body.items() if set(texts) != {units.NOTHING}]
    table = [list(row) for row in zip(*(body[name] for name in shown), strict=True)]
    return Table(shown, table, title, frozenset(shown) - {"variant", "timed by", "held down by", "run"})


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
    for row in records(panel.frame):
        state = "" if row["status"] == "ok" else f" ({row['status']})"
        lines += [f"# {style.names[row['plugin']]} at {units.length(row['length'])}{state}", repeat_command(row)]
    return "\n".join(lines)


def missing(panels: Sequence[Panel], style: Style) -> Table:
    """Every cell without a number, and why."""
    rows = []
    for panel in panels:
        for row in records(panel.frame.drop(index=finished(panel.frame).index)):
            reason = row["reason"] if isinstance(row["reason"], str) and row["reason"] else "no reason was recorded"
            name, length = style.names[row["plugin"]], units.length(row["length"])
            rows.append([panel.name, length, name, str(row["status"]), reason])
    return Table(["cells", "length", "variant", "status", "reason"], rows, numeric=frozenset({"length"}))


def tracebacks(panels: Sequence[Panel], style: Style) -> list[tuple[str, str]]:
    """(whose, text) of every traceback that was kept."""
    kept = []
    for panel in panels:
        for row in records(panel.frame):
            if isinstance(row["traceback"], str) and row["traceback"]:
                where = f"{style.names[row['plugin']]} at {units.length(row['length'])}"
                kept.append((f"{where}, {panel.title}" if panel.title else where, row["traceback"]))
    return kept


def warnings(frame: pd.DataFrame, style: Style) -> Table:
    """Each kind of warning with how many cells carry it, whose they are, and advice."""
    carriers: dict[str, list[str]] = {}
    for row in records(frame):
        for kind in warning_kinds(row["warnings"]):
            carriers.setdefault(kind, []).append(style.names[row["plugin"]])
    found = sorted(carriers.items(), key=lambda item: (-len(item[1]), item[0]))
    rows = []
    for kind, names in found:
        rows.append([kind, str(len(names)), ", ".join(sorted(set(names))), *explain(kind)])
    return Table(["warning", "cells", "variants", "what it means", "what to do"], rows, numeric=frozenset({"cells"}))


def variants(frame: pd.DataFrame, style: Style) -> Table:
    """Each short name with what stands behind it."""
    rows = []
    for plugin in style.plugins:
        part = frame[frame["plugin"] == plugin]
        done = f"{len(finished(part))} of {len(part)}"
        facts = [_distinct(part[name]) for name in ("family", "implementation", "distribution")]
        rows.append([style.names[plugin], plugin, *facts, done])
    return Table(["variant", "plugin", "family", "what ran", "from", "cells finished"], rows)


def _distinct(values: pd.Series) -> str:
    return "; ".join(dict.fromkeys(str(value) for value in values.dropna() if value != "")) or units.NOTHING


def pull_request(panels: Sequence[Panel], style: Style) -> list[Table]:
    """Per panel each variant's latency and speedup at each length, small enough for a comment."""
    tables = []
    for panel in panels:
        lengths = sorted(set(panel.frame["length"]))
        body = []
        for plugin in style.plugins:
            cells = {row["length"]: _short(row) for row in records(panel.frame[panel.frame["plugin"] == plugin])}
            if cells:
                body.append([style.names[plugin], *(cells.get(length, "not asked for") for length in lengths)])
        where = ", ".join(part for part in (panel.title, panel.shared) if part)
        tables.append(Table(["variant", *map(units.length, lengths)], body, where))
    return tables


def _short(row: Row) -> str:
    if row["status"] != "ok" or not units.known(row["latency_s"]):
        return str(row["status"])
    latency, speedup = units.seconds(row["latency_s"]), row["speedup"]
    if row["plugin"] == row["baseline"] or not units.known(speedup):
        return latency
    return f"{latency}, {units.ratio(speedup, row['speedup_low'], row['speedup_high'])}"


def run_facts(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """All that is known about one run and its machine, in pairs of name and text."""
    machine = {name: value for name, value in (run.get("machine") or {}).items() if name != "gpu_state"}
    facts = {
        "command": command_line(run),
        "started": run.get("started"),
        "finished": run.get("finished") or "not finished: the rows are those measured so far",
        "wall time": _wall(run.get("seconds") or {}),
        **machine,
        "plugins from": run.get("distributions"),
    }
    spelled = {"cpu": "CPU", "gpu": "GPU", "cuda": "CUDA", "python": "Python", "memory_bytes": "memory"}
    told = [(spelled.get(name, name.replace("_", " ")), _text(name, value)) for name, value in facts.items()]
    return [(name, text) for name, text in told if text]


def _wall(seconds: Mapping[str, Any]) -> str:
    """ "344 s: 70% in calls of the variants, 9% in compilation, 21% elsewhere (overhead)" """
    wall = seconds.get("wall")
    if not wall or not units.known(wall):
        return "unknown"
    named = {"calls": "in calls of the variants", "compilation": "in compilation", "elsewhere": "elsewhere (overhead)"}
    known = {text: seconds[name] for name, text in named.items() if seconds.get(name) is not None}
    shares = ", ".join(f"{value / wall:.0%} {text}" for text, value in known.items())
    return f"{wall:.0f} s" + (f": {shares}" if shares else "")


def _text(name: str, value: Any) -> str:
    """A value of run.json as text; under a name that ends in _bytes, numbers are sizes."""
    if value is None or value == "" or value == [] or value == {}:
        return ""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(name, each)}" for key, each in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_text(name, each) for each in value)
    return units.size(value) if name.endswith("_bytes") and isinstance(value, int | float) else str(value)
