"""Whether a map's choice is the fastest: shapes held out of it, measured exhaustively, and how far its choice is off.

python benchmarks/map.py shapes --out FILE [--shapes 100] [--minutes 4]
python benchmarks/map.py judge FILE [--max-error 1e-2] [--budget 60] [--out FILE]

`shapes` draws lengths and batches from a seed, evenly in their logarithms and whatever number comes, and measures every
variant on each: all for a look, then those near the fastest within any limit that is judged, once more. It goes on
where FILE ends, so that it can be done in slices. `judge` draws a map of the same ranges within its budget, asks it
for each shape, and sets the seconds of its choice over those of the fastest, paired by round.
"""

from __future__ import annotations

import json
import math
import random
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import cycle, groupby
from pathlib import Path
from typing import Any

import click

from attnbench.advice import shown
from attnbench.advice.best import Limits
from attnbench.advice.map import chart
from attnbench.records import strict
from attnbench.records.schema import Row
from attnbench.stats.held_up import held_up
from attnbench.stats.intervals import MIN_ROUNDS
from attnbench.sweep.cell import Cell
from attnbench.sweep.engine import Plan, planned, settings_of
from attnbench.sweep.plan import cells_of
from attnbench.sweep.plan import choose as requested
from attnbench.sweep.session import measure
from attnbench.sweep.settings import Asked
from attnbench.workers.ask import ask

# Recurrences are left out: no error of theirs is known, so they hold no limit that is judged here.
PLUGINS = "naive,sdpa,xformers,tiled,int8,block-sparse,linear"
SEQ, BATCH = (64, 2048), (1, 8)
LIMITS = (1e-2, 1.0)
NEAR, LOOK_SECONDS, CLOSE_SECONDS = 1.08, (0.2, 0.55), (0.7, 0.55)  # and for each variant
WITHIN = 0.02
AGAIN, AGAIN_SECONDS = (0.01, 0.08), 5.0  # off by so much: a near tie, which is measured for longer


def drawn(count: int, seed: int) -> list[tuple[int, int]]:
    """(length, batch), each once."""
    rng, found = random.Random(seed), dict[tuple[int, int], None]()
    while len(found) < count:
        length, batch = (round(low * (high / low) ** rng.random()) for low, high in (SEQ, BATCH))
        found[length, batch] = None
    return list(found)


@contextmanager
def cells_for(shapes: Sequence[tuple[int, int]]) -> Iterator[tuple[Plan, list[list[Cell]]]]:
    """What would be measured, a list a shape, of all variants."""
    asked = Asked.of(plugins=PLUGINS, seq=64, scope="attention", precision="0.5%", budget=60.0)
    with planned(asked) as ready:
        like = ready.cells[0].workload
        workloads = [like.replace(seq=seq, kv_seq=seq, batch=batch) for seq, batch in shapes]
        requests, base = requested(PLUGINS, "sdpa")
        assert base
        every = [base, *(r for r in requests if r.found.name != base.found.name)]
        cells = [c for r in every for c in cells_of(r, ask(ready.server, r, workloads), workloads)]
        order = {w: i for i, w in enumerate(workloads)}
        cells.sort(key=lambda c: order[c.workload])
        yield ready, [list(group) for _, group in groupby(cells, key=lambda c: c.workload)]


def measured(ready: Plan, cells: Sequence[Cell], took: tuple[float, float]) -> list[Row]:
    """In processes of their own; once more where something was called wrong, as it may seem on a busy machine.

    took: seconds for all, and for each; more for longer calls, so that none is left out for what it is guessed to take.
    """
    once, each = took
    settings = replace(settings_of(ready, None), budget=once + len(cells) * (each + 2.2 * cells[0].flops / 5e10))
    for _ in range(2):
        rows = measure(ready.server, settings, [replace(cell) for cell in cells])
        if all(row["status"] != "wrong" for row in rows):
            break
    return rows


