"""What a reader should know first, in sentences."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import pandas as pd

from attnbench.analysis import compare, inputs
from attnbench.analysis.frames import as_rows, finished
from attnbench.records.schema import FAILED, Meta
from attnbench.report import units
from attnbench.report.prepare import Panel, alike, machine_name, warning_kinds
from attnbench.report.style import Style

_WORSE = 1.25  # times the error on drawn inputs, from which one is named that is larger on others
_FEW = 4  # winners are spelled out for so many panels, with so many changes of winner each; beyond, they are counted


def summary(frame: pd.DataFrame, panels: Sequence[Panel], runs: Sequence[Meta], style: Style) -> list[str]:
    """How many cells of what status, from where, which variant is the fastest, and what to be wary of."""
    if frame.empty and not runs:
        return ["There is no run in this report."]
    if frame.empty:
        return ["There is no cell in this report: the run planned none, or was stopped before its first."]
    done = finished(frame)
    said = [_counts(frame), *_origin(frame, panels, runs)]
    if done.empty:
        said.append("No cell finished with a latency, so there is nothing to compare.")
    said += _spelled_out(panels, style) or _counted(panels, style)
    said += _by_inputs(panels, style)
    wrong, failed = frame[frame["status"] == "wrong"], frame[frame["status"].isin(FAILED)]
    if len(wrong):
        said.append(f"Wrong answers from {_who(wrong, style)}: their latencies do not count.")
    elif len(done):
        said.append("Every number shown belongs to an output that passed its check.")
    if len(failed):
        said.append(f"Failed: {_who(failed, style)} (reasons below).")
    if loose := int(done["converged"].eq(False).sum()):
        said.append(
            f"{loose} of {units.count(len(done), 'finished cell')} did not reach the precision asked for (hollow "
            "markers): the time ran out first. Give them more with --budget before you rely on small differences."
        )
    if warned := int(frame["warnings"].map(warning_kinds).map(bool).sum()):
        said.append(f"{units.count(warned, 'cell carries', 'cells carry')} a warning (below).")
    return said


def _by_inputs(panels: Sequence[Panel], style: Style) -> list[str]:
    """Of each problem with several sorts of inputs, who looks better on drawn ones than on a model's."""
    said = []
    for group in alike(panels, "inputs"):
        frame = pd.concat([panel.frame for panel in group], ignore_index=True)
        names, found = inputs.sorts(frame), inputs.at_longest(inputs.error_by_inputs(frame))
        if worse := as_rows(found[found["ratio"] >= _WORSE].head(_FEW)):
            told = ", ".join(f"{style.names[row['plugin']]} {units.ratio(row['ratio'])}" for row in worse)
            others, length = " or ".join(inputs.compared(names)), units.length(worse[0]["length"])
            said.append(f"On {others} some are further off than on {names[0]} inputs at {length}: {told}.")
    return said


def _counts(frame: pd.DataFrame) -> str:
    counts = Counter(str(status) for status in frame["status"])
    order = sorted(counts, key=lambda status: (status != "ok", -counts[status], status))
    cells, variants = units.count(len(frame), "cell"), units.count(frame["plugin"].nunique(), "variant")
    return f"{cells} of {variants}: {', '.join(f'{counts[status]} {status}' for status in order)}."


def _origin(frame: pd.DataFrame, panels: Sequence[Panel], runs: Sequence[Meta]) -> list[str]:
    """Where the rows come from, if not from one run."""
    names, machines = list(dict.fromkeys(frame["run"])), list(dict.fromkeys(machine_name(run) for run in runs))
    if len(names) < 2:
        return []
    where = f" on {len(machines)} machines ({'; '.join(machines)})" if len(machines) > 1 else ""
    whole = {run.get("part_of") or run.get("name") for run in runs}
    if len(whole) == 1:
        return [
            f"The rows come from one run on {len(names)} machines, each with panels of its own: {'; '.join(machines)}."
        ]
    if any(panel.frame["run"].nunique() > 1 for panel in panels):
        how = "They measured different cells on the same machine and complete each other."
    else:
        how = "Each run has its own panels; nothing is averaged, fitted or compared across runs."
    return [f"The rows come from {len(names)} runs{where}. {how}"]


