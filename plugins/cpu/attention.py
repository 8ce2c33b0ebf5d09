"""Calls a compiled kernel on torch's tensors: the Python side of attention.h."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from attnbench.plugin import Call
from attnbench.workload import Workload

from . import compiler

KEYS, LANES, ROWS = 64, 16, 6  # as in tile.h
MAX_DIM = 256
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
    """All keys, or with a causal mask those up to the diagonal, in strips of so many rows."""
    w = workload
    starts = [(i, min(i + rows, w.seq)) for i in range(0, w.seq, rows)]
    if not w.is_causal:
        return Plan(tuple((i, end, ((0, w.kv_seq, True),)) for i, end in starts))
    strips = ((i, end, ((0, min(end + w.offset, w.kv_seq), False),)) for i, end in starts)
    return Plan(tuple(strips), (-_FAR, w.offset))


def unsupported(workload: Workload) -> str | None:
    """None, or why the bfloat16 kernels can't compute this workload here."""
    if workload.device != "cpu":
        return "the AVX-512 kernel is for a CPU"
    if workload.dtype != "bfloat16":
        return "the AVX-512 kernel is for bfloat16"
    if max(workload.head_dim, workload.value_dim) > MAX_DIM:
        return f"the AVX-512 kernel holds head and value dims up to {MAX_DIM}"
    return compiler.unsupported()


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
    )


def caller(kernel: Callable[..., int], workload: Workload, plan: Plan, keys: int) -> Call:
    """The kernel as a function of query, key and value; keys: of a block, a multiple of 64.

    The threads are torch's, as many as it uses when called.
    """
    w = workload
    ranges = [r for _, _, own in plan.strips for r in own]
    strips, at = [], 0
    for start, end, own in plan.strips:
        strips.append((start, end, at, at + len(own)))
        at += len(own)
    c_strips, c_ranges = (_Strip * len(strips))(*strips), (_Range * max(1, len(ranges)))(*ranges)
    tallest = max(end - start for start, end, _ in plan.strips)

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
        out = query.new_empty(w.batch, w.heads, w.seq, w.value_dim)
        problem = _Problem(
            *(_Tensor(x.data_ptr(), *x.stride()[:3]) for x in (query, key, value, out)),
            *(getattr(w, name) for name in _SIZES),
            *plan.band,
            keys,
            tallest,
            torch.get_num_threads(),
            w.scale,
            c_strips,
            len(strips),
            c_ranges,
        )
        if kernel(ctypes.byref(problem)):
            raise MemoryError("the kernel's workspace could not be allocated")
        return out

    return call


def workspace_bytes(workload: Workload, rows: int, keys: int, packed: int, weight: int = 2) -> int:
    """What a call holds beside inputs and output.

    rows: of the tallest strip. packed: bytes of a packed key with its value. weight: bytes of one.
    """
    w = workload
    heads = w.batch * w.kv_heads
    length = round_up(w.kv_seq, KEYS)
    work = rows * (4 * round_up(w.value_dim, LANES) + 2 * w.head_dim + 8) + ROWS * keys * (4 + weight)
    return (w.threads if heads >= w.threads else 1) * length * packed + w.threads * work


def bf16_bytes(workload: Workload) -> int:
    """Of a key with its value, packed in bfloat16."""
    return 2 * (round_up(workload.head_dim, 2) + round_up(workload.value_dim, LANES))


def round_up(n: int, to: int) -> int:
    return -(-n // to) * to
