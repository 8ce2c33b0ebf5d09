"""What the releases of FlashAttention share (Dao 2023, arXiv 2307.08691; Shah 2024, arXiv 2407.08608).

Their functions take the same arguments, by the same names, of tensors (batch, length, heads, dim): flash_attn_func,
flash_attn_varlen_func and flash_attn_with_kvcache in flash_attn/flash_attn_interface.py of 2.8.3, in
hopper/flash_attn_interface.py of 3, and, but for the cache, in flash_attn/cute/interface.py of 4. From 2.1 on a causal
mask is aligned bottom-right, as here. They differ in what stands for no window, which is asked of their signatures.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from attnbench.plugin import Attention, Decoding, Plugin
from attnbench.workload import Workload

from .layout import by_token, grown, older_than, tokens_of, wide_or_unequal


class Functions(NamedTuple):
    """A release's functions: of whole batches, of ragged ones, and over a cache that they add to, where it has one."""

    attend: Callable[..., Any]
    varlen: Callable[..., Any]
    with_cache: Callable[..., Any] | None
    release: str

    @classmethod
    def of(cls, module: Any, release: str) -> Functions:
        """Those that a module has, under the names that all releases give them."""
        with_cache = getattr(module, "flash_attn_with_kvcache", None)
        return cls(module.flash_attn_func, module.flash_attn_varlen_func, with_cache, release)


class Cache(NamedTuple):
    """Keys and values (batch, capacity, kv_heads, dim), `length` of them there."""

    key: Tensor
    value: Tensor
    length: int


class FlashAttention(Plugin):
    """flash_attn_func, of ragged batches flash_attn_varlen_func, and decoding flash_attn_with_kvcache.

    The last one writes new tokens into the cache and attends over it in one call.
    """

    devices = ("cuda",)
    honours: ClassVar[tuple[str, ...]] = ("scale", "window", "softcap")
    least: ClassVar[tuple[int, int]] = (8, 0)  # compute capability that its kernels are for

    def functions(self) -> Functions:
        raise NotImplementedError(f"{type(self).__name__} has no functions")

    def supports(self, workload: Workload) -> str | None:
        w, who = workload, "FlashAttention"
        if reason := wide_or_unequal(w, who):
            return reason
        if w.head_dim % 8 or w.head_dim > 256:
            return f"{who} has head dims that are multiples of 8, up to 256"
        if older_than(*self.least):
            return f"{who} is for GPUs of compute capability {'.'.join(map(str, self.least))} and later"
        return None

    def ragged(self, workload: Workload) -> bool:
        return not workload.decodes

    def build(self, workload: Workload) -> Attention:
        w, own = workload, self.functions()
        return _varlen(w, own) if w.lengths else _whole(w, own)

    def decoding(self, workload: Workload) -> Decoding:
        own = self.functions()
        return _decoding(workload, own, own.with_cache) if own.with_cache else super().decoding(workload)


def arguments(w: Workload, function: Callable[..., Any]) -> dict[str, Any]:
    """What any of the functions is told of a workload, beside its tensors.

    A window of n is the n - 1 keys to the left of a query and its own.
    """
    unbounded = inspect.signature(function).parameters["window_size"].default
    window = (w.masked.window - 1, 0) if w.masked.window else unbounded
    return {"softmax_scale": w.scale, "causal": w.is_causal, "window_size": window, "softcap": w.softcap}


def _whole(w: Workload, own: Functions) -> Attention:
    told = arguments(w, own.attend)

    def attend(query: Tensor, key: Tensor, value: Tensor, *sinks: Tensor) -> Tensor:
        more = {"learnable_sink": sinks[0]} if sinks else {}
        return by_token(_only(own.attend(*map(by_token, (query, key, value)), **told, **more)))

    return Attention(attend, f"{own.release} flash_attn_func")


def _varlen(w: Workload, own: Functions) -> Attention:
    queries, keys = tokens_of(w)
    told = arguments(w, own.varlen) | {
        "cu_seqlens_q": queries.starts,
        "cu_seqlens_k": keys.starts,
        "max_seqlen_q": queries.longest,
        "max_seqlen_k": keys.longest,
    }

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = own.varlen(queries.pack(query), keys.pack(key), keys.pack(value), **told)
        return queries.unpack(_only(out))

    return Attention(attend, f"{own.release} flash_attn_varlen_func, packed and padded in each call")


def _decoding(w: Workload, own: Functions, with_cache: Callable[..., Any]) -> Decoding:
    told = arguments(w, with_cache)

    def start(key: Tensor, value: Tensor, capacity: int) -> Cache:
        rooms = [x.new_empty(x.shape[0], capacity, x.shape[1], x.shape[3]) for x in (key, value)]
        for room, x in zip(rooms, (key, value), strict=True):
            room[:, : x.shape[2]] = by_token(x)
        return Cache(rooms[0], rooms[1], key.shape[2])

    def step(state: Cache, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Cache]:
        length = grown(state.length, key.shape[2], state.key.shape[1])
        new = {"k": by_token(key), "v": by_token(value)} if key.shape[2] else {}
        out = with_cache(by_token(query), state.key, state.value, **new, cache_seqlens=state.length, **told)
        return by_token(_only(out)), state._replace(length=length)

    return Decoding(start, step, f"{own.release} flash_attn_with_kvcache")


def _only(found: Any) -> Tensor:
    """The output, where it comes with the rows' log-sum-exp too."""
    out: Tensor = found[0] if isinstance(found, tuple) else found
    return out
