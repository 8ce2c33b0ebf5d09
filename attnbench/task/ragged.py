"""A ragged batch: at once where a variant takes lengths, else entry by entry, each a problem of its own, unpadded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnbench.plugin import Attention, Decoding, Plugin, built
from attnbench.workload import Workload


def build(plugin: Plugin, workload: Workload) -> Attention:
    """The plugin's call, for all entries or for each of them, one after the other; rows behind an entry's end are 0."""
    if plugin.ragged(workload):
        return built(plugin, workload)
    entries = workload.entries()
    made = {entry: built(plugin, entry) for entry in dict.fromkeys(entries)}

    def call(query: Tensor, *tokens: Tensor) -> Tensor:
        outs = []
        for b, entry in enumerate(entries):
            own = (x[b : b + 1, :, : entry.kv_seq] for x in tokens)
            out = made[entry].call(query[b : b + 1, :, : entry.seq], *own)  # (1, heads, entry.seq, value_dim)
            outs.append(pad(out, (0, 0, 0, workload.seq - entry.seq)))
        return torch.cat(outs)

    first = made[entries[0]]
    return Attention(call, f"{first.implementation}, entry by entry", first.density)


def decoding(plugin: Plugin, workload: Workload) -> Decoding:
    """The plugin's state and step, of all entries or for each, one after the other; rows behind an end are 0."""
    if plugin.ragged(workload):
        return plugin.decoding(workload)
    entries = workload.entries()
    made = {entry: plugin.decoding(entry) for entry in dict.fromkeys(entries)}

    def start(*past: Tensor, capacity: int) -> list[Any]:
        return [
            made[entry].start(
                *(x[b : b + 1, :, : entry.past] for x in past), capacity=capacity - workload.kv_seq + entry.kv_seq
            )
            for b, entry in enumerate(entries)
        ]

    def step(states: list[Any], query: Tensor, *tokens: Tensor) -> tuple[Tensor, list[Any]]:
        outs, after = [], []
        for b, (entry, state) in enumerate(zip(entries, states, strict=True)):
            own = (x[b : b + 1, :, : entry.new] for x in tokens)
            out, state = made[entry].step(state, query[b : b + 1, :, : entry.seq], *own)
            outs.append(pad(out, (0, 0, 0, workload.seq - entry.seq)))
            after.append(state)
        return torch.cat(outs), after

    first = made[entries[0]]
    return Decoding(start, step, f"{first.implementation}, entry by entry", first.density)
