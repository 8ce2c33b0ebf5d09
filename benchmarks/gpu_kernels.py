"""The kernels on an H100 against other libraries' and torch's own, through attnbench, with the bars they are to reach.

python benchmarks/gpu_kernels.py [--budget SECONDS] [--name NAME] [--tune]

Runs `attnbench run` four times (bfloat16, 16k tokens in all, 16 heads of 128 or 32 of 64): int8 with a head dim of 128
and of 64, everything that is compared at 16k, and linear attention. Then, in this process, sdpa as attnbench times it
against the bare call. It ends with a table of the bars; what can't be measured is "not run", with the reason. A run
that was cut off is gone on with. With --run FOLDER, once for each, it only prints, from earlier runs.

`pip install './peers[gpu]'` puts sageattention, fla-linear and flex-dense beside ours. --tune tries each
tile of int8's Triton kernel and of flex_attention instead. --device cpu --seq 256,512 tries the machinery: its bars
mean nothing, and its runs are kept only where --out says.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import click
import shared
import torch
from shared import Bar
from torch.nn.functional import scaled_dot_product_attention

from attnbench import records, registry
from attnbench.devices import bursts
from attnbench.devices.bursts import burst_size
from attnbench.devices.device import of
from attnbench.records.schema import Row
from attnbench.sizes import parse_sizes
from attnbench.workload import MASKS, Workload

TOKENS = 16384
HEADS = {128: 16, 64: 32}  # by head dim: a hidden size of 2048
FLASH, SPARSE = "sdpa:backend=flash", "block-sparse:window=1024"
DENSE = (FLASH, "sdpa:backend=cudnn", "sdpa:backend=efficient", "xformers")
LENGTHS = {"bare": "1024,4096,16384", "int8": "4096,8192,16384", "long": "16384", "linear": "2048,8192,16384"}
PAIRS = 20  # of blocks of the bare call and of attnbench's
PEERS = "pip install './peers[gpu]'"
TILE = 128  # queries and keys to a block of flex_attention


def sweeps(lengths: Mapping[str, str]) -> dict[str, tuple[float, dict[str, str]]]:
    """By name: the share of the time, and the arguments of `attnbench run`."""
    int8 = {"plugins": f"{FLASH},int8,sageattention", "seq": lengths["int8"], "mask": "full,causal", "baseline": FLASH}
    long = ",".join((*DENSE, SPARSE, "flex-dense"))
    linear = {"plugins": "linear,fla-linear", "seq": lengths["linear"], "mask": "causal", "phase": "forward,train"}
    return {
        "wide": (0.25, int8 | {"head-dim": "128", "heads": "16"}),
        "narrow": (0.25, int8 | {"head-dim": "64", "heads": "32"}),
        "long": (0.3, int8 | {"plugins": long, "seq": lengths["long"], "head-dim": "128", "heads": "16"}),
        "linear": (0.2, linear | {"head-dim": "128", "heads": "16", "baseline": "linear"}),
    }


class Rows:
    """What was measured, by plugin, mask, length, head dim and phase."""

    def __init__(self, runs: Sequence[Path]) -> None:
        self._rows = [row for run in runs for row in records.rows(run)]

    def __call__(self, plugin: str, mask: str, seq: int, dim: int = 128, phase: str = "forward") -> Row | str:
        """The row, or why there is none that counts."""
        name, *options = plugin.split(":")
        key = (name, mask, seq, dim, phase)
        found = [
            row
            for row in self._rows
            if (row["variant"], row["mask"], row["seq"], row["head_dim"], row["phase"]) == key
            and set(options) <= set(row["plugin"].split(":"))
        ]
        well = [row for row in found if row["status"] == "ok"]
        if well:
            return well[-1]
        if found:
            return f"{plugin} {found[-1]['status']}: {found[-1]['reason']}"
        return f"{plugin} was not measured" if name in registry.find() else f"install {name}: {PEERS}"

    def faster(self, what: str, wanted: float, ours: Row | str, theirs: Row | str, promised: float = 1.0) -> Bar:
        """How many times faster one row is than the other, as a share of what is `promised`."""
        for row in (ours, theirs):
            if isinstance(row, str):
                return Bar(what, wanted, why=row)
        assert not isinstance(ours, str)
        assert not isinstance(theirs, str)
        found = shared.speedup(ours, theirs)
        if found.median != found.median:
            return Bar(what, wanted, why="never timed in the same round")
        low, high = (None if x is None else x / promised for x in (found.low, found.high))
        return Bar(what, wanted, found.median / promised, low, high)


def bars(rows: Rows, lengths: Mapping[str, str]) -> Iterator[Bar]:
    longest = parse_sizes(lengths["long"])[-1]
    yield dense(rows, longest)
    for dim in HEADS:
        for mask in MASKS:
            for seq in parse_sizes(lengths["int8"]):
                what, ours = f"int8, {mask}, {seq}, head dim {dim}", rows("int8", mask, seq, dim)
                for other, wanted in (("sageattention", 1.0), (FLASH, 1.3)):
                    yield rows.faster(f"{what}: x {other}", wanted, ours, rows(other, mask, seq, dim))
                if isinstance(ours, str):
                    yield Bar(f"{what}: relative L2", 2e-2, most=True, why=ours)
                else:
                    yield Bar(f"{what}: relative L2", 2e-2, ours["approximation_rel_l2"], most=True)
    for phase in ("forward", "train"):
        for seq in parse_sizes(lengths["linear"]):
            ours, theirs = (rows(name, "causal", seq, phase=phase) for name in ("linear", "fla-linear"))
            yield rows.faster(f"linear, causal, {seq}, {phase}: x fla-linear", 1.0, ours, theirs)
    for mask, wanted in (("causal", 5.0), ("full", 10.0)):
        ours, what = rows(SPARSE, mask, longest), f"{SPARSE}, {mask}, {longest}"
        yield rows.faster(f"{what}: x {mask} flash", wanted, ours, rows(FLASH, mask, longest))
        theirs = rows("flex-dense", mask, longest)
        promised = 1.0 if isinstance(ours, str) else _dense_share(mask, longest) / ours["density"]
        yield rows.faster(f"{what}: share of {promised:.1f} x flex-dense", 0.9, ours, theirs, promised)


def _dense_share(mask: str, seq: int) -> float:
    """Of seq^2 pairs, those in the blocks that dense flex_attention computes."""
    blocks = -(-seq // TILE)
    return (blocks + 1) / (2 * blocks) if mask == "causal" else 1.0


def dense(rows: Rows, seq: int) -> Bar:
    """The fastest of the exact variants."""
    found = [row for plugin in DENSE if not isinstance(row := rows(plugin, "full", seq), str)]
    if not found:
        return Bar(f"best dense variant, full, {seq}: TFLOP/s", 600, why="; ".join(map(str, _reasons(rows, seq))))
    best = max(found, key=lambda row: row["flops_per_s"])
    low, high = (best["flops"] / best[k] / 1e12 if best[k] else None for k in ("latency_high_s", "latency_low_s"))
    return Bar(f"{best['plugin']}, full, {seq}: TFLOP/s", 600, best["flops_per_s"] / 1e12, low, high)


def _reasons(rows: Rows, seq: int) -> list[str]:
    return [row for plugin in DENSE if isinstance(row := rows(plugin, "full", seq), str)]


def reached(rows: Rows, seq: int) -> Iterator[str]:
    """A line for each exact variant."""
    for plugin in DENSE:
        for mask in MASKS:
            row = rows(plugin, mask, seq)
            said = row if isinstance(row, str) else f"{row['flops_per_s'] / 1e12:.3g} TFLOP/s; {row['implementation']}"
            yield f"{plugin}, {mask}, {seq}: {said}"


def workload(seq: int, dim: int, mask: str, device: str, tokens: int = TOKENS) -> Workload:
    heads = HEADS[dim]
    return Workload(
        seq=seq, kv_seq=seq, batch=max(1, tokens // seq), heads=heads, kv_heads=heads, head_dim=dim, value_dim=dim,
        mask=mask, dtype="bfloat16", device=device,
    )  # fmt: skip


def bare(w: Workload) -> Bar:
    """sdpa as attnbench builds and times it, against the bare call between two events."""
    tensors = shared.tensors_of(w)
    timer = of(w.device).timer(shared.call_of("sdpa", w), tensors)
    call_s, _ = timer.warm_up()
    calls, head = burst_size(call_s)
    ratio, *_ = shared.alternate(
        lambda: timer.burst(calls, head)[0].seconds / calls,
        partial(_bare_seconds, partial(scaled_dot_product_attention, *tensors), calls, w.device),
        PAIRS,
    )
    return Bar(f"sdpa through attnbench, {w.seq}: x the bare call", 0.98, *ratio)


def _bare_seconds(call: Callable[[], object], calls: int, device: str) -> float:
    call()
    if device == "cpu":
        start = bursts.clock()
        for _ in range(calls):
            call()
        return (bursts.clock() - start) / calls
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    for _ in range(calls):
        call()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1e3 / calls


def measure(name: str, seconds: float, arguments: dict[str, str], results: Path, device: str) -> Path | None:
    """One sweep's folder: an earlier run of it where that was cut off, else a new one."""
    plugins = shared.installed(arguments["plugins"].split(","))
    before = shared.earlier(name, results, shared.facts())
    if before is not None and not shared.is_finished(before):
        return shared.run({}, seconds, resume=before)
    common = {"dtype": "bfloat16", "scope": "attention", "device": device, "out": str(results), "name": name}
    return shared.run(common | arguments | {"plugins": ",".join(plugins)}, seconds)


