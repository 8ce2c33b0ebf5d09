"""The decoding variants of this package that read what a cache keeps."""

from __future__ import annotations

from attnbench.cache import Step
from attnbench.plugin import Plugin
from attnbench.workload import Workload

from .sides import TwoSides


def packed_step(cache: TwoSides, plugin: Plugin, workload: Workload, other: str = "") -> Step | str:
    """plugin: what decodes over both sides in this form. other: why it doesn't, with the cache's options."""
    if other:
        return other
    if not (cache.keys and cache.values):
        return "no kernel reads one side packed and the other in bfloat16"
    if reason := plugin.supports(workload):
        return reason
    if plugin.emulated(workload):
        return "no kernel for this form runs here"
    return Step(plugin, workload)
