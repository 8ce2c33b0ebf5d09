"""Calls a compiled kernel on torch's tensors: the Python side of attention.h."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnbench.errors import AttnbenchError
from attnbench.plugin import Call
from attnbench.workload import Workload

from ..autograd import Backward, Forward, dense_rows, differentiable
from ..pieces import by_distance, strips
from . import compiler

KEYS, ROWS, TILE_ROWS = 64, 6, 16  # as in vectors.h and amx.h
MAX_DIM, WIDE_DIM = 256, 1024  # the second of the exact kernels
HONOURS = ("scale", "window")  # of the kernels that take a plan
_FAR = 1 << 40

Range = tuple[int, int, bool]
"""Keys [start, end), and whether each row of the strip sees all of them."""


@dataclass(frozen=True)
class Plan:
    """Which keys each strip of query rows sees.

    strips: (first row, end row, its ranges, in ascending order and apart).
    band: (low, high): in ranges that are not whole, row i sees the keys i + low to i + high.
    """

    strips: tuple[tuple[int, int, tuple[Range, ...]], ...]
    band: tuple[int, int] = (-_FAR, _FAR)


def dense(workload: Workload, rows: int) -> Plan:
    """All keys, or those that a causal mask or a window shows, in strips of so many rows."""
    w, window = workload, workload.masked.window
    made = ((part.start, part.stop, ((seen.start, seen.stop, not w.is_causal),)) for part, seen in strips(w, rows))
    low = w.offset + 1 - window if window else -_FAR
    return Plan(tuple(made), (low, w.offset if w.is_causal else _FAR))


def unsupported(workload: Workload, *sources: str, most: int = MAX_DIM) -> str | None:
    """None, or why the kernels of these sources can't compute this workload here. most: of head and value dim."""
    if workload.device != "cpu":
        return "the C++ kernel is for a CPU"
    if max(workload.head_dim, workload.value_dim) > most:
        return f"the C++ kernel holds head and value dims up to {most}"
    return compiler.unsupported(workload.dtype, *sources)


def described(dtype: str) -> str:
    """What multiplies values of this dtype in the kernels."""
    using = compiler.isa()
    name = using.name if using else "of no kind"
    if pairs(dtype) and compiler.has_tiles("bf16"):
        name += " and AMX"
    elif reason := compiler.tiles_refused():
        name += f" (no AMX: {reason})"
    return f"C++ {name}" + ("" if dtype == "float32" else " in bfloat16" if pairs(dtype) else " in float32")


def pairs(dtype: str) -> bool:
    """Whether values of this dtype are multiplied in pairs of 16 bits, and not as float32."""
    return dtype == "bfloat16" and compiler.multiplies_pairs()


def product_dtype(dtype: str) -> torch.dtype:
    """In what torch multiplies matrices of this dtype fastest on this CPU.

    float16 products run element by element, thousands of times slower than in float32, and so, nearly, do those of
    bfloat16 where the CPU has none.
    """
    return torch.bfloat16 if dtype == "bfloat16" and compiler.multiplies_bfloat16() else torch.float32


def has_slow_products(workload: Workload) -> bool:
    """Whether torch multiplies matrices of the workload's dtype element by element on this CPU, as it has no products.

    A single row it multiplies fast in any dtype. False where the system does not say what the CPU has.
    """
    w, has = workload, compiler.features()
    fast = w.dtype == "float32" or (
        compiler.multiplies_bfloat16() if w.dtype == "bfloat16" else not has.isdisjoint(("avx512_fp16", "amx_fp16"))
    )
    return w.device == "cpu" and w.seq > 1 and bool(has) and not fast


class _Tensor(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), *((n, ctypes.c_int64) for n in ("batch", "head", "row")))


class _Range(ctypes.Structure):
    _fields_ = tuple((n, ctypes.c_int32) for n in ("start", "end", "whole"))


class _Strip(ctypes.Structure):
    _fields_ = tuple((n, ctypes.c_int32) for n in ("start", "end", "first_range", "end_range"))


_SIZES = ("batch", "heads", "kv_heads", "seq", "kv_seq", "head_dim", "value_dim")


