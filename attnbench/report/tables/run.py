"""Tables of a run as a whole: its variants, its warnings, and what is known of it and its machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from attnbench.analysis.rows import finished, records
from attnbench.report import units
from attnbench.report.prepare import command_line, warning_kinds
from attnbench.report.style import Style
from attnbench.report.tables.table import Table
from attnbench.stats.doubts import explain


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
