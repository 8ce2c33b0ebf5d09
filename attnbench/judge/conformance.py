"""Is this variant right? `check` runs it in this process on one workload, without timing it.

A run checks the same of what it times, in processes of its own: a plugin that crashes or hangs ends this one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor

from attnbench import registry
from attnbench.judge.cases import Case
from attnbench.judge.trials import Checked, attempt
from attnbench.packages import only_whole
from attnbench.plugin import Plugin, of_function
from attnbench.workload import Workload

__all__ = ["Checked", "Variant", "as_plugin", "check"]
Variant: TypeAlias = str | Plugin | type[Plugin] | Callable[..., Tensor]
"""A spec as `--plugins` takes it, a plugin or its class, or a function (query, key, value) -> out."""


def as_plugin(variant: Variant) -> Plugin:
    """Raises: AttnbenchError: a spec names no plugin, or several."""
    if isinstance(variant, str):
        return registry.create(variant)
    if isinstance(variant, Plugin):
        return variant
    return variant() if isinstance(variant, type) else of_function(variant)()


@only_whole()
def check(variant: Variant, workload: Workload, *, strided: bool = False) -> Checked:
    """Calls a variant twice on different values: right values, shapes and dtypes, inputs untouched, no shared memory.

    variant: a spec such as "int8:rows=32", a `Plugin` or its class, or any function f(query, key, value) -> out, which
        is held against exact softmax attention.
    workload: tensors are drawn for it as a run draws them; its threads are not set.
    strided: whether inputs lie as a block hands them on, views of (batch, length, heads, dim).

    Raises:
        AttnbenchError: a spec names no plugin, or several. What a variant raises is a status.
    """
    lay = "transposed" if strided and workload.scope == "attention" else "contiguous"
    return attempt(as_plugin(variant), Case("drawn", "drawn", workload, lay=lay))