class _Problem(ctypes.Structure):
    _fields_ = (
        *((n, _Tensor) for n in ("query", "key", "value", "out")),
        *((n, ctypes.c_int64) for n in (*_SIZES, "low", "high", "keys", "strip_rows", "threads")),
        ("scale", ctypes.c_float),
        ("strips", ctypes.POINTER(_Strip)),
        ("strip_count", ctypes.c_int64),
        ("ranges", ctypes.POINTER(_Range)),
        ("lse", ctypes.c_void_p),
        ("pages", ctypes.c_void_p),
        *((n, ctypes.c_int64) for n in ("pages_row", "page_bits")),
        ("bias", ctypes.c_void_p),
        ("bias_row", ctypes.c_int64),
    )


class _Gradients(ctypes.Structure):
    _fields_ = tuple((n, _Tensor) for n in ("out", "query", "key", "value"))


class _Problems:
    """Problems of one workload and plan, for tensors whose last dimension is dense.

    The threads are torch's, as many as it uses when called.

    from_key: a bias is read by how far queries lie from a key, as the backward pass does.
    """

    def __init__(self, workload: Workload, plan: Plan, keys: int, from_key: bool = False) -> None:
        self.workload, self.keys, self.band = workload, keys, plan.band
        line = by_distance(workload)  # (heads, seq + kv_seq - 1)
        if line is not None:  # the kernel reads whole panels
            line = pad((line.flip(-1) if from_key else line) / workload.scale, (0, KEYS))
        self.bias = line
        ranges = [r for _, _, own in plan.strips for r in own]
        strips, at = [], 0
        for start, end, own in plan.strips:
            strips.append((start, end, at, at + len(own)))
            at += len(own)
        self.strips = (_Strip * len(strips))(*(_Strip(*strip) for strip in strips))
        self.ranges = (_Range * max(1, len(ranges)))(*(_Range(*each) for each in ranges))
        self.tallest = max(end - start for start, end, _ in plan.strips)

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor | None = None,
        table: Tensor | None = None,
    ) -> _Problem:  # fmt: skip
        tensors, sizes = map(_tensor, (query, key, value, out)), (getattr(self.workload, name) for name in _SIZES)
        paged = (None, 0, 0) if table is None else (table.data_ptr(), table.shape[1], key.shape[2].bit_length() - 1)
        bias = (None, 0) if self.bias is None else (self.bias.data_ptr(), self.bias.shape[1])
        return _Problem(
            *tensors, *sizes, *self.band, self.keys, self.tallest, torch.get_num_threads(), self.workload.scale,
            self.strips, len(self.strips), self.ranges, None if lse is None else lse.data_ptr(), *paged, *bias,
        )  # fmt: skip


def _fits(x: Tensor, shape: tuple[int, ...]) -> None:
    """Raises: AttnbenchError: the tensor has another shape than the kernel would read or write."""
    if x.shape != shape:
        raise AttnbenchError(f"built for a tensor of shape {shape}, not {tuple(x.shape)}")


def _tensor(x: Tensor) -> _Tensor:
    return _Tensor(x.data_ptr(), *x.stride()[:3])


def _run(kernel: Callable[..., int], *structures: ctypes.Structure) -> None:
    if kernel(*map(ctypes.byref, structures)):
        raise MemoryError("the kernel's workspace could not be allocated")


def caller(kernel: Callable[..., int], workload: Workload, plan: Plan, keys: int) -> Call:
    """The kernel as a function of query, key and value; keys: of a block, a multiple of 64.

    And of the workload's sinks (heads,), where it has them: each takes e^sink of what a row's weights sum up to, which
    leaves sigmoid(log-sum-exp - sink) of the output.
    """
    call = forward(kernel, workload, plan, keys, with_lse=workload.sinks)

    def sunk(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor) -> Tensor:
        out, lse = call(query, key, value)  # (batch, heads, seq, value_dim), (batch, heads, seq)
        return out.mul_(torch.sigmoid(lse - sinks[:, None].float())[..., None].to(out.dtype))

    return sunk if workload.sinks else lambda query, key, value: call(query, key, value)[0]