def _spelled_out(panels: Sequence[Panel], style: Style) -> list[str]:
    """The winners of each panel, among exact variants and among all; empty where that would bury the rest."""
    said = []
    for panel in panels:
        where = f"{panel.title[:1].upper()}{panel.title[1:]}: the" if panel.title else "The"
        exact = _winners(panel.frame[panel.frame["family"] == "exact"], style)
        of_all = _winners(panel.frame, style)
        if len(panels) > _FEW or max(len(exact), len(of_all)) > _FEW:
            return []
        said += [f"{where} fastest exact variant is {', '.join(exact)}."] if exact else []
        said += [f"{where} fastest whatever its error is {', '.join(of_all)}."] if of_all and of_all != exact else []
    return said


def _winners(frame: pd.DataFrame, style: Style) -> list[str]:
    """The fastest at each length; neighbouring lengths with the same answer are taken together.

    Variants that are not told apart from the fastest share its place.
    """
    answers = [(float(str(length)), compare.fastest(cell)) for length, cell in frame.groupby("length")]
    known = [(length, found) for length, found in answers if found]
    parts = []
    for winners, group in itertools.groupby(known, key=lambda answer: sorted({answer[1].plugin, *answer[1].tied})):
        same = list(group)
        rows = [found.row for _, found in same]
        first = rows[0]
        if len(winners) > 1:
            facts = ["not told apart"]
        elif first["plugin"] == first["baseline"]:
            facts = ["the baseline"]
        else:
            over = f" over {style.names.get(str(first['baseline']), 'the baseline')}"
            facts = [_range((row["speedup"] for row in rows), units.ratio, after=over)]
        if len(winners) == 1 and first["family"] != "exact":
            facts.append(_range((row["approximation_rel_l2"] for row in rows), units.error, before="error "))
        if doubtful := [length for length, found in same if not found.certain]:
            where = f" at {units.lengths(doubtful)}" if len(doubtful) < len(same) else ""
            facts.append(f"by medians alone{where}")
        told = ", ".join(fact for fact in facts if fact)
        names, at = units.listed([style.names[p] for p in winners]), units.lengths([length for length, _ in same])
        parts.append(f"{names} at {at}" + (f" ({told})" if told else ""))
    return parts


def _range(values: Iterable[float], text: Callable[[float], str], before: str = "", after: str = "") -> str:
    """ "1.2x to 3.4x over sdpa", of those values that are known."""
    known = [value for value in values if units.known(value)]
    if not known:
        return ""
    low, high = text(min(known)), text(max(known))
    return f"{before}{low if low == high else f'{low} to {high}'}{after}"


def _counted(panels: Sequence[Panel], style: Style) -> list[str]:
    """How often each variant is the fastest, or not told apart from it."""
    said = []
    for words, exact in (("fastest exact variant is", True), ("fastest whatever its error is", False)):
        wins: Counter[str] = Counter()
        cells = 0
        for panel in panels:
            rows = panel.frame[panel.frame["family"] == "exact"] if exact else panel.frame
            for found in filter(None, (compare.fastest(cell) for _, cell in rows.groupby("length"))):
                wins.update([found.plugin, *found.tied])
                cells += 1
        if cells:
            counts = ", ".join(f"{style.names[plugin]} in {n}" for plugin, n in wins.most_common())
            shared = ", ties counted for each" if wins.total() > cells else ""
            said.append(f"Of {units.count(cells, 'workload')} the {words} {counts}{shared} (table below).")
    return said


def _who(rows: pd.DataFrame, style: Style) -> str:
    """ "naive (2 timeout, 1 crashed), int8 (1 error)" """
    parts = []
    for plugin, part in rows.groupby("plugin"):
        counts = Counter(str(status) for status in part["status"])
        told = ", ".join(f"{number} {status}" for status, number in counts.most_common())
        parts.append(f"{style.names[str(plugin)]} ({told})")
    return ", ".join(parts)