def near(rows: Sequence[Row]) -> set[str]:
    """The plugins that may be the fastest within any of the limits."""
    found: set[str] = set()
    for error in LIMITS:
        limits = Limits(error)
        able = [row for row in rows if not limits.broken_by(row)]
        best = min((row["latency_s"] for row in able), default=0.0)
        found |= {row["plugin"] for row in able if row["latency_s"] < NEAR * best}
    return found


def told(row: Row) -> dict[str, Any]:
    """What is kept of a row: its figures; and of each round its number, seconds of a call, 1 where it was held up."""
    names = ("plugin", "status", "reason", "latency_s", "speedup", "approximation_rel_l2", "peak_bytes")
    held = held_up(row.get("samples") or [])
    samples = [[s[1], float(f"{s[4] / s[3]:.5g}"), int((s[0], s[1]) in held)] for s in row.get("samples") or []]
    return {name: row.get(name) for name in names} | {"samples": samples}


@click.group()
def main() -> None:
    """Whether a map's choice is the fastest."""


@main.command()
@click.option("--shapes", "count", default=100, show_default=True)
@click.option("--seed", default=1, show_default=True)
@click.option("--minutes", default=4.0, show_default=True, help="After which no further shape is begun.")
@click.option("--out", type=click.Path(path_type=Path), required=True)
def shapes(count: int, seed: int, minutes: float, out: Path) -> None:
    """Measure shapes drawn at random, all variants on each; go on where OUT ends."""
    until = time.monotonic() + 60 * minutes
    record = json.loads(out.read_text()) if out.exists() else {"seed": seed, "shapes": []}
    done = {(shape["workload"]["seq"], shape["workload"]["batch"]) for shape in record["shapes"]}
    todo = [shape for shape in drawn(count, record["seed"]) if shape not in done]
    with cells_for(todo) as (ready, each):
        record["machine"] = record.get("machine") or ready.facts
        for (length, batch), cells in cycle(zip(todo, each, strict=True)):
            if time.monotonic() > until or len(done) == count:
                break
            if (length, batch) in done:
                continue
            first = measured(ready, cells, LOOK_SECONDS)
            finalists = [cell for cell in cells if cell.plugin in near(first)]
            close = measured(ready, finalists, CLOSE_SECONDS) if len(finalists) > 1 else []
            every = [[told(row) for row in rows] for rows in (first, close) if rows]
            shape = {"workload": cells[0].workload.as_dict(), "measured": every}
            if not is_sound(shape):
                click.echo(f"    {batch}x{length}: too many rounds were held up; once more, later")
                continue
            done.add((length, batch))
            record["shapes"].append(shape)
            out.write_text(json.dumps(record))
            best = min(every[-1], key=lambda row: row["latency_s"] or 1e9)
            click.echo(f"{len(done):3d} {batch}x{length}: {best['plugin']}, of {len(finalists)} near")


def is_sound(shape: dict[str, Any]) -> bool:
    """Whether the look came to a second round, and those near the fastest have rounds enough that nothing held up."""
    look, last = shape["measured"][0], shape["measured"][-1]
    counts: Counter[str] = Counter()
    for rows in shape["measured"]:
        counts.update({row["plugin"]: len(seconds(row)) for row in rows})
    least = min(counts[row["plugin"]] for row in last if row["status"] == "ok")
    return least >= MIN_ROUNDS and statistics.median(len(seconds(row)) for row in look) > 1


Seconds = dict[int, float]
"""Of a call by round, without rounds that were held up."""


def seconds(row: dict[str, Any]) -> Seconds:
    return {number: value for number, value, held in row["samples"] if not held}


def ratio(shape: dict[str, Any], one: str, other: str) -> float | None:
    """Seconds of one plugin over those of another: the median over all rounds of both."""
    found: list[float] = []
    for rows in shape["measured"]:
        by_plugin = {row["plugin"]: seconds(row) for row in rows}
        ours, theirs = by_plugin.get(one, {}), by_plugin.get(other, {})
        found += [ours[number] / theirs[number] for number in ours.keys() & theirs.keys()]
    return statistics.median(found) if found else None