def paged(
    kernel: Callable[..., int], workload: Workload, plan: Plan, keys: int
) -> Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """As `forward`, over pools of pages (pages, kv_heads, page, dim), a power of 2 of tokens each, and a table of them.

    The table, dense int32 (batch, pages of an entry), says which pages hold the tokens of an entry, in order.
    """
    w, problem = workload, _Problems(workload, plan, keys)

    def call(query: Tensor, key: Tensor, value: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        (query,) = dense_rows(query)
        _fits(query, w.shapes[0])
        out = query.new_empty(w.batch, w.heads, w.seq, w.value_dim)
        lse = query.new_empty(w.batch, w.heads, w.seq, dtype=torch.float32)
        _run(kernel, problem(query, key, value, out, lse, table))
        return out, lse

    return call


def ragged(together: Callable[..., int], apart: Callable[..., int], entries: Sequence[Workload], rows: int, keys: int,
           is_few: Callable[[Workload], bool]) -> Callable[..., Tensor]:  # fmt: skip
    """Kernels over all entries of a ragged batch, as a function of query, key, value and maybe a table.

    together: of many entries at once. apart: of alike entries, for those of few queries over a past (`is_few`), such as
        decoding steps, whose keys it does not pay to pack.
    entries: each as a problem of its own, of which query, key and value, padded, are the batch; or key and value are
        pools of pages, and the table says whose. Rows behind an entry's end are put out as 0.
    rows: of a strip. keys: of a block.
    """
    runs = list(_runs(entries, is_few))
    many = [(own, _problems(entry, rows, keys)) for own, entry, few in runs if not few]
    few = [(own, _problems(entry, rows, keys)) for own, entry, few in runs if few]
    shape = (len(entries), entries[0].heads, max(entry.seq for entry in entries), entries[0].head_dim)

    def call(query: Tensor, key: Tensor, value: Tensor, table: Tensor | None = None) -> Tensor:
        query, key, value = dense_rows(query, key, value)
        _fits(query, (*shape[:2], max(query.shape[2], shape[2]), shape[3]))
        out = query.new_empty(*query.shape[:3], value.shape[3])

        def one(own: slice, problem: _Problems) -> _Problem:
            w = problem.workload
            k, v, pages = key, value, None
            if table is None:
                k, v = (x[own, :, : w.kv_seq] for x in (key, value))
                _fits(k, w.shapes[1])
                _fits(v, w.shapes[2])
            else:
                pages = table[own]
            out[own, :, w.seq :] = 0
            return problem(query[own, :, : w.seq], k, v, out[own, :, : w.seq], table=pages)

        if many:
            made = (_Problem * len(many))(*(one(own, problem) for own, problem in many))
            if together(made, ctypes.c_int64(len(many))):
                raise MemoryError("the kernel's workspace could not be allocated")
        for own, problem in few:
            _run(apart, one(own, problem))
        return out

    return call


def _problems(entry: Workload, rows: int, keys: int) -> _Problems:
    return _Problems(entry, dense(entry, min(rows, entry.seq)), keys)


def _runs(entries: Sequence[Workload], is_few: Callable[[Workload], bool]) -> Iterator[tuple[slice, Workload, bool]]:
    """Entries, and whether they are few: of those the ones that are alike and beside each other as one problem."""
    start = 0
    for entry, alike in groupby(entries):
        count, few = len(list(alike)), is_few(entry)
        for each in (count,) if few else (1,) * count:
            yield slice(start, start + each), entry.replace(batch=each), few
            start += each


def forward(kernel: Callable[..., int], workload: Workload, plan: Plan, keys: int, with_lse: bool = True) -> Forward:
    """As `caller`, with what the backward pass needs: the log-sum-exp of each row, (batch, heads, seq) in float32."""
    w, problem = workload, _Problems(workload, plan, keys)

    def call(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        query, key, value = dense_rows(query, key, value)
        for x, shape in zip((query, key, value), w.shapes, strict=True):
            _fits(x, shape)
        out = query.new_empty(w.batch, w.heads, w.seq, w.value_dim)
        lse = query.new_empty(w.batch, w.heads, w.seq, dtype=torch.float32) if with_lse else None
        _run(kernel, problem(query, key, value, out, lse))
        return (out,) if lse is None else (out, lse)

    return call


def backward(kernel: Callable[..., int], workload: Workload, plan: Plan, keys: int) -> Backward:
    problem = _Problems(workload, plan, keys, from_key=True)

    def call(
        query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, out_gradient: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = dense_rows(query, key, value)
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype) for x in (query, key, value))
        _run(kernel, problem(query, key, value, out, lse), _Gradients(*map(_tensor, (out_gradient, dq, dk, dv))))
        return dq, dk, dv

    return call


def exact_sources(workload: Workload) -> tuple[str, ...]:
    """What `exact` needs compiled."""
    return ("tiled.cpp", "backward.cpp") if workload.phase == "train" else ("tiled.cpp",)


def exact(workload: Workload, forward_plan: Plan, keys: int, backward_plan: Plan, backward_keys: int) -> Call:
    """tiled.cpp, in phase train with backward.cpp behind it.

    Raises:
        CompileError: they can't be compiled, which `unsupported` tells before.
    """
    kernel = compiler.load("tiled.cpp", workload.dtype).tiled
    if workload.phase != "train":
        return caller(kernel, workload, forward_plan, keys)
    back = compiler.load("backward.cpp", workload.dtype).backward
    return differentiable(
        forward(kernel, workload, forward_plan, keys), backward(back, workload, backward_plan, backward_keys)
    )


class _Scales(ctypes.Structure):
    _fields_ = tuple((n, _Tensor) for n in ("key", "value"))


def packed_decoder(kernel: Callable[..., int], workload: Workload) -> Call:
    """A kernel over packed.h's cache as a function of query, key, value, and their scales.

    query: (batch, heads, seq, head_dim); the others as they lie in quantized_cache.py.
    """
    w, problem = workload, _Problems(workload, dense(workload, workload.seq), KEYS)

    def call(query: Tensor, key: Tensor, value: Tensor, key_scale: Tensor, value_scale: Tensor) -> Tensor:
        (query,) = dense_rows(query)
        _fits(query, w.shapes[0])
        out = query.new_empty(w.batch, w.heads, w.seq, w.value_dim)
        _run(kernel, problem(query, key, value, out), _Scales(_tensor(key_scale), _tensor(value_scale)))
        return out

    return call


_TOKENS = ("batch", "kv_heads", "count", "start", "head_dim", "value_dim", "threads")


class _Tokens(ctypes.Structure):
    _fields_ = (
        *((n, _Tensor) for n in ("key", "value", "keys", "values", "key_scales", "value_scales")),
        ("mean", ctypes.c_void_p),
        *((n, ctypes.c_int64) for n in _TOKENS),
    )


def append(kernel: Callable[..., int], key: Tensor, value: Tensor, start: int, mean: Tensor, *cache: Tensor) -> None:
    """A kernel of append.h on new tokens (batch, kv_heads, count, dim), which become those from `start` on of a cache.

    mean: of keys, dense. cache: keys, values and their scales, as they lie in quantized_cache.py; they change in place.
    """
    key, value = dense_rows(key, value)
    sizes = *key.shape[:3], start, key.shape[3], value.shape[3], torch.get_num_threads()
    _run(kernel, _Tokens(*map(_tensor, (key, value, *cache)), mean.data_ptr(), *sizes))


def workspace_bytes(workload: Workload, rows: int, keys: int, packed: int, weight: int | None = None) -> int:
    """What a call holds beside inputs and output.

    rows: of the tallest strip. packed: bytes of a packed key with its value. weight: bytes of one, if not an operand's.
    """
    w, operand = workload, operand_bytes(workload.dtype)
    with_bytes, weight = weight is not None, operand if weight is None else weight
    heads = w.batch * w.kv_heads
    length = round_up(w.kv_seq, KEYS)
    in_tiles = compiler.has_tiles("int8") if with_bytes else pairs(w.dtype) and compiler.has_tiles("bf16")
    tile = (TILE_ROWS if in_tiles else ROWS) * keys * (4 + weight)
    work = rows * (4 * columns(w.value_dim) + operand * w.head_dim + 8) + tile
    return (w.threads if heads >= w.threads else 1) * length * packed + w.threads * work


def packed_bytes(workload: Workload) -> int:
    """Of a key with its value, as exact attention packs them."""
    w, operand = workload, operand_bytes(workload.dtype)
    return operand * (round_up(w.head_dim, 4 // operand) + columns(w.value_dim))


def operand_bytes(dtype: str) -> int:
    return 2 if pairs(dtype) else 4


def columns(dim: int) -> int:
    """Whole registers of float32."""
    using = compiler.isa()
    return round_up(dim, using.lanes if using else 1)


def round_up(n: int, to: int) -> int:
    return -(-n // to) * to
