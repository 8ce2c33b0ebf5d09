"""Tiled attention on a CPU: exact attention computed in pieces that a cache holds ("to improve cache reuse").

Naive attention writes the l x l scores to memory and reads them back: for softmax, then for P V. At l = 8192 they are
256 MiB a head in float32, and memory is a hundred times further than a first-level cache. Two ways to not do that:

- `impl=strip` takes some hundred query rows at a time. Their scores with all keys, rows x l, are made, normalised and
  multiplied by V before the next strip overwrites them. It is the lecture's tiling in three torch calls.
- `impl=avx512` tiles keys too (FlashAttention: Dao 2022, arXiv 2205.14135). A strip meets blocks of keys one by one,
  and the scores of six rows with a block, 24 KiB, stay in the first-level cache. Softmax over pieces needs a running
  maximum m and sum s: where a block raises m to m', what was summed so far is multiplied by e^(m - m').
  plugins/native has the C++: `tile.h` the stages, `attention.h` the loops. With few queries, as when a decoder adds a
  token to its cache, there is nothing to reuse: `decode.cpp` reads K and V once, from where they lie.

Training needs the scores once more. Neither way keeps them: FlashAttention-2 (Dao 2023, arXiv 2307.08691, section 3.1)
keeps the log-sum-exp of each row, from which a tile of the softmax is made anew. `Strips` does so in plain torch,
`backward.cpp` in C++.

`rows` and `keys` are the tile: a block holds keys x (head_dim + value_dim) x 2 bytes, which should fit a second-level
cache with the strip's rows; sweep them to see the caches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import ClassVar

import torch
from torch import Tensor

from attnbench.plugin import Attention, Call, Choice, Implementation, Option
from attnbench.workload import Workload

from .autograd import differentiable
from .native import attention as kernels
from .native import compiler
from .sdpa import Sdpa

STRIP_ROWS = 512
ROWS, BLOCK_KEYS = 192, 1024
BACKWARD_ROWS, BACKWARD_KEYS = 384, 384  # the sums of each key pass by with every strip
LOG2_E = 1 / math.log(2)
FEW = 4  # queries of a key/value head up to which packing it does not pay


class Tiled(Choice):
    """softmax(Q K^T * scale) V a tile at a time, on a CPU.

    `impl=auto` is avx512 for bfloat16 where this machine can, else strip if its CPU has bfloat16 products. Without
    them, and in other dtypes, it hands over to torch's scaled_dot_product_attention: no faster product is to be had.
    """

    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    options: ClassVar[Mapping[str, Option]] = {
        "impl": Option("auto", "what computes it", ("auto", "strip", "avx512")),
        "rows": Option(0, f"rows of a strip; 0: {STRIP_ROWS} for strip, {ROWS} for avx512, backward {BACKWARD_ROWS}"),
        "keys": Option(
            0, f"avx512, backward: keys of a block, in 64s; 0: {BLOCK_KEYS}, avx512 backward {BACKWARD_KEYS}"
        ),
    }
    rows: int
    keys: int

    def supports(self, workload: Workload) -> str | None:
        if self.rows < 0 or self.keys < 0 or self.keys % kernels.KEYS:
            return f"rows must not be negative, and keys a multiple of {kernels.KEYS}"
        return super().supports(workload)

    def implementations(self, workload: Workload) -> Sequence[Implementation]:
        def no_gain(w: Workload) -> str | None:
            return None if w.dtype == "bfloat16" else f"tiles gain nothing in {w.dtype}"

        def slow(w: Workload) -> str | None:
            return "float16 products run element by element on a CPU" if w.dtype == "float16" else None

        avx512 = Implementation("avx512", self._avx512, _no_kernel, no_gain, self._avx512_bytes)
        strip = Implementation("strip", self._strip, slow, no_gain, self._strip_bytes)
        sdpa = Implementation("sdpa", Sdpa().build, workspace_bytes=Sdpa().workspace_bytes)
        return (avx512, strip, sdpa) if compiler.multiplies_bfloat16() else (avx512, sdpa, strip)

    def _avx512(self, workload: Workload) -> Attention:
        w = workload
        rows, keys = self._rows(w, ROWS), self.keys or BLOCK_KEYS
        plan, how = kernels.dense(w, rows), f"strips of {rows} rows, blocks of {keys} keys"
        if _few(w):
            call, how = kernels.caller(compiler.load("decode.cpp").decode, w, plan, keys), "K and V read once"
        elif w.phase == "train":
            more, wide = min(self.rows or BACKWARD_ROWS, w.seq), self.keys or BACKWARD_KEYS
            call = kernels.exact(w, plan, keys, kernels.dense(w, more), wide)
            how += f"; backward {more} and {wide}"
        else:
            call = kernels.exact(w, plan, keys, plan, keys)
        return Attention(call, f"C++ AVX512-BF16, {how}")

    def _avx512_bytes(self, workload: Workload) -> int | None:
        w = workload
        if w.phase == "train" or _few(w):
            return None  # of few it is little: some kilobytes for each query
        return kernels.workspace_bytes(w, self._rows(w, ROWS), self.keys or BLOCK_KEYS, kernels.bf16_bytes(w))

    def _strip(self, workload: Workload) -> Attention:
        rows = self._rows(workload, STRIP_ROWS)
        how = f"plain torch, strips of {rows} rows"
        if workload.phase != "train":
            return Attention(strips(workload, rows), how)
        both = Strips(workload, rows, self.keys or BLOCK_KEYS)
        return Attention(differentiable(both.forward, both.backward), f"{how} forward and backward")

    def _strip_bytes(self, workload: Workload) -> int | None:
        w = workload
        if w.phase == "train":
            return None
        scores = self._rows(w, STRIP_ROWS) * (w.kv_seq + w.head_dim) * w.itemsize
        return min(w.threads, w.batch * w.heads) * scores

    def _rows(self, workload: Workload, usual: int) -> int:
        return min(self.rows or usual, workload.seq)


def _no_kernel(workload: Workload) -> str | None:
    return kernels.unsupported(workload, *(("decode.cpp",) if _few(workload) else kernels.exact_sources(workload)))


def _few(workload: Workload) -> bool:
    return workload.phase != "train" and workload.seq * workload.group <= FEW


def strips(workload: Workload, rows: int) -> Call:
    """Plain torch: for each head, a strip of query rows at a time over all keys that they see.

    Each thread takes heads of its own: threads that share one strip would wait for each other at every product.
    """
    w = workload
    future = torch.ones(rows, rows, dtype=torch.bool).triu(1)  # True where the key lies after the query

    def attend(q: Tensor, k: Tensor, v: Tensor, out: Tensor, buffer: Tensor) -> None:
        """One head: q (seq, head_dim), k (kv_seq, head_dim), v (kv_seq, value_dim), out (seq, value_dim)."""
        for start in range(0, w.seq, rows):
            end = min(start + rows, w.seq)
            seen = end + w.offset if w.is_causal else w.kv_seq
            s = buffer[: (end - start) * seen].view(end - start, seen)
            torch.mm(q[start:end] * w.scale, k[:seen].T, out=s)
            if w.is_causal:
                diagonal = s[:, start + w.offset :]  # (rows, rows)
                diagonal.masked_fill_(future[: end - start, : end - start], float("-inf"))
            torch.softmax(s, dim=-1, out=s)
            torch.mm(s, v[:seen], out=out[start:end])

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(w.batch, w.heads, w.seq, w.value_dim)

        def work(heads: list[tuple[int, int]]) -> None:
            buffer = query.new_empty(rows * w.kv_seq)
            for b, h in heads:
                attend(query[b, h], key[b, h // w.group], value[b, h // w.group], out[b, h], buffer)

        _share(work, w.batch, w.heads)
        return out

    return call


def _share(work: Callable[[list[tuple[int, int]]], None], batch: int, heads: int) -> None:
    """All (batch entry, head) to threads that torch's are divided among, each of which works through its own."""
    tasks, available = list(product(range(batch), range(heads))), torch.get_num_threads()
    threads = min(available, len(tasks))
    if threads == 1:
        work(tasks)
        return
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(available // threads,)) as pool:
        list(pool.map(work, (tasks[i::threads] for i in range(threads))))


class Strips:
    """`strips` for training: `forward` tells the log-sum-exp of each row, with which `backward` makes P anew.

    FlashAttention-2 (Dao 2023), algorithm 2, over strips of rows and blocks of keys: P = exp(S - lse),
    delta = rowsum(dO * O), dV += P^T dO, dP = dO V^T, dS = P * (dP - delta), dQ += dS K * scale, dK += dS^T Q * scale.
    """

    def __init__(self, workload: Workload, rows: int, keys: int) -> None:
        self.workload, self.rows, self.keys = workload, rows, keys

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        w = self.workload
        out = query.new_empty(w.batch, w.heads, w.seq, w.value_dim)
        lse = query.new_empty(w.batch, w.heads, w.seq, dtype=torch.float32)

        def work(heads: list[tuple[int, int]]) -> None:
            room = _Room(self.rows * w.kv_seq, query.dtype)
            for b, h in heads:
                k, v = key[b, h // w.group], value[b, h // w.group]
                for strip, seen in self.strips():
                    s = self.scores(query[b, h, strip], k[seen], strip, seen, room).mul_(w.scale)
                    top = s.amax(-1)
                    p = torch.softmax(s, -1, out=s)
                    lse[b, h, strip] = top - p.amax(-1).log()
                    torch.mm(room.narrow(p), v[seen], out=out[b, h, strip])

        _share(work, w.batch, w.heads)
        return out, lse

    def backward(
        self, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, out_gradient: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        w = self.workload
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype) for x in (query, key, value))

        def work(kv_heads: list[tuple[int, int]]) -> None:
            room = _Room(self.rows * min(self.keys, w.kv_seq), query.dtype)
            for b, h in kv_heads:
                sums = torch.zeros(w.kv_seq, w.head_dim), torch.zeros(w.kv_seq, w.value_dim)  # float32
                for query_head, (strip, seen) in product(range(h * w.group, (h + 1) * w.group), self.strips()):
                    q, up = query[b, query_head, strip], out_gradient[b, query_head, strip]
                    delta = (up.float() * out[b, query_head, strip]).sum(-1, keepdim=True)
                    shift = lse[b, query_head, strip, None] * -LOG2_E
                    q_sum = torch.zeros(q.shape)
                    for start in range(0, seen.stop, self.keys):
                        part = slice(start, min(start + self.keys, seen.stop))
                        k = key[b, h, part]
                        s = self.scores(q, k, strip, part, room)
                        p = torch.add(shift, s, alpha=w.scale * LOG2_E, out=s).exp2_()  # four times as fast as exp
                        sums[1][part] += room.narrow(p).T @ up
                        ds = room.narrow(room.product(1, up, value[b, h, part]).sub_(delta).mul_(p))
                        q_sum += ds @ k
                        sums[0][part] += ds.T @ q
                    dq[b, query_head, strip] = q_sum.mul_(w.scale)
                dk[b, h], dv[b, h] = sums[0].mul_(w.scale), sums[1]

        _share(work, w.batch, w.kv_heads)
        return dq, dk, dv

    def strips(self) -> list[tuple[slice, slice]]:
        """Query rows, and the keys that they see."""
        w = self.workload
        strips = (slice(i, min(i + self.rows, w.seq)) for i in range(0, w.seq, self.rows))
        return [(strip, slice(0, strip.stop + w.offset if w.is_causal else w.kv_seq)) for strip in strips]

    def scores(self, q: Tensor, k: Tensor, rows: slice, keys: slice, room: _Room) -> Tensor:
        """Q K^T in float32, of some rows with some keys; -inf where a row does not see a key."""
        w = self.workload
        s = room.product(0, q, k)
        if w.is_causal and keys.stop > rows.start + w.offset + 1:
            last = torch.arange(rows.start, rows.stop)[:, None] + w.offset
            s.masked_fill_(torch.arange(keys.start, keys.stop) > last, -torch.inf)
        return s


class _Room:
    """What a thread works in: two matrices of a strip in float32, and for narrower inputs one in their dtype."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        self.wide = torch.empty(2, size)
        self.low = None if dtype == torch.float32 else torch.empty(size, dtype=dtype)

    def product(self, which: int, a: Tensor, b: Tensor) -> Tensor:
        """a b^T in float32, in one of the two matrices."""
        shape = len(a), len(b)
        wide = self.wide[which, : len(a) * len(b)].view(shape)
        if self.low is None:
            return torch.mm(a, b.T, out=wide)
        # torch rounds it to bfloat16: a score of 3 is off by up to 1/128, and so is its exponential. What rounding lost
        # is the same product once more, less what it was rounded to.
        low = self.low[: len(a) * len(b)].view(shape)
        wide.copy_(torch.mm(a, b.T, out=low))
        return wide.add_(torch.addmm(low, a, b.T, beta=-1, out=low))

    def narrow(self, x: Tensor) -> Tensor:
        """x in the inputs' dtype, until the next product."""
        return x if self.low is None else self.low[: x.numel()].view(x.shape).copy_(x)
