"""What `gpu_kernels.py --tune` does: kernels with each tile that they know of, the default first.

int8's own candidates, and for block-sparse what flex_attention can be told. Times are medians of do_bench's calls in
one process: good for choosing between tiles, not for saying how fast a kernel is. A tile that does not compile, or
whose output is not that of the default, says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import click
import shared
import torch
from attnbench_plugins.block_sparse import BlockSparse
from attnbench_plugins.block_sparse.flex_attention import flex
from attnbench_plugins.int8 import Int8
from torch import Tensor

from attnbench.workload import Workload

# torch's FlexKernelOptions; num_warps and num_stages with them, since each tile has its own best.
FLEX: tuple[Mapping[str, int | bool], ...] = (
    {},
    {"USE_TMA": True},
    {"PRESCALE_QK": True},
    {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2},
    {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
    {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 4},
    {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
)
CLOSE = 2e-2  # relative L2 between two tiles of one kernel, whose sums are taken in another order
Named = tuple[str, Callable[[], Callable[[], Tensor]]]
"""What a tile is called, and what builds a call with it."""


def int8_calls(w: Workload, tensors: list[Tensor]) -> Iterator[Named]:
    from attnbench_plugins.int8 import triton_kernels

    dims = triton_kernels.padded_dims(w.head_dim, w.value_dim)
    rows = int(Int8.options["rows"].default)
    for tiles in triton_kernels.candidates(*dims, w.dtype == "float32"):
        call = partial(triton_kernels.attention, *tensors, w.scale, w.is_causal, rows, tiles=tiles)
        yield str(tiles), lambda call=call: call


def flex_calls(w: Workload, tensors: list[Tensor]) -> Iterator[Named]:
    pattern = BlockSparse(window=1024)._pattern(w)
    for options in FLEX:

        def build(options: Mapping[str, int | bool] = options) -> Callable[[], Tensor]:
            return partial(flex(w, pattern, options), *tensors)

        yield str(dict(options) or "torch's own"), build


def tune(workloads: list[Workload]) -> None:
    """Prints a line for each tile, and the best beside the default."""
    for w in workloads:
        tensors = shared.tensors_of(w)
        for name, calls in (("int8", int8_calls), ("block-sparse:window=1024", flex_calls)):
            click.echo(f"\n{name}, {w.label()}")
            with torch.no_grad():
                best(list(calls(w, tensors)), _milliseconds)


def best(calls: list[Named], milliseconds: Callable[[Callable[[], Tensor]], float]) -> str | None:
    """The fastest, by name; of the first nothing but its own output is asked."""
    wanted, took = None, {}
    for tiles, build in calls:
        try:
            call = build()
            out = call().float()
            wanted = out if wanted is None else wanted
            off = float((out - wanted).norm() / wanted.norm())
            if not off <= CLOSE:
                click.echo(f"  WRONG, off by {off:.2g}  {tiles}")
                continue
            took[tiles] = milliseconds(call)
        except Exception as problem:  # whatever a compiler says of a tile that is too large
            click.echo(f"  fails  {tiles}: {(str(problem).splitlines() or [type(problem).__name__])[0][:90]}")
            continue
        click.echo(f"  {took[tiles]:8.4f} ms  {tiles}")
    if not took:
        return None
    fastest = min(took, key=lambda tiles: took[tiles])
    default = calls[0][0]
    beside = f"{took[default] / took[fastest]:.3f} x the default {default}" if default in took else "the default fails"
    click.echo(f"  best: {fastest}, {beside}")
    return fastest


def _milliseconds(call: Callable[[], Tensor]) -> float:
    from triton.testing import do_bench

    return float(do_bench(call, return_mode="median"))
