"""Whether attnbench's peak memory is what a call really touches: `python benchmarks/memory.py [--device cuda]`.

A call that touches a known number of bytes and gives them back is measured at its first and at its third run, each
size in a process of its own that was forked as a worker is. Then naive attention, and on a GPU others too: what it
says it will hold, and what is measured.

On a GPU three more figures stand beside attnbench's, all of one more call: what torch's allocator had given out at its
peak, what it had then reserved from the driver, and by how much the process grew as the driver counts it (NVML, which
may not tell inside a container). The last two hold what is kept for later calls, so they are no smaller; the driver's
also has the code of kernels that were not loaded before.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import shared
import torch
from torch import Tensor

from attnbench.devices import machine, nvml
from attnbench.devices.cpu import status_bytes
from attnbench.devices.device import describe, of
from attnbench.devices.machine import usable_cores
from attnbench.registry import find
from attnbench.sizes import parse_sizes
from attnbench.workload import Workload

MIB = 2**20
MEASURED = (1, 3)  # of the calls of a process; the others run unmeasured
CUDA_PLUGINS = "sdpa:backend=flash,int8,linear,block-sparse:window=1024"
MARGIN = 1.25  # memory that must be free, over what a call touches
LONGEST = 120  # seconds for one measurement


def touching(size: int) -> Callable[[Tensor], Tensor]:
    """A call that writes to `size` bytes, frees them, and returns a tensor as large as its input."""

    def call(x: Tensor) -> Tensor:
        held = torch.ones(size, dtype=torch.uint8, device=x.device)  # (size,)
        return x + held[-1]

    return call


def peaks(call: Callable[..., Tensor], tensors: list[Tensor]) -> dict[int, tuple[int, int]]:
    """Of each call in `MEASURED`: bytes held at its peak beside output and inputs, and pages of files it mapped in.

    The first call of a process runs through code of torch's libraries that was not in memory before.
    """
    found = {}
    with torch.no_grad():
        for number in range(1, max(MEASURED) + 1):
            if number in MEASURED:
                before = status_bytes("RssFile")
                out, held = of("cpu").peak(lambda: call(*tensors))
                assert held is not None, "memory is measured on Linux alone"
                found[number] = held - out.nbytes, status_bytes("RssFile") - before
            else:
                out = call(*tensors)
            del out
    return found


def touch(size: int) -> list[dict[str, Any]]:
    """The rows of one size. Runs in a process of its own."""
    torch.set_num_threads(usable_cores())
    measured = peaks(touching(size), [torch.zeros(1024)])
    return [_row(f"touches {_size(size)}", number, size, *found) for number, found in measured.items()]


def naive(seq: int) -> list[dict[str, Any]]:
    """Naive attention in float32: its own prediction against what is measured. Runs in a process of its own."""
    torch.set_num_threads(usable_cores())
    workload = Workload(seq=seq, kv_seq=seq, threads=usable_cores())
    predicted = shared.plugin_of("naive").workspace_bytes(workload)
    assert predicted is not None, "naive predicts its workspace"
    measured = peaks(shared.call_of("naive", workload), shared.tensors_of(workload))
    scores = workload.batch * workload.heads * seq * seq * workload.itemsize
    rows = [_row(f"naive at {seq}", number, predicted, *found) for number, found in measured.items()]
    return [row | {"seq_x_seq_matrices": row["measured_bytes"] / scores} for row in rows]


def cuda_peaks(call: Callable[..., Tensor], tensors: list[Tensor]) -> dict[int, dict[str, int | None]]:
    """As `peaks` on a GPU: what attnbench finds in one call, and what is found by hand in another one like it."""
    found = {}
    with torch.no_grad():
        for number in range(1, max(MEASURED) + 1):
            if number in MEASURED:
                beside = by_hand(call, tensors)
                out, held = of("cuda").peak(lambda: call(*tensors))
                assert held is not None
                found[number] = {"measured_bytes": held - out.nbytes} | beside
            else:
                out = call(*tensors)
            del out
    return found


def by_hand(call: Callable[..., Tensor], tensors: list[Tensor]) -> dict[str, int | None]:
    """Bytes of one call beside inputs and output: given out by torch, reserved by torch, and as the driver counts."""
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), driver_bytes()
    out = call(*tensors)
    torch.cuda.synchronize()
    after = driver_bytes()
    kinds = torch.cuda.max_memory_allocated() - before[0], torch.cuda.max_memory_reserved() - before[1]
    allocated, reserved = (kind - out.nbytes for kind in kinds)
    driver = None if after is None or before[2] is None else after - before[2] - out.nbytes
    return {"allocated_bytes": allocated, "reserved_bytes": reserved, "driver_bytes": driver}


def driver_bytes() -> int | None:
    """What this process holds of the GPU as NVML counts it; None where that is not to be had."""
    gpu = nvml.current()
    return gpu.process_bytes() if gpu else None


def touch_cuda(size: int) -> list[dict[str, Any]]:
    """`touch` on a GPU. Runs in a process of its own."""
    found = cuda_peaks(touching(size), [torch.zeros(1024, device="cuda")])
    return [_cuda_row(f"touches {_size(size)}", number, size, kinds) for number, kinds in found.items()]


def attention_cuda(plugin: str, seq: int) -> list[dict[str, Any]]:
    """A plugin in bfloat16 on a GPU, 8 heads of 64. Runs in a process of its own."""
    workload = Workload(seq=seq, kv_seq=seq, dtype="bfloat16", device="cuda")
    made = shared.plugin_of(plugin)
    if reason := made.supports(workload):
        return [{"what": f"{plugin} at {seq}", "skipped": reason}]
    found = cuda_peaks(shared.call_of(plugin, workload), shared.tensors_of(workload))
    expected = made.workspace_bytes(workload)
    return [_cuda_row(f"{plugin} at {seq}", number, expected, kinds) for number, kinds in found.items()]


def _cuda_row(what: str, number: int, expected: int | None, kinds: dict[str, int | None]) -> dict[str, Any]:
    measured, allocated = kinds["measured_bytes"], kinds["allocated_bytes"]
    assert measured is not None
    wanted = (measured if expected is None else expected, allocated)
    within = all(abs(measured - x) <= max(MIB, x / 100) for x in wanted if x is not None)
    return {"what": what, "call": number, "expected_bytes": expected, **kinds, "within_1_mib_or_1_percent": within}


def _row(what: str, number: int, expected: int, measured: int, mapped: int) -> dict[str, Any]:
    error = measured - expected
    within = abs(error) <= max(MIB, expected / 100)
    return {
        "what": what,
        "call": number,
        "expected_bytes": expected,
        "measured_bytes": measured,
        "error_bytes": error,
        "mapped_file_bytes": mapped,
        "within_1_mib_or_1_percent": within,
    }


def _size(size: int) -> str:
    return f"{size / 2**30:g} GiB" if size >= 2**30 else f"{size / MIB:g} MiB"


CUDA_KINDS = ("expected", "measured", "allocated", "reserved", "driver")
CUDA_HEADER = f"{'':28} call   expected   measured  allocated   reserved     driver within     (MiB)"
HEADER = f"{'':18} call   expected   measured      error  from files within     (MiB)"


def show(row: dict[str, Any]) -> None:
    kinds = ("expected", "measured", "error", "mapped_file")
    sizes = " ".join(f"{row[f'{kind}_bytes'] / MIB:10.3f}" for kind in kinds)
    within = "yes" if row["within_1_mib_or_1_percent"] else "NO"
    matrices = f"   {row['seq_x_seq_matrices']:.2f} seq x seq matrices" if "seq_x_seq_matrices" in row else ""
    print(f"{row['what']:18} {row['call']:4} {sizes} {within:>6}{matrices}")


def show_cuda(row: dict[str, Any]) -> None:
    if "skipped" in row:
        print(f"{row['what']:28} not run: {row['skipped']}")
        return
    bytes_of = [row[f"{kind}_bytes"] for kind in CUDA_KINDS]
    sizes = " ".join(f"{'-' if x is None else format(x / MIB, '.3f'):>10}" for x in bytes_of)
    print(f"{row['what']:28} {row['call']:4} {sizes} {'yes' if row['within_1_mib_or_1_percent'] else 'NO':>6}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", default="1..4096", help="sizes to touch, as `attnbench run --seq` writes them")
    parser.add_argument("--naive", default="4096", help="lengths at which attention is measured")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--plugins", default=CUDA_PLUGINS, help=f"on a GPU, beside naive; default: {CUDA_PLUGINS}")
    parser.add_argument("--out", type=Path, help="a file for the figures, as JSON")
    asked = parser.parse_args()
    on_gpu = asked.device == "cuda"
    if on_gpu:
        shared.needs_cuda()

    # As attnbench's forkserver: a process that has loaded torch forks itself for each measurement.
    context = get_context("forkserver")
    context.set_forkserver_preload(["attnbench.workers.serve"])
    lengths, sizes = parse_sizes(asked.naive, "naive"), [size * MIB for size in parse_sizes(asked.mib, "mib")]
    jobs: list[tuple[Callable[..., list[dict[str, Any]]], list[Any], int]] = []
    if on_gpu:
        jobs = [(touch_cuda, [size], size) for size in sizes]
        plugins = ["naive", *asked.plugins.split(",")]
        jobs += [(attention_cuda, [plugin, seq], 8 * 2 * 2 * seq * seq) for seq in lengths for plugin in plugins]
    else:
        jobs = [(touch, [size], size) for size in sizes]
        if "naive" in find():
            jobs += [(naive, [seq], 8 * 4 * 3 * seq * seq) for seq in lengths]

    here = shared.facts() if on_gpu else describe()
    here["transparent_hugepages"] = machine._read("/sys/kernel/mm/transparent_hugepage/enabled")
    print(f"{here['gpu'] or here['cpu']}, {usable_cores()} threads, torch {torch.__version__}, {here['system']}")
    print(CUDA_HEADER if on_gpu else HEADER)
    rows, failed = [], 0
    for job, arguments, need in jobs:
        free = torch.cuda.mem_get_info()[0] if on_gpu else machine.available_memory()
        if need * MARGIN > free:
            print(f"{job.__name__} {arguments}: left out, {need / MIB:.0f} MiB are not free")
            continue
        with context.Pool(1, maxtasksperchild=1) as pool:
            try:
                found = pool.apply_async(job, arguments).get(LONGEST)
            except Exception as problem:  # a call that fails, or ends its process: the others go on
                print(f"{job.__name__} {arguments}: failed, {type(problem).__name__}: {problem}")
                failed += 1
                continue
        for row in found:
            (show_cuda if on_gpu else show)(row)
            rows.append(row)
    measured = [row for row in rows if "skipped" not in row]
    print(f"within 1 MiB or 1%: {sum(row['within_1_mib_or_1_percent'] for row in measured)} of {len(measured)}")
    if on_gpu and all(row["driver_bytes"] is None for row in measured):
        print("what the driver counts is not to be had here: NVML does not tell it of this process")
    if asked.out:
        asked.out.write_text(json.dumps({"machine": here, "rows": rows}, indent=1) + "\n")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
