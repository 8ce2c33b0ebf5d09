"""One case of `judge.cases` in this process, with what only a device can tell: the memory that a call takes."""

from __future__ import annotations

import torch

from attnbench.judge.trials import Checked, attempt
from attnbench.plugin import Plugin
from attnbench.registry import load
from attnbench.task.promise import promise
from attnbench.workers.messages import Prepare, Tried, Try, printable
from attnbench.workers.subject import Subject

_LONGEST_TEXT = 4000
# A promise may be too small by so much: what allocators round, what torch's own operators take for a moment. One that
# is too large by far keeps a variant from sizes that it could do.
_TOO_SMALL, _TOO_LARGE, _LITTLE_BYTES = 1.25, 4.0, 4 << 20


def tried(asked: Try) -> Tried:
    """What becomes of the plugin on the case. Whatever its import raises passes through."""
    plugin = load(asked.target)(**asked.options)
    torch.set_num_threads(asked.case.workload.threads)
    torch.manual_seed(asked.case.workload.seed)
    found = _workspace(asked, plugin) if asked.case.trial == "workspace" else attempt(plugin, asked.case)
    return Tried(
        found.status,
        printable(found.reason)[:500],
        printable(found.implementation),
        {name: float(value) for name, value in found.measures.items()},
        printable(found.traceback)[-_LONGEST_TEXT:],
    )


def _workspace(asked: Try, plugin: Plugin) -> Checked:
    """What it says that a call holds, beside what one holds: the measures are `promised_bytes` and `measured_bytes`."""
    said = promise(plugin, asked.case.workload)
    if said.unsupported:
        return Checked("unsupported", said.unsupported)
    request = Prepare(asked.case.workload, asked.target, asked.options, thorough=True)
    columns = Subject(request).prepare(request).columns
    measured, runs = columns["workspace_bytes"], str(columns["implementation"])
    if not isinstance(measured, int):
        return Checked("unsupported", "this system does not tell what a call holds")
    measures = {"measured_bytes": float(measured)}
    if said.workspace is None:
        return Checked("ok", "", runs, measures)
    measures |= {"promised_bytes": float(said.workspace)}
    held, promised = (f"{n / 2**20:.1f} MiB" for n in (measured, said.workspace))
    told = f"a call holds {held} beside inputs and output, workspace_bytes says {promised}"
    if measured > _TOO_SMALL * said.workspace + _LITTLE_BYTES:
        return Checked("wrong", told, runs, measures)
    if said.workspace > _TOO_LARGE * measured + _LITTLE_BYTES:
        return Checked("wrong", f"{told}, so that it is kept from sizes that it could do", runs, measures)
    return Checked("ok", "", runs, measures)