def fastest(shape: dict[str, Any], limits: Limits) -> tuple[list[str], str | None]:
    """The plugins that hold the limits, and the fastest of them."""
    look, *close = shape["measured"]
    able = [row["plugin"] for row in look if row["latency_s"] and not limits.broken_by(row)]
    near = [row["plugin"] for row in (close or [look])[-1] if row["plugin"] in able] or able
    return able, min(near, key=lambda plugin: ratio(shape, plugin, near[0]) or math.inf, default=None)


def again(ready: Plan, cells: Sequence[Cell], choice: str, best: str) -> float | None:
    """The seconds of a choice over those of the fastest, beside each other for longer, in several processes."""
    pair = [cell for cell in cells if cell.plugin in (choice, best)]
    pair.sort(key=lambda cell: cell.plugin != best)
    settings = replace(settings_of(ready, None), budget=AGAIN_SECONDS, baseline=best)
    rows = measure(ready.server, settings, [replace(cell) for cell in pair])
    return next((1 / row["speedup"] for row in rows if row["plugin"] == choice and row.get("speedup")), None)


@main.command()
@click.argument("file", type=click.Path(path_type=Path, exists=True))
@click.option("--max-error", default=1e-2, show_default=True)
@click.option("--budget", default=60.0, show_default=True, help="Seconds for the map.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the map and every choice here, as JSON.")
@click.option("--picture", type=click.Path(path_type=Path), help="Draw the map here.")
def judge(file: Path, max_error: float, budget: float, out: Path | None, picture: Path | None) -> None:
    """Draw a map, ask it for each of the shapes of FILE, and tell how far its choices are off."""
    limits, shapes = Limits(max_error), [s for s in json.loads(file.read_text())["shapes"] if is_sound(s)]
    low, high = (f"{a}..{b}" for a, b in (SEQ, BATCH))
    asked = Asked.of(seq=low, batch=high, scope="attention", budget=budget)
    drawn_map = chart(asked, limits)
    click.echo(f"map: {drawn_map.measured} of {len(drawn_map.spots)} measured in {drawn_map.seconds:.1f} s")
    if picture:
        shown.draw(drawn_map, picture)
    answers = []
    with cells_for([(shape["workload"]["seq"], shape["workload"]["batch"]) for shape in shapes]) as (ready, each):
        for shape, cells in zip(shapes, each, strict=True):
            guesses = drawn_map.choice(cells)
            able, best = fastest(shape, limits)
            choice = guesses[0].plugin if guesses and guesses[0].holds == 1 else None
            off = (ratio(shape, choice, best) or math.inf) - 1 if choice in able and best else math.inf
            told = {"workload": shape["workload"], "choice": choice, "fastest": best, "off": off, "again": None}
            if choice and best and AGAIN[0] < off < AGAIN[1] and (longer := again(ready, cells, choice, best)):
                told["again"] = longer - 1
            told["guesses"] = [(g.plugin, round(g.gain, 4), round(g.doubt, 4), g.holds) for g in guesses[:4]]
            answers.append(told)
    report(answers)
    if out:
        out.write_text(strict.dumps({"map": drawn_map.as_dict(), "answers": answers}))


def report(answers: Sequence[dict[str, Any]]) -> None:
    """Of how many shapes the choice is within 2% of the fastest, and what became of the others."""
    final = [a["off"] if a["again"] is None else a["again"] for a in answers]
    right = sum(off <= WITHIN for off in final)
    same = sum(a["choice"] == a["fastest"] for a in answers)
    longer = sum(a["again"] is not None for a in answers)
    at_once = sum(a["off"] <= WITHIN for a in answers)
    click.echo(f"within {WITHIN:.0%} of the fastest: {right} of {len(answers)}; {same} are the fastest itself")
    click.echo(f"{longer} were measured for longer; without that it would be {at_once}")
    for answer, off in zip(answers, final, strict=True):
        if off > WITHIN:
            w = answer["workload"]
            click.echo(
                f"  {w['batch']}x{w['seq']}: {answer['choice']} is off by {off:.1%}, fastest {answer['fastest']}"
            )


if __name__ == "__main__":
    main()
