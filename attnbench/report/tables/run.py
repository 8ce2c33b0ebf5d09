"""Tables of whole runs: variants, warnings, what is known of a run and its machine, and runs beside each other."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from attnbench.analysis.frames import as_rows, finished
from attnbench.records.schema import Meta, Row
from attnbench.report import units
from attnbench.report.prepare import command_line, machine_name, warning_kinds
from attnbench.report.style import Style
from attnbench.report.tables.table import Table
from attnbench.stats.doubts import explain

_SAME = ("scope", "block", "mask", "seq", "plugin")  # what the standard sweep varies


def warnings(frame: pd.DataFrame, style: Style) -> Table:
    """Each kind of warning with how many cells carry it, whose they are, and advice."""
    carriers: dict[str, list[str]] = {}
    for row in as_rows(frame):
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
        ran = part["implementation"].astype(object).fillna("")
        part = part.assign(implementation=ran.mask(part["emulated"], ran + " (emulated)"))
        done = f"{len(finished(part))} of {len(part)}"
        facts = [filter(None, part[name].dropna().unique()) for name in ("family", "implementation", "distribution")]
        rows.append([style.names[plugin], plugin, *("; ".join(each) or units.NOTHING for each in facts), done])
    return Table(["variant", "plugin", "family", "what ran", "from", "cells finished"], rows)


def run_facts(run: Meta) -> list[tuple[str, str]]:
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
    spelled |= {"cpu_capability": "CPU capability"}
    told = [(spelled.get(name, name.replace("_", " ")), _text(name, value)) for name, value in facts.items()]
    return [(name, text) for name, text in told if text]


def _wall(seconds: Mapping[str, Any]) -> str:
    """ "344 s: 70% in calls of the variants, 9% in compilation, 21% elsewhere (overhead)" """
    wall = seconds.get("wall")
    if not wall or not units.known(wall):
        return "unknown"
    named = {"calls": "in calls of the variants", "compilation": "in compilation", "elsewhere": "elsewhere (overhead)"}
    known = {text: seconds[name] for name, text in named.items() if seconds.get(name) is not None}
    tasks = seconds.get("tasks")  # of a run on a cluster, all together
    shares = ", ".join(f"{value / (tasks or wall):.0%} {text}" for text, value in known.items())
    return f"{wall:.0f} s" + (f", {tasks:.0f} s in tasks" if tasks else "") + (f": {shares}" if shares else "")


def _text(name: str, value: Any) -> str:
    """A value of run.json as text; under a name that ends in _bytes, numbers are sizes."""
    if value is None or value == "" or value == [] or value == {}:
        return ""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(name, each)}" for key, each in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_text(name, each) for each in value)
    return units.size(value) if name.endswith("_bytes") and isinstance(value, int | float) else str(value)


def side_by_side(frame: pd.DataFrame, runs: Sequence[Meta], style: Style) -> Table | None:
    """A row for each cell that two runs of the same standard sweep finished, a column for each run.

    A cell holds the median latency and the paired speedup over the baseline of that run. None where the report has no
    two such runs.
    """
    standard = [run for run in runs if run.get("standard")]
    if len(standard) < 2 or len({run["standard"] for run in standard}) > 1:
        return None
    names = [str(run.get("name")) for run in standard]
    done = finished(frame)
    cells = {(run, *(row[name] for name in _SAME)): row for run in names for row in as_rows(done[done["run"] == run])}
    keys = dict.fromkeys(key[1:] for key in cells)
    shared = [key for key in keys if sum((run, *key) in cells for run in names) > 1]
    rows = []
    for scope, block, mask, seq, plugin in shared:
        found = (cells.get((run, scope, block, mask, seq, plugin)) for run in names)
        where = "attention" if scope == "attention" else f"{block} block"
        rows.append([where, str(mask), units.length(seq), style.names[str(plugin)], *map(_beside, found)])
    heads = [f"{run}: {machine_name(meta)}" for run, meta in zip(names, standard, strict=True)]
    numeric = frozenset(["length", *heads])
    return Table(["scope", "mask", "length", "variant", *heads], rows, numeric=numeric) if rows else None


def _beside(row: Row | None) -> str:
    if row is None:
        return units.NOTHING
    speedup = f" ({units.ratio(row['speedup'])})" if units.known(row["speedup"]) else ""
    return units.seconds(row["latency_s"]) + speedup
