"""ggml's flash_attn_ext, the operator that llama.cpp attends with, on a CPU: over a cache of f16, q8_0, q4_0 or f32.

As in llama.cpp a graph writes the new tokens into the cache, which quantizes them (set_rows), and attends then; queries
come in and outputs go out in float32. The cache lies head by head.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Mapping
from functools import lru_cache
from importlib import metadata
from typing import ClassVar, NamedTuple

import ggml
import torch
from attnbench_plugins.pieces import hidden
from torch import Tensor

from attnbench.errors import AttnbenchError
from attnbench.plugin import Attention, Decoding, Option, Plugin, Softmax
from attnbench.workload import Workload

from .blocks import q4_0, q8_0

TYPES = {"f16": ggml.GGML_TYPE_F16, "q8_0": ggml.GGML_TYPE_Q8_0, "q4_0": ggml.GGML_TYPE_Q4_0, "f32": ggml.GGML_TYPE_F32}
KEPT = {"f16": Tensor.half, "q8_0": q8_0, "q4_0": q4_0, "f32": Tensor.float}  # what a cache makes of a float32 tensor
BLOCK = 32  # numbers that share a scale
GRAPHS = 4  # that are kept, each for a length
NODES = 16  # room for tensors of a graph


class Ggml(Plugin):
    """flash_attn_ext: keys are multiplied in the cache's type, queries rounded to match; sums over f16 values are f16.

    In phase forward all tokens are new to an empty cache.
    """

    family = "quantized"
    devices = ("cpu",)
    phases = ("forward", "decode")
    honours = ("scale", "window", "softcap")
    options: ClassVar[Mapping[str, Option]] = {"cache": Option("f16", "type of the cache's keys and values", (*TYPES,))}
    cache: str

    def supports(self, workload: Workload) -> str | None:
        w = workload
        if self.cache == "f16" and w.dtype == "float32":
            return "over a cache of f16 sums are f16: too coarse for float32; see ggml:cache=f32"
        if self.cache.startswith("q") and (w.head_dim % BLOCK or w.value_dim % BLOCK):
            return f"{self.cache} has blocks of {BLOCK}: head dim and value dim must be multiples"
        return None

    def workspace_bytes(self, workload: Workload) -> int:
        """Queries, new keys and values and the output in float32, the mask, and in phase forward the cache."""
        w = workload
        new, kept = w.kv_seq - w.past, 0 if w.decodes else w.kv_seq
        rows = sum(ggml.ggml_row_size(TYPES[self.cache], dim) for dim in (w.head_dim, w.value_dim))
        wide = 4 * w.batch * (w.heads * w.seq + w.kv_heads * new) * (w.head_dim + w.value_dim)
        return wide + w.batch * w.kv_heads * kept * rows + (2 * w.seq * w.kv_seq if _masked(w) else 0)

    def definition(self, workload: Workload) -> Softmax:
        kept = KEPT[self.cache]
        queries = q8_0 if self.cache.startswith("q") else kept  # int8 meets four bits too

        def operands(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return queries(query.float()), kept(key.float()), kept(value.float())

        return Softmax(operands=operands)

    def build(self, workload: Workload) -> Attention:
        made = self.decoding(workload)
        w = workload

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            out, _ = made.step(Kept.room(self.cache, key, value, w.kv_seq), query, key, value)
            return out

        return Attention(attend, made.implementation)

    def decoding(self, workload: Workload) -> Decoding:
        kind, w = self.cache, workload
        graph = lru_cache(GRAPHS)(lambda length, new, capacity: _Graph(w, kind, length, new, capacity))
        if not w.decodes:
            graph(w.kv_seq, w.kv_seq, w.kv_seq)

        def start(key: Tensor, value: Tensor, capacity: int) -> Kept:
            state = Kept.room(kind, key, value, capacity)
            return _store(w, kind, state, key, value) if key.shape[2] else state

        def step(state: Kept, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Kept]:
            state = state.longer(key.shape[2])
            run = graph(state.length, key.shape[2], state.key.shape[2])
            return run(state, query, key, value), state

        version = ggml.ggml_version().decode()
        how = f"ggml {version} (ggml-python {metadata.version('ggml-python')}) flash_attn_ext, {kind} cache"
        return Decoding(start, step, how)


def _masked(w: Workload) -> bool:
    return (w.is_causal and w.seq > 1) or "window" in w.beyond


class Kept(NamedTuple):
    """Keys and values as ggml keeps them: bytes (batch, kv_heads, capacity, bytes of a row), `length` of them there."""

    key: Tensor
    value: Tensor
    length: int

    @classmethod
    def room(cls, kind: str, key: Tensor, value: Tensor, capacity: int) -> Kept:
        """For `capacity` tokens such as these, none of which is there."""
        sizes = [(*x.shape[:2], capacity, ggml.ggml_row_size(TYPES[kind], x.shape[-1])) for x in (key, value)]
        return cls(torch.empty(sizes[0], dtype=torch.uint8), torch.empty(sizes[1], dtype=torch.uint8), 0)

    def longer(self, new: int) -> Kept:
        """With room taken for so many more.

        Raises:
            AttnbenchError: there is none.
        """
        if self.length + new > self.key.shape[2]:
            raise AttnbenchError(f"a cache of {self.key.shape[2]} tokens has no room for {self.length + new}")
        return self._replace(length=self.length + new)


class _Graph:
    """A graph that writes `new` tokens into a cache, so that it has `length`, and attends over all of them.

    Its tensors' memory is torch's: each call says where it lies.
    """

    def __init__(self, w: Workload, kind: str, length: int, new: int, capacity: int, attends: bool = True) -> None:
        size = ggml.ggml_graph_overhead_custom(NODES, False) + NODES * ggml.ggml_tensor_overhead()
        self._context = ggml.ggml_init(ggml.ggml_init_params(size, None, True))
        weakref.finalize(self, ggml.ggml_free, self._context)
        graph = ggml.ggml_new_graph_custom(self._context, NODES, False)
        self._places = torch.arange(length - new, length)  # of the new tokens
        self._caches, self._news = [], []
        for dim in (w.head_dim, w.value_dim):
            cache = self._tensor(TYPES[kind], dim, capacity, w.kv_heads, w.batch)
            aliases = [cache]
            if new:
                rows = self._tensor(ggml.GGML_TYPE_F32, dim, new, w.kv_heads, w.batch)
                places = self._tensor(ggml.GGML_TYPE_I64, new, 1, 1, 1)
                places.contents.data = self._places.data_ptr()
                aliases.append(ggml.ggml_set_rows(self._context, cache, rows, places))
                ggml.ggml_build_forward_expand(graph, aliases[-1])
                self._news.append(rows)
            strides = tuple(cache.contents.nb)[1:]
            aliases.append(ggml.ggml_view_4d(self._context, aliases[-1], dim, length, w.kv_heads, w.batch, *strides, 0))
            self._caches.append(aliases)
        self._out = self._attention(w, length) if attends else None
        if self._out:
            ggml.ggml_build_forward_expand(graph, self._out)
        self._run = _Run(graph, w.threads)
        self._shape = (w.batch, w.seq, w.heads, w.value_dim)
        self._takes = [(w.batch, w.kv_heads, new, w.head_dim), (w.batch, w.kv_heads, new, w.value_dim), w.shapes[0]]

    def _tensor(self, kind: int, *sizes: int) -> ctypes._Pointer[ggml.ggml_tensor]:
        return ggml.ggml_new_tensor_4d(self._context, kind, *sizes)

    def _attention(self, w: Workload, length: int) -> ctypes._Pointer[ggml.ggml_tensor]:
        self._query = self._tensor(ggml.GGML_TYPE_F32, w.head_dim, w.seq, w.heads, w.batch)
        mask = None
        if _masked(w):
            now = w.replace(kv_seq=length)
            self._mask = torch.zeros(w.seq, length, dtype=torch.float16).masked_fill_(hidden(now), -torch.inf)
            mask = self._tensor(ggml.GGML_TYPE_F16, length, w.seq, 1, 1)
            mask.contents.data = self._mask.data_ptr()
        (*_, keys), (*_, values) = self._caches
        return ggml.ggml_flash_attn_ext(self._context, self._query, keys, values, mask, w.scale, 0.0, w.softcap)

    def __call__(self, state: Kept, query: Tensor | None, key: Tensor, value: Tensor) -> Tensor:
        given = [x for x in (key, value, query) if x is not None]
        for x, shape in zip(given, self._takes, strict=False):
            if x.shape != shape:  # ggml would read and write by its own sizes
                raise AttnbenchError(f"built for a tensor of shape {shape}, not {tuple(x.shape)}")
        rows = [x.float().contiguous() for x in (key, value)]
        for place, x in zip(self._news, rows, strict=False):  # none where no token is new
            place.contents.data = x.data_ptr()
        for aliases, x in zip(self._caches, (state.key, state.value), strict=True):
            for alias in aliases:
                alias.contents.data = x.data_ptr()
        if query is None or self._out is None:
            self._run()
            return key
        wide = query.float().contiguous()
        out = torch.empty(self._shape)
        self._query.contents.data, self._out.contents.data = wide.data_ptr(), out.data_ptr()
        self._run()
        return out.transpose(1, 2).to(query.dtype)


class _Run:
    """A graph's plan, its work memory and its threads."""

    def __init__(self, graph: ctypes._Pointer[ggml.ggml_cgraph], threads: int) -> None:
        pool = ggml.ggml_threadpool_new(ctypes.byref(ggml.ggml_threadpool_params_default(threads)))
        weakref.finalize(self, ggml.ggml_threadpool_free, pool)
        self._graph, self._plan = graph, ggml.ggml_graph_plan(graph, threads, pool)
        self._work = torch.empty(max(1, self._plan.work_size), dtype=torch.uint8)
        self._plan.work_data = ctypes.cast(self._work.data_ptr(), ctypes.POINTER(ctypes.c_uint8))

    def __call__(self) -> None:
        if status := ggml.ggml_graph_compute(self._graph, ctypes.byref(self._plan)):
            raise AttnbenchError(f"ggml_graph_compute ended with status {status}")


def _store(w: Workload, kind: str, state: Kept, key: Tensor, value: Tensor) -> Kept:
    """The past goes into the cache, before any step."""
    new = key.shape[2]
    state = state.longer(new)
    _Graph(w, kind, new, new, state.key.shape[2], attends=False)(state, None, key, value)
    return state
