"""Whether attnbench's peak memory is what a call really touches: `python benchmarks/memory.py`.

A call that touches a known number of bytes and gives them back is measured at its first and at its third run, each
size in a process of its own that was forked as a worker is. Then naive attention: what it says it will hold, and
what is measured.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnbench.bench import inputs, machine, memory
from attnbench.plugin import Attention
from attnbench.registry import find, load
from attnbench.workload import Workload, parse_sizes, usable_cores

MIB = 2**20
MEASURED = (1, 3)  # of the calls of a process; the others run unmeasured
MARGIN = 1.25  # memory that must be free, over what a call touches


def touching(size: int) -> Callable[[Tensor], Tensor]:
    """A call that writes to `size` bytes, frees them, and returns a tensor as large as its input."""

    def call(x: Tensor) -> Tensor:
        held = torch.ones(size, dtype=torch.uint8)  # (size,)
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
                before = memory._status("RssFile")
                out, held = memory.measure(call, tensors)
                found[number] = held - out.nbytes, memory._status("RssFile") - before
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
    plugin = load(find()["naive"].target)()
    predicted = plugin.workspace_bytes(workload)
    assert predicted is not None, "naive predicts its workspace"
    built = plugin.build(workload)
    tensors = inputs.empty(workload)  # query, key, value: (1, 8, seq, 64)
    inputs.fill(tensors, workload, 0)
    measured = peaks(built.call if isinstance(built, Attention) else built, tensors)
    scores = workload.batch * workload.heads * seq * seq * workload.itemsize
    rows = [_row(f"naive at {seq}", number, predicted, *found) for number, found in measured.items()]
    return [row | {"seq_x_seq_matrices": row["measured_bytes"] / scores} for row in rows]


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


HEADER = f"{'':18} call   expected   measured      error  from files within     (MiB)"


def show(row: dict[str, Any]) -> None:
    kinds = ("expected", "measured", "error", "mapped_file")
    sizes = " ".join(f"{row[f'{kind}_bytes'] / MIB:10.3f}" for kind in kinds)
    within = "yes" if row["within_1_mib_or_1_percent"] else "NO"
    matrices = f"   {row['seq_x_seq_matrices']:.2f} seq x seq matrices" if "seq_x_seq_matrices" in row else ""
    print(f"{row['what']:18} {row['call']:4} {sizes} {within:>6}{matrices}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", default="1..4096", help="sizes to touch, as `attnbench run --seq` writes them")
    parser.add_argument("--naive", default="4096", help="lengths at which naive attention is measured")
    parser.add_argument("--out", type=Path, help="a file for the figures, as JSON")
    asked = parser.parse_args()

    # As attnbench's forkserver: a process that has loaded torch forks itself for each measurement.
    context = get_context("forkserver")
    context.set_forkserver_preload(["attnbench.bench.worker"])
    jobs: list[tuple[Callable[[int], list[dict[str, Any]]], int, int]] = [
        (touch, size * MIB, size * MIB) for size in parse_sizes(asked.mib, "mib")
    ]
    if "naive" in find():
        jobs += [(naive, seq, 8 * 4 * 3 * seq * seq) for seq in parse_sizes(asked.naive, "naive")]

    here = machine.describe()
    here["transparent_hugepages"] = machine._read("/sys/kernel/mm/transparent_hugepage/enabled")
    print(f"{here['cpu']}, {usable_cores()} threads, torch {torch.__version__}, {here['system']}")
    print(HEADER)
    rows = []
    for measure, size, need in jobs:
        if need * MARGIN > machine.available_memory():
            print(f"{measure.__name__} {size}: left out, {need / MIB:.0f} MiB are not free")
            continue
        with context.Pool(1, maxtasksperchild=1) as pool:
            for row in pool.apply(measure, [size]):
                show(row)
                rows.append(row)
    print(f"within 1 MiB or 1%: {sum(row['within_1_mib_or_1_percent'] for row in rows)} of {len(rows)}")
    if asked.out:
        asked.out.write_text(json.dumps({"machine": here, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
