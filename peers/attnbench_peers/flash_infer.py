"""FlashInfer (Ye 2025, arXiv 2501.01005): attention as servers call it, over tokens in a row or pages of a cache.

BatchPrefillWithRaggedKVCacheWrapper and BatchPrefillWithPagedKVCacheWrapper (flashinfer/prefill.py, 0.7),
BatchDecodeWithPagedKVCacheWrapper (decode.py) and append_paged_kv_cache (page.py). A wrapper plans for lengths, on the
host, and runs then: a server plans once for all layers of a model, so that a plan is made in `build`, or where a length
is new, and its time is not that of the calls behind it. Kernels are compiled when first asked for, by nvcc.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

import flashinfer
import torch
from torch import Tensor

from attnbench.plugin import Attention, Decoding, Option, Plugin
from attnbench.workload import Workload

from .layout import Tokens, by_token, grown, older_than, tokens_of, wide_or_unequal

HEADS = (64, 128, 256)
WORKSPACE = 128 << 20  # bytes, as its documentation has it
PLANS = 4  # that are kept, each for a length


class FlashInfer(Plugin):
    """A forward pass over keys in a row; decoding over pages, which a table names in random order."""

    devices = ("cuda",)
    phases = ("forward", "decode")
    honours = ("scale", "window", "softcap")
    options: ClassVar[Mapping[str, Option]] = {"page": Option(16, "tokens in a page", (16, 32, 64))}
    page: int

    def supports(self, workload: Workload) -> str | None:
        if reason := wide_or_unequal(workload, "FlashInfer"):
            return reason
        if workload.head_dim not in HEADS:
            return f"FlashInfer has head dims of {', '.join(map(str, HEADS))}"
        return "FlashInfer is for GPUs of compute capability 8.0 and later" if older_than(8) else None

    def ragged(self, workload: Workload) -> bool:
        return not workload.decodes

    def build(self, workload: Workload) -> Attention:
        w = workload
        queries, keys = tokens_of(w)
        wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(_workspace(w), "NHD")
        wrapper.plan(queries.starts, keys.starts, *_sizes(w), causal=w.is_causal, **arguments(w))

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return queries.unpack(wrapper.run(queries.pack(query), keys.pack(key), keys.pack(value)))

        return Attention(attend, f"flashinfer {flashinfer.__version__} BatchPrefillWithRaggedKVCacheWrapper, planned")

    def decoding(self, workload: Workload) -> Decoding:
        w, page = workload, self.page
        workspace = _workspace(w)
        planned = lru_cache(PLANS)(lambda length, new, each: _Plan(w, workspace, page, length, new, each))

        def start(key: Tensor, value: Tensor, capacity: int) -> Pages:
            each = -(-capacity // page)
            rooms = [x.new_zeros(w.batch * each, page, w.kv_heads, w.head_dim) for x in (key, value)]
            state, past = Pages(rooms[0], rooms[1], 0), key.shape[2]
            return _Appending(w, page, past, past, each)(state, key, value) if past else state

        def step(state: Pages, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Pages]:
            each, new = len(state.key) // w.batch, key.shape[2]
            plan = planned(grown(state.length, new, each * page), new, each)
            if new:
                state = plan.append(state, key, value)
            return plan(query, state), state

        wrapper = "BatchDecode" if w.seq == 1 else "BatchPrefill"
        return Decoding(start, step, f"flashinfer {flashinfer.__version__} {wrapper}WithPagedKVCacheWrapper, planned")


class Pages(NamedTuple):
    """Keys and values (pages, page, kv_heads, head_dim), of which each sequence has `length` tokens."""

    key: Tensor
    value: Tensor
    length: int


def arguments(w: Workload) -> dict[str, Any]:
    """What any wrapper's `plan` is told by name. A window of n is the n - 1 keys to the left of a query and its own."""
    dtype = getattr(torch, w.dtype)
    return {
        "window_left": w.masked.window - 1,  # -1: no window
        "logits_soft_cap": w.softcap,
        "sm_scale": w.scale,
        "q_data_type": dtype,
        "kv_data_type": dtype,
    }


def _sizes(w: Workload) -> tuple[int, int, int]:
    return w.heads, w.kv_heads, w.head_dim


def _workspace(w: Workload) -> Tensor:
    return torch.zeros(WORKSPACE, dtype=torch.uint8, device=w.device)


class _Table:
    """Which pages each sequence has, and how many of them `length` tokens fill."""

    def __init__(self, w: Workload, page: int, length: int, each: int) -> None:
        pool, used = w.batch * each, -(-length // page)
        order = torch.randperm(pool, generator=torch.Generator().manual_seed(w.seed)).int().view(w.batch, each)
        self.pages = order[:, :used].flatten().to(w.device)  # (batch * used,)
        self.starts = torch.arange(0, (w.batch + 1) * used, used, dtype=torch.int32, device=w.device)
        self.filled = torch.full((w.batch,), (length - 1) % page + 1, dtype=torch.int32, device=w.device)


class _Appending:
    """Writes the last `new` of `length` tokens into pages."""

    def __init__(self, w: Workload, page: int, length: int, new: int, each: int) -> None:
        self.table, self._length = _Table(w, page, length, each), length
        places = torch.arange(length - new, length, dtype=torch.int32, device=w.device)
        self._places = places.repeat(w.batch)  # (batch * new,)
        self._owners = torch.arange(w.batch, dtype=torch.int32, device=w.device).repeat_interleave(new)

    def __call__(self, state: Pages, key: Tensor, value: Tensor) -> Pages:
        rows = [by_token(x).flatten(0, 1).contiguous() for x in (key, value)]  # (batch * new, kv_heads, head_dim)
        table = self.table
        flashinfer.append_paged_kv_cache(
            *rows, self._owners, self._places, state[:2], table.pages, table.starts, table.filled, kv_layout="NHD"
        )
        return state._replace(length=self._length)


class _Plan:
    """For sequences that have `length` tokens once `new` were appended."""

    def __init__(self, w: Workload, workspace: Tensor, page: int, length: int, new: int, each: int) -> None:
        self.append = _Appending(w, page, length, new, each)
        table = self.append.table
        pages = table.starts, table.pages, table.filled
        self._queries = Tokens([w.seq] * w.batch, w.seq, w.device)
        if w.seq == 1:  # its kernels without tensor cores are compiled for few sizes of a group
            self._wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                workspace, "NHD", use_tensor_cores=w.group > 2
            )
            self._wrapper.plan(*pages, *_sizes(w), page, **arguments(w))
        else:
            self._wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
            self._wrapper.plan(self._queries.starts, *pages, *_sizes(w), page, causal=w.is_causal, **arguments(w))

    def __call__(self, query: Tensor, state: Pages) -> Tensor:
        return self._queries.unpack(self._wrapper.run(self._queries.pack(query).contiguous(), state[:2]))
