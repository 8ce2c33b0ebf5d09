"""Is a run fit to be shared: can others say where its numbers come from, repeat them, and miss none that failed?"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from attnbench import environment
from attnbench.advice.verify import claims
from attnbench.errors import AttnbenchError
from attnbench.records import ceilings, machines
from attnbench.records.run import read_meta, rows
from attnbench.records.schema import WELL, Row, key
from attnbench.records.submission import SUFFIX, Shared, content, of_rows
from attnbench.report import units
from attnbench.report.prepare import machine_name, warning_kinds
from attnbench.stats.doubts import explain
from attnbench.sweep.settings import Asked
from attnbench.theory.roofline import QUIET, Ceilings, impossible
from attnbench.workload import Workload

_UNNAMED = ("", "unknown", "None")


@dataclass(frozen=True)
class Missing:
    """What a run lacks, and how to mend it."""

    what: str
    mend: str


@dataclass(frozen=True)
class Submission:
    """A run with what keeps it from being shared, and what whoever reads it should know.

    shared: as it is written, with the ceilings that were found since.
    """

    shared: Shared
    missing: list[Missing]
    told: list[str]

    @property
    def name(self) -> str:
        """Of its file: the day, the machine, and a hash, so that no two are called the same."""
        meta = self.shared.meta
        words = re.sub(r"[^a-z0-9]+", "-", machine_name(meta).lower()).strip("-")[:40].strip("-")
        digest = hashlib.sha256(content(self.shared)).hexdigest()[:8]
        return f"{str(meta.get('started') or '')[:10] or 'undated'}-{words}-{digest}{SUFFIX}"


def examine(path: Path, name: str | None = None) -> Submission:
    """name: of the machine, in place of what it calls itself, such as "Ryzen 7 7840U laptop".

    Raises:
        AttnbenchError: there is no run, it is damaged, or has no rows.
    """
    meta, cells = read_meta(path), rows(path)
    if name and len(machines.of_run(meta)) > 1:
        raise AttnbenchError(f"{path} was measured on several machines: --machine can't name them all")
    meta |= {"machine": dict(meta.get("machine") or {}) | ({"named": name} if name else {})}
    parts = machines.apart(meta)
    own = {machine: [row for row in cells if len(parts) == 1 or row["machine"] == machine] for machine in parts}
    for machine, part in parts.items():
        if Ceilings.from_dict(part.get("ceilings")) is None and (later := _calibrated_since(part, own[machine])):
            part |= {"ceilings": later.as_dict()}
    meta |= {"ceilings": next(iter(parts.values()))["ceilings"]}
    if len(parts) > 1:
        meta |= {"ceilings_of": {machine: part["ceilings"] for machine, part in parts.items()}}
    missing, told = list(_missing(path, meta, cells)), list(_told(meta, cells))
    for machine, part in parts.items():
        whose = f"{machine}: " if len(parts) > 1 else ""
        lacks = (*_of_machine(part, own[machine]), *_of_ceilings(part, own[machine]))
        missing += [replace(each, what=whose + each.what) for each in lacks]
    return Submission(of_rows(path, meta, cells), missing, told)


def _calibrated_since(meta: dict[str, Any], cells: Sequence[Row]) -> Ceilings | None:
    first = key(cells[0])[1] if cells else None
    return ceilings.stored(meta["machine"], first.device, first.threads) if first else None


def _of_machine(meta: dict[str, Any], cells: Sequence[Row]) -> Iterator[Missing]:
    machine = meta["machine"]
    on_gpu = any(not key(row)[1].on_host for row in cells)
    named = machine.get("named") or machine.get("gpu" if on_gpu else "cpu")
    if str(named or "") in _UNNAMED:
        yield Missing("the machine has no name", "give it one: --machine 'Ryzen 7 7840U laptop'")


def _missing(path: Path, meta: dict[str, Any], cells: Sequence[Row]) -> Iterator[Missing]:
    if not meta.get("finished"):
        yield Missing("it was not finished", f"attnbench run --resume {path}")
    if not meta.get("command"):
        yield Missing("it does not say which command repeats it", "measure it with attnbench run")
    yield from _of_version(meta)
    if hidden := _hidden(meta, cells):
        yield Missing(hidden, "a run is shared whole, with what failed: put back what was cut out, or run again")
    if not claims(cells):
        yield Missing("no speedup has an interval, so nobody can verify one", "a longer --budget, or a --baseline")


def _of_version(meta: dict[str, Any]) -> Iterator[Missing]:
    git = meta["machine"].get("git")
    if git and str(git).endswith("-dirty"):
        yield Missing(f"it ran from a checkout with changes that nobody else has ({git})", "commit them, and run again")
    if not git and not meta.get("distributions"):
        yield Missing("it does not say of which version attnbench was", "run again with an attnbench that is installed")


def _of_ceilings(meta: dict[str, Any], cells: Sequence[Row]) -> Iterator[Missing]:
    known = Ceilings.from_dict(meta.get("ceilings"))
    works = {(w.device, w.threads if w.on_host else None, row.get("isa")): w for row in cells for w in [key(row)[1]]}
    for (device, threads, isa), workload in works.items():
        option = f"--device {device}" + (f" --threads {threads}" if threads else "")
        option += f" --isa {isa}" if isa not in (None, "", "auto") else ""
        if known is None or known.device != device or (threads and known.threads != workload.threads):
            told = f"the machine was not calibrated for {device}" + (f" with {threads} threads" if threads else "")
            yield Missing(
                told, f"attnbench calibrate --only ceilings {option}, on that machine, then attnbench submit again"
            )
    if known and known.disturbed > QUIET:
        yield Missing(
            f"others took {known.disturbed:.0%} of the cores while it was calibrated",
            "attnbench calibrate on a quiet machine, and run again",
        )
    for row in cells:
        if row["status"] == "ok" and (why := impossible(row, known)):
            yield Missing(
                f"{row['plugin']}, {key(row)[1].label()}: {why}", "find what its clock tells, or calibrate anew"
            )


def _hidden(meta: dict[str, Any], cells: Sequence[Row]) -> str:
    """Which of the cells that were planned have no row; empty where all have, or it is not known what was planned."""
    there = {key(row) for row in cells}
    plugins, variants = {plugin for plugin, _ in there}, {row["variant"] for row in cells}
    if gone := sorted((meta.get("distributions") or {}).keys() - variants):
        return f"it has no row of {units.listed(gone)}, which were part of it"
    try:
        planned = set(_workloads(Asked.from_dict(meta.get("args") or {}), {key(row)[1] for row in cells}))
    except AttnbenchError:
        return "it does not say what it was asked for, so that nobody knows what is missing"
    absent = [(plugin, w) for w in planned for plugin in plugins if (plugin, w) not in there]
    if not absent:
        return ""
    plugin, workload = min(absent, key=lambda cell: (cell[1].label(), cell[0]))
    return f"no row of {units.count(len(absent), 'cell')} that it was asked for, such as {plugin}, {workload.label()}"


def _workloads(asked: Asked, there: set[Workload]) -> Iterator[Workload]:
    """What was asked for; where each node of a cluster computed with its own threads, with those that a row has."""
    if asked.sweep.threads:
        yield from asked.sweep.workloads()
        return
    threads = {workload.replace(threads=1): workload.threads for workload in there}
    for workload in replace(asked.sweep, threads=1).workloads():
        yield workload.replace(threads=threads.get(workload, 1))


def _told(meta: dict[str, Any], cells: Sequence[Row]) -> Iterator[str]:
    counts = Counter(row["status"] for row in cells)
    if failed := {status: number for status, number in counts.items() if status not in WELL}:
        yield "failed, and shared as such: " + ", ".join(f"{number} {status}" for status, number in failed.items())
    warned = Counter(kind for row in cells for kind in warning_kinds(row.get("warnings")))
    for kind, number in warned.most_common():
        yield f"{kind}, {units.count(number, 'cell')}: {explain(kind)[0]}"
    if changed := environment.words(meta["machine"]):
        yield f"measured with {changed}"
