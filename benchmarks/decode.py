"""One query against a cache: the share of the machine's read bandwidth, by how it is kept and by instruction set.

python benchmarks/decode.py [--rounds 30] [--out FILE]

Each round times, in one process, by turns: torch's sum over as many bytes as a 16-bit cache has, `sdpa` in bfloat16,
`tiled` by dtype, and a step of each quantized cache (queries in bfloat16). Of each the fastest call counts, as for a
roofline: whatever disturbs a call makes it slower. 16 bits are `tiled` in bfloat16 on the same instruction set.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import click
import shared
import torch

from attnbench.devices.device import describe
from attnbench.workload import Workload

EXACT = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes
QUANTIZED = ("int8", "int4", "fp8", "fp8:format=e5m2")


def exact(w: Workload) -> tuple[Callable[[], object], int]:
    """`tiled` on tensors of the workload, and the bytes of its cache."""
    call, tensors = shared.call_of("tiled", w), shared.tensors_of(w)
    return lambda: call(*tensors), sum(x.nbytes for x in tensors[1:])


def quantized(spec: str, w: Workload) -> tuple[Callable[[], object], int]:
    """A step of this plugin, its own token quantized, and the bytes of its cache."""
    w = w.replace(phase="decode", mask="causal")
    made, (query, key, value) = shared.plugin_of(spec).decoding(w), shared.tensors_of(w.replace(phase="forward"))
    state = made.start(key[:, :, :-1], value[:, :, :-1], capacity=w.kv_seq)
    new = key[:, :, -1:].clone(), value[:, :, -1:].clone()
    return lambda: made.step(state, query, *new), sum(x.nbytes for x in state if isinstance(x, torch.Tensor))


def prepare(w: Workload, isas: tuple[str, ...]) -> tuple[dict[str, Callable[[], object]], dict[str, int]]:
    """What is timed, by name, and the bytes that it has to read."""
    buffer = torch.ones(2 * w.kv_seq * w.kv_heads * w.head_dim // 2)
    sdpa, tensors = shared.call_of("sdpa", w), shared.tensors_of(w)
    work: dict[str, Callable[[], object]] = {"read": buffer.sum, "sdpa": lambda: sdpa(*tensors)}
    size = dict.fromkeys(work, buffer.nbytes)
    for isa in isas:
        with shared.kernels_for(isa):
            for dtype in EXACT:
                name = f"{dtype} {isa}"
                work[name], size[name] = exact(w.replace(dtype=dtype))
            for spec in QUANTIZED:
                name = f"{spec} {isa}"
                work[name], size[name] = quantized(spec, w)
    return work, size


def show(length: int, times: dict[str, list[float]], size: dict[str, int]) -> None:
    best = {name: min(own) for name, own in times.items()}
    rates = {name: size[name] / own / 1e9 for name, own in best.items()}
    click.echo(f"{length} keys: {size['read'] / 2**20:.0f} MiB in 16 bits, read at {rates['read']:.1f} GB/s")
    for name, own in best.items():
        if name == "read":
            continue
        figures = (
            f"{own * 1e3:7.2f} ms",
            f"{size[name] / 2**20:6.1f} MiB",
            f"{rates[name]:5.1f} GB/s ({rates[name] / rates['read']:.0%})",
            f"{best.get(f'bfloat16 {name.split()[-1]}', own) / own:5.2f} x 16 bits",
            f"{best['sdpa'] / own:6.2f} x sdpa",
        )
        click.echo(f"  {name:26} {'  '.join(figures)}")


@click.command()
@click.option("--seq", "lengths", multiple=True, type=int, default=(8192, 65536), show_default=True)
@click.option("--rounds", default=30, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--isa", "isas", multiple=True, default=("auto", "avx2"), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Write every time here, as JSON.")
def main(lengths: tuple[int, ...], rounds: int, threads: int, isas: tuple[str, ...], out: Path | None) -> None:
    """32 query heads over 8 key/value heads of 128: measure, and print a line for each way to keep the cache."""
    torch.set_num_threads(threads)
    record: dict[str, object] = {"machine": describe(), "threads": threads}
    for length in lengths:
        w = Workload(
            seq=1, kv_seq=length, heads=32, kv_heads=8, head_dim=128, value_dim=128, dtype="bfloat16", threads=threads
        )
        work, size = prepare(w, isas)
        times: dict[str, list[float]] = {name: [] for name in work}
        for turn in range(rounds + 2):
            for name, f in work.items():
                start = time.perf_counter()
                f()
                if turn >= 2:
                    times[name].append(time.perf_counter() - start)
        show(length, times, size)
        record[str(length)] = {"times": times, "bytes": size}
    if out:
        out.write_text(json.dumps(record))


if __name__ == "__main__":
    main()
