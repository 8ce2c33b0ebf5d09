"""Tiled attention on a CPU: exact attention computed in pieces that a cache holds ("to improve cache reuse").

Naive attention writes the l x l scores to memory and reads them back: for softmax, then for P V. At l = 8192 they are
256 MiB a head in float32, and memory is a hundred times further than a first-level cache. Two ways to not do that:

- `impl=strip` takes some hundred query rows at a time. Their scores with all keys, rows x l, are made, normalised and
  multiplied by V before the next strip overwrites them. It is the lecture's tiling in three torch calls.
- `impl=native` tiles keys too (FlashAttention: Dao 2022, arXiv 2205.14135). A strip meets blocks of keys one by one,
  and the scores of six rows with a block, 24 KiB, stay in the first-level cache. Softmax over pieces needs a running
  maximum m and sum s: where a block raises m to m', what was summed so far is multiplied by e^(m - m').
  plugins/native has the C++: `tile.h` the stages, `attention.h` the loops. With few queries, as when a decoder adds a
  token to its cache, there is nothing to reuse: `decode.cpp` reads K and V once, from where they lie.

Training needs the scores once more. Neither way keeps them: FlashAttention-2 (Dao 2023, arXiv 2307.08691, section 3.1)
keeps the log-sum-exp of each row, from which a tile of the softmax is made anew: by `plain` or `backward.cpp`.

`rows` and `keys` are the tile: a block holds keys x (head_dim + value_dim) x 2 bytes, which should fit a second-level
cache with the strip's rows; sweep them to see the caches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from attnbench.plugin import Attention, Choice, Implementation, Option, Plugin
from attnbench.workload import Workload

from ..autograd import differentiable
from ..native import attention as kernels
from ..native import compiler
from ..sdpa import Sdpa
from .drafts import Drafts
from .plain import Strips

BIASES = ("alibi-bias", "relative-bias")
STRIP_ROWS = 512
ROWS = 192
BLOCK = 1 << 18  # bytes of packed keys and values of 64 dims to a block, of native
BACKWARD_ROWS, BACKWARD_KEYS = 384, 384  # the sums of each key pass by with every strip
FEW, FEW_WIDE = 32, 256  # queries of a key/value head up to which packing it does not pay; over 256 dims


class Tiled(Choice):
    """softmax(Q K^T * scale) V a tile at a time, on a CPU.

    `impl=auto` is native where this machine can. Else it is strip for bfloat16 if the CPU has such products, and where
    it has not, and in other dtypes, torch's scaled_dot_product_attention: tiles in torch gain nothing there.
    """

    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    options: ClassVar[Mapping[str, Option]] = {
        "impl": Option("auto", "what computes it", ("auto", "strip", "native", "sdpa")),
        "rows": Option(0, f"rows of a strip; 0: {STRIP_ROWS} for strip, {ROWS} for native, backward {BACKWARD_ROWS}"),
        "keys": Option(
            0, f"native, backward: keys of a block, in 64s; 0: 1024 or 512, native backward {BACKWARD_KEYS}"
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
            alone = w.softcap or w.sinks or w.bias  # sdpa has neither of two, and the third as a matrix in memory
            return None if w.dtype == "bfloat16" or alone else f"tiles gain nothing in {w.dtype}"

        def slow(w: Workload) -> str | None:
            return "float16 products run element by element on a CPU" if w.dtype == "float16" else None

        native = Implementation(
            "native",
            self._native,
            _no_kernel,
            workspace_bytes=self._native_bytes,
            honours=("scale", "window", "tree", "sinks", *BIASES),
            ragged=not workload.trains and not workload.masked.branches,
        )
        emulated = kernels.has_slow_products(workload)
        honours: tuple[str, ...] = ("scale", "window", *BIASES)
        honours += () if workload.trains else ("tree", "softcap", "sinks")
        strip = Implementation(
            "strip", self._strip, slow, no_gain, self._strip_bytes, emulated=emulated, honours=honours
        )
        sdpa = Implementation("sdpa", Sdpa().build, workspace_bytes=Sdpa().workspace_bytes, honours=Sdpa.honours)
        return (native, strip, sdpa) if compiler.multiplies_bfloat16() else (native, sdpa, strip)

    def kernel(self, workload: Workload) -> tuple[Callable[..., int], Workload, kernels.Plan, int]:
        """What computes it without gradients, the problem, its strips of rows, and the keys of a block."""
        name = "decode" if _few(workload) else "tiled"
        plan = kernels.dense(workload, self._rows(workload, ROWS))
        return getattr(compiler.load(f"{name}.cpp", workload.dtype), name), workload, plan, self._keys(workload)

    def over_entries(self, workload: Workload) -> tuple[Callable[..., Tensor], str]:
        """All entries of a ragged batch in one call, and in what pieces."""
        w, rows, entries = workload, self.rows or ROWS, workload.entries()
        tiled = compiler.load("tiled.cpp", w.dtype).tiled_ragged
        decode = compiler.load("decode.cpp", w.dtype).decode
        steps = sum(map(_is_step, entries))
        how = [f"all entries together, strips of {rows} rows"] if steps < len(entries) else []
        how += ["K and V of few queries read once"] if steps else []
        return kernels.ragged(tiled, decode, entries, rows, self._keys(w), _is_step), ", ".join(how)

    def _native(self, workload: Workload) -> Attention:
        w = workload
        if w.lengths:
            call, how = self.over_entries(w)
            return Attention(call, f"{kernels.described(w.dtype)}, {how}")
        if w.masked.branches:
            return self._tree(w)
        kernel, _, plan, keys = self.kernel(w)
        how = f"strips of {self._rows(w, ROWS)} rows, blocks of {keys} keys"
        if w.phase == "train":
            more, wide = min(self.rows or BACKWARD_ROWS, w.seq), self.keys or BACKWARD_KEYS
            call = kernels.exact(w, plan, keys, kernels.dense(w, more), wide)
            how += f"; backward {more} and {wide}"
        else:
            call = kernels.caller(kernel, w, plan, keys)
            how = "K and V read once" if _few(w) else how
        return Attention(call, f"{kernels.described(w.dtype)}, {how}")

    def _tree(self, workload: Workload) -> Attention:
        w, drafts = workload, Drafts(workload)
        past = kernels.forward(*self.kernel(drafts.past)) if drafts.past else None

        def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            on_past = past(query, key[:, :, : w.past], value[:, :, : w.past]) if past else ()
            return drafts(query, key[:, :, w.past :], value[:, :, w.past :], on_past)

        return Attention(call, f"{kernels.described(w.dtype)} on the past, plain torch on {w.seq} drafts")

    def _native_bytes(self, workload: Workload) -> int | None:
        w = workload
        if w.phase == "train" or _few(w) or w.masked.branches:
            return None  # of few it is little: some kilobytes for each query
        return kernels.workspace_bytes(w, self._rows(w, ROWS), self._keys(w), kernels.packed_bytes(w))

    def _strip(self, workload: Workload) -> Attention:
        rows = self._rows(workload, STRIP_ROWS)
        how = f"plain torch, strips of {rows} rows"
        strips = Strips(workload, rows, self.keys or 1024)
        if workload.phase != "train":
            return Attention(strips, how)
        return Attention(differentiable(strips.forward, strips.backward), f"{how} forward and backward")

    def _strip_bytes(self, workload: Workload) -> int | None:
        w = workload
        if w.phase == "train":
            return None
        rows = self._rows(w, STRIP_ROWS)
        scores = rows * ((3 if w.bias else 1) * w.kv_seq + w.head_dim) * w.itemsize
        return min(w.threads, w.batch * w.heads) * scores

    def _keys(self, workload: Workload) -> int:
        return self.keys or BLOCK // (128 * kernels.operand_bytes(workload.dtype))

    def _rows(self, workload: Workload, usual: int) -> int:
        return min(self.rows or usual, workload.seq)


def exact_here(workload: Workload) -> Plugin:
    """Exact attention for a variant that calls it: `tiled` on a CPU, `sdpa` elsewhere."""
    return Tiled() if workload.device == "cpu" else Sdpa()


def _no_kernel(workload: Workload) -> str | None:
    w, sources = workload, ("decode.cpp",) if _few(workload) else kernels.exact_sources(workload)
    if w.lengths and not w.trains:
        sources = "tiled.cpp", "decode.cpp"
    return kernels.unsupported(w, *sources, most=kernels.WIDE_DIM)


def _is_step(entry: Workload) -> bool:
    """Whether an entry of a ragged batch is read as a decoder's step is: with little to pack, packing it is as fast."""
    return _few(entry) and entry.kv_seq > entry.seq


def _few(workload: Workload) -> bool:
    w = workload
    most = FEW if max(w.head_dim, w.value_dim) <= kernels.MAX_DIM else FEW_WIDE
    return (
        w.phase != "train" and w.seq * w.group <= most and not w.masked.window and not w.sinks
    )  # decode.cpp knows of neither
