"""Tiled attention on a CPU: exact attention computed in pieces that a cache holds ("to improve cache reuse").

Naive attention writes the l x l scores to memory and reads them back: for softmax, then for P V. At l = 8192 they are
256 MiB a head in float32, and memory is a hundred times further than a first-level cache. Two ways to not do that:

- `impl=strip` takes some hundred query rows at a time. Their scores with all keys, rows x l, are made, normalised and
  multiplied by V before the next strip overwrites them. It is the lecture's tiling in three torch calls.
- `impl=avx512` tiles keys too (FlashAttention: Dao 2022, arXiv 2205.14135). A strip meets blocks of keys one by one,
  and the scores of six rows with a block, 24 KiB, stay in the first-level cache. Softmax over pieces needs a running
  maximum m and sum s: where a block raises m to m', what was summed so far is multiplied by e^(m - m').
  plugins/cpu has the C++: `tile.h` the stages, `attention.h` the loops. With few queries, as when a decoder adds a
  token to its cache, there is nothing to reuse: `decode.cpp` reads K and V once, from where they lie.

`rows` and `keys` are the tile: a block holds keys x (head_dim + value_dim) x 2 bytes, which should fit a second-level
cache with the strip's rows; sweep them to see the caches.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import ClassVar

import torch
from torch import Tensor

from attnbench.plugin import Attention, Call, Option, Plugin
from attnbench.workload import Workload

from .cpu import attention as kernels
from .cpu import compiler
from .sdpa import Sdpa

STRIP_ROWS = 512
ROWS, BLOCK_KEYS = 192, 1024
FEW = 4  # queries of a key/value head up to which packing it does not pay


class Tiled(Plugin):
    """softmax(Q K^T * scale) V a tile at a time, on a CPU.

    `impl=auto` is avx512 for bfloat16 where this machine can, else strip. In other dtypes it hands over to torch's
    scaled_dot_product_attention: float32 has no faster product than the one used there.
    """

    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    options: ClassVar[Mapping[str, Option]] = {
        "impl": Option("auto", "what computes it", ("auto", "strip", "avx512")),
        "rows": Option(0, f"query rows of a strip; 0: {STRIP_ROWS} for strip, {ROWS} for avx512"),
        "keys": Option(0, f"avx512: keys of a block, in 64s; 0: {BLOCK_KEYS}"),
    }
    impl: str
    rows: int
    keys: int

    def supports(self, workload: Workload) -> str | None:
        if self.rows < 0 or self.keys < 0 or self.keys % kernels.KEYS:
            return f"rows must not be negative, and keys a multiple of {kernels.KEYS}"
        if self.impl == "strip" and workload.dtype == "float16":
            return "float16 products run element by element on a CPU"
        return kernels.unsupported(workload) if self.impl == "avx512" else None

    def workspace_bytes(self, workload: Workload) -> int | None:
        kind, _ = self._kind(workload)
        if kind == "sdpa":
            return Sdpa().workspace_bytes(workload)
        if kind == "strip":
            scores = self._rows(workload, kind) * (workload.kv_seq + workload.head_dim) * workload.itemsize
            return min(workload.threads, workload.batch * workload.heads) * scores
        if _few(workload):
            return None  # little: a few kilobytes for each query
        packed, keys = kernels.bf16_bytes(workload), self.keys or BLOCK_KEYS
        return kernels.workspace_bytes(workload, self._rows(workload, kind), keys, packed)

    def build(self, workload: Workload) -> Attention:
        kind, reason = self._kind(workload)
        if kind == "avx512":
            few = _few(workload)
            source, name = ("decode.cpp", "decode") if few else ("tiled.cpp", "tiled")
            kernel, problem = compiler.kernel(source, name, required=self.impl == "avx512")
            if kernel:
                rows, keys = self._rows(workload, kind), self.keys or BLOCK_KEYS
                how = "K and V read once" if few else f"strips of {rows} rows, blocks of {keys} keys"
                call = kernels.caller(kernel, workload, kernels.dense(workload, rows), keys)
                return Attention(call, f"C++ AVX512-BF16, {how}")
            kind, reason = "strip", f" ({problem})"
        if kind == "strip":
            rows = self._rows(workload, kind)
            return Attention(strips(workload, rows), f"plain torch, strips of {rows} rows{reason}")
        sdpa = Sdpa().build(workload)
        assert isinstance(sdpa, Attention)
        return Attention(sdpa.call, f"{sdpa.implementation}{reason}")

    def _kind(self, workload: Workload) -> tuple[str, str]:
        """strip, avx512 or sdpa, and why not the better one."""
        if self.impl != "auto":
            return self.impl, ""
        if workload.dtype != "bfloat16":
            return "sdpa", f" (tiles gain nothing in {workload.dtype})"
        missing = kernels.unsupported(workload)
        return ("strip", f" ({missing})") if missing else ("avx512", "")

    def _rows(self, workload: Workload, kind: str) -> int:
        return min(self.rows or (STRIP_ROWS if kind == "strip" else ROWS), workload.seq)


def _few(workload: Workload) -> bool:
    return workload.seq * workload.group <= FEW


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
        heads = list(product(range(w.batch), range(w.heads)))
        threads = min(torch.get_num_threads(), len(heads))

        def work(thread: int) -> None:
            buffer = query.new_empty(rows * w.kv_seq)
            for b, h in heads[thread::threads]:
                attend(query[b, h], key[b, h // w.group], value[b, h // w.group], out[b, h], buffer)

        if threads == 1:
            work(0)
        else:
            with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                list(pool.map(work, range(threads)))
        return out

    return call
