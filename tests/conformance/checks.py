"""What any plugin must do, as functions that a plugin author can call too."""

from __future__ import annotations

import torch
from torch import Tensor

from attnbench import reference
from attnbench.bench import error
from attnbench.plugin import Attention, Call, Plugin
from attnbench.workload import Workload


def built(plugin: Plugin, workload: Workload) -> Call:
    made = plugin.build(workload)
    return made.call if isinstance(made, Attention) else made


def inputs(workload: Workload, seed: int, strided: bool, gates: tuple[int, ...] = ()) -> list[Tensor]:
    """query, key, value and gates; strided: as a block hands them on, views of (batch, length, heads, dim)."""
    w, generator = workload, torch.Generator().manual_seed(seed)
    tokens = [(w.kv_heads, w.kv_seq, n) for n in (w.head_dim, w.value_dim, *gates)]
    tensors = []
    for heads, length, dim in [(w.heads, w.seq, w.head_dim), *tokens]:
        x = torch.randn(w.batch, length, heads, dim, generator=generator).to(getattr(torch, w.dtype)).transpose(1, 2)
        tensors.append(x if strided else x.contiguous())
    return tensors


def check(plugin: Plugin, workload: Workload, strided: bool = False) -> None:
    """Right shape, dtype and values; inputs untouched; no output shared with another call or with an input."""
    call = built(plugin, workload)
    first, second = (inputs(workload, seed, strided, plugin.gates(workload)) for seed in (0, 1))
    buffers = [x.clone(memory_format=torch.preserve_format) for x in first]
    before = call(*buffers)
    judge(plugin, workload, first, before)
    kept = before.clone()
    for buffer, x in zip(buffers, second, strict=True):
        buffer.copy_(x)
    after = call(*buffers)
    judge(plugin, workload, second, after)
    assert torch.equal(before, kept), "a call overwrites the output of the call before"
    assert all(torch.equal(b, x) for b, x in zip(buffers, second, strict=True)), "a call changes its inputs"
    storages = [x.untyped_storage().data_ptr() for x in (before, after, *buffers)]
    assert len(set(storages)) == len(storages), "an output shares memory"


def judge(plugin: Plugin, workload: Workload, tensors: list[Tensor], out: Tensor) -> None:
    w = workload
    assert out.shape == (w.batch, w.heads, w.seq, w.value_dim)
    assert out.dtype == tensors[0].dtype
    rows = torch.arange(w.seq)
    query, key, value, *gates = tensors
    expected = reference.expected(plugin.definition(w), w, query, key, value, rows, gates)
    problem = error.verdict(error.compare(out, expected), error.tolerance(w, plugin.family))
    assert problem is None, problem
