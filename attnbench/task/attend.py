"""One variant as a function in this process, for a notebook: no timing, no judging."""

from __future__ import annotations

from attnbench import registry
from attnbench.errors import AttnbenchError
from attnbench.packages import only_whole
from attnbench.plugin import Attention
from attnbench.task.call import build
from attnbench.task.promise import refusal
from attnbench.workload import Workload


@only_whole()
def attend(spec: str, workload: Workload) -> Attention:
    """The variant's callable (query, key, value) -> out for this workload; its `.implementation` says what will run.

    spec: as `--plugins` takes it, such as "int8:rows=32". Its tensors are those of the workload, (batch, heads, length,
    head_dim); shapes are the workload's, as masks and compiled code are made for them.

    Raises:
        AttnbenchError: the spec names no plugin or several, or the plugin can't do this workload.
    """
    if workload.scope != "attention" or workload.decodes:
        raise AttnbenchError("attend gives attention alone, forward or training: a block or a past is for a run")
    plugin = registry.create(spec)
    if reason := refusal(plugin, workload):
        raise AttnbenchError(f"{spec} can't do {workload.label()}: {reason}")
    made = build(plugin, workload)["self"]
    assert isinstance(made, Attention)
    return made