@click.command()
@click.option("--budget", default=220.0, show_default=True, help="Seconds for all sweeps.")
@click.option("--name", default="gpu-kernels", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Runs go here.  [default: results; on a CPU nowhere]")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
@click.option(
    "--seq", help="Instead of each bar's own lengths, to try the machinery; the longest is the batch's tokens."
)
@click.option("--run", "runs", multiple=True, type=click.Path(path_type=Path, exists=True), help="Print from this run.")
@click.option("--tune", is_flag=True, help="Try the tiles of our kernels instead.")
def main(
    budget: float, name: str, out: Path | None, device: str, seq: str | None, runs: tuple[Path, ...], tune: bool
) -> None:
    """Measure the kernels and print each bar."""
    if device == "cuda" and not torch.cuda.is_available() and not runs:
        raise click.ClickException("needs a CUDA device; --device cpu --seq 256,512 tries the machinery")
    if device == "cpu" and not seq and not runs:
        raise click.ClickException("--device cpu needs small lengths: --seq 256,512")
    lengths = LENGTHS
    if seq:
        sizes = parse_sizes(seq)
        lengths = dict.fromkeys(LENGTHS, seq) | {"long": str(sizes[-1])}
    if tune:
        import gpu_tiles  # loads the kernels, and triton with them

        shared.needs_cuda()
        longest = parse_sizes(lengths["long"])[-1]
        gpu_tiles.tune([workload(longest, dim, mask, device) for dim in HEADS for mask in MASKS])
        return
    with tempfile.TemporaryDirectory() as scratch:
        results = out or (Path(scratch) if device == "cpu" else Path("results"))
        found: list[Bar] = []
        cut = False
        if not runs:
            tokens = str(max(map(int, parse_sizes(seq)))) if seq else str(TOKENS)
            made: list[Path | None] = []
            try:
                for tail, (share, given) in sweeps(lengths).items():
                    made.append(None)
                    made[-1] = measure(f"{name}-{tail}", share * budget, given | {"tokens": tokens}, results, device)
                with torch.no_grad():
                    shapes = [workload(n, 128, "full", device, int(tokens)) for n in parse_sizes(lengths["bare"])]
                    found += map(bare, shapes)
            except KeyboardInterrupt:  # the bars that can be told are
                cut = True
                if made and made[-1] is None:
                    made[-1] = shared.earlier(f"{name}-{tail}", results, shared.facts())
            runs = tuple(run for run in made if run)
        rows = Rows(runs)
        for line in reached(rows, parse_sizes(lengths["long"])[-1]):
            click.echo(line)
        found += bars(rows, lengths)
    click.echo("\nA dry run on a CPU: nothing here says anything of a GPU." if device == "cpu" else "")
    click.echo(f"{'':58}    {'wanted':>7} {'found':>8} [95%]")
    for bar in found:
        click.echo(str(bar))
    count = {word: sum(bar.verdict.startswith(word) for bar in found) for word in ("met", "MISSED", "not run")}
    click.echo(", ".join(f"{number} {word}" for word, number in count.items()) + f", of {len(found)} bars")
    if cut:
        sys.exit("cut off: the same command goes on with it")


if __name__ == "__main__":
    main()
