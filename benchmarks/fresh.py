"""What it costs a call that each gets values of its own: `python benchmarks/fresh.py [--out FILE]`.

In one process, bursts in turn: calls that are each given other views of one pool, as in a run, and calls that are given
the same tensors again and again, as most timers do. The ratio is the former's seconds over the latter's, paired.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import count
from pathlib import Path

import click
import shared
import torch

from attnbench.devices import device
from attnbench.devices.bursts import burst_size
from attnbench.sizes import parse_sizes
from attnbench.task.inputs import pools
from attnbench.workload import Workload


def _clocks(plugin: str, workload: Workload) -> tuple[Callable[[], float], Callable[[], float]]:
    """Seconds of a call on the same tensors, and on fresh ones."""
    made, numbers, on = pools(workload), count(), device.of(workload.device)
    made.draw(0)
    (same,) = made.views(1, 0)
    timer = on.timer(shared.call_of(plugin, workload), same)
    calls, head = burst_size(timer.warm_up()[0], on.burst_s)

    def again() -> float:
        return timer.burst(calls, head)[0].seconds / calls

    def fresh() -> float:
        given = made.views(calls + head, next(numbers))
        return timer.burst(calls, head, given)[0].seconds / calls

    return again, fresh


@click.command()
@click.option("--plugins", default="sdpa,naive,tiled,int8,linear", show_default=True)
@click.option("--seq", default="128,256,512,1024,2048", show_default=True)
@click.option("--dtype", default="float32", show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--pairs", default=300, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Write every ratio and the machine here, as JSON.")
def main(plugins: str, seq: str, dtype: str, threads: int, pairs: int, out: Path | None) -> None:
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    rows = []
    for length in parse_sizes(seq):
        for plugin in plugins.split(","):
            workload = Workload(seq=length, kv_seq=length, dtype=dtype, mask="causal", threads=threads)
            ratio, same, _ = shared.alternate(*_clocks(plugin, workload), pairs)
            low, high = ratio.low or 0.0, ratio.high or 0.0
            told = f"{ratio.median - 1:+.2%}, 95% interval {low - 1:+.2%} to {high - 1:+.2%}"
            click.echo(f"{plugin:10} {length:6} {1e3 * sorted(same)[pairs // 2]:9.3f} ms   {told}")
            rows.append({"plugin": plugin, "seq": length, "ratio": ratio.median, "low": low, "high": high})
    if out:
        out.write_text(json.dumps({"dtype": dtype, "pairs": pairs, "rows": rows, "machine": shared.facts()}))


if __name__ == "__main__":
    main()
