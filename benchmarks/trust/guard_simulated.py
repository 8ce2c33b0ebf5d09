"""Pull requests of forty cells, drawn from recorded blocks: how often does `attnbench guard` raise a false alarm?

python benchmarks/trust/guard_simulated.py benchmarks/runs/FILE --out FILE

Every cell is a block that `guard_blocks.py` recorded of two identical kernels, either of which may be the base. In a
planted pull request NEW's times in one cell, drawn, are longer by so much, in both looks: the blocks' noise stays. What
decides is what decides in the command: which cells look slower, which get a long look, which are certain.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import click

from attnbench.advice.guard import SCREEN_SHARE, TURN_SECONDS, TURNS, confirmed, narrowed
from attnbench.stats.held_up import Round

Block = dict[Round, float]
AROUND_SECONDS = 20.0  # of the budget: two packages are built, plugins asked, the server started


def drawn(rng: random.Random, blocks: list[Block], slower: float) -> Block:
    """One of the blocks, base and new exchanged or not, with NEW's times longer by this share."""
    block, turned = rng.choice(blocks), rng.random() < 0.5
    return {at: (1 / ratio if turned else ratio) / (1 + slower) for at, ratio in block.items()}


def request(
    rng: random.Random, looks: dict[str, dict[int, list[Block]]], cells: int, slower: float, margin: float, left: float
) -> dict[str, Any]:
    """One pull request: its planted cell (None for none), those that got a long look, and those called slower.

    left: seconds after the first looks.
    """
    lengths = sorted(looks["screen"])
    planted = rng.randrange(cells) if slower else None

    def look(kind: str, i: int) -> Block:
        return drawn(rng, looks[kind][lengths[i % len(lengths)]], slower if i == planted else 0.0)

    def short(i: int, seconds: float) -> Block:
        """So much of a longer block: of its processes, or of its rounds where it has but one."""
        block = look("confirm", i)
        processes = sorted({process for process, _ in block})
        share = seconds / TURN_SECONDS
        kept = processes[: max(1, round(share * len(processes)))]
        rounds = len(block) if len(processes) > 1 else round(share * len(block))
        return {at: x for n, (at, x) in enumerate(block.items()) if at[0] in kept and n < rounds}

    first = {i: look("screen", i) for i in range(cells)}
    chosen, _ = narrowed(first, left, short, margin)
    turns = [(i, n, look("confirm", i)) for i in chosen for n in range(TURNS)]
    last: dict[int, Block] = {i: {} for i in chosen}
    for i, n, block in turns:
        last[i] |= {(100 * n + process, at): x for (process, at), x in block.items()}
    return {"planted": planted, "again": chosen, "slower": sorted(confirmed(last, margin))}


@click.command()
@click.argument("record", type=click.Path(path_type=Path, exists=True))
@click.option("--requests", default=60, show_default=True, help="Of each kind.")
@click.option("--cells", default=40, show_default=True)
@click.option("--by", "extras", multiple=True, type=float, default=(2.0, 3.0, 5.0), show_default=True, help="Per cent.")
@click.option("--margin", default=1.0, show_default=True, help="--fail-over, in per cent.")
@click.option("--budget", default=300.0, show_default=True)
@click.option("--held-up", type=float, help="Only blocks of which at most this share of rounds had to wait for a core.")
@click.option("--seed", default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Write every answer here, as JSON.")
def main(
    record: Path, requests: int, cells: int, extras: tuple[float, ...], margin: float, budget: float,
    held_up: float | None, seed: int, out: Path | None,
) -> None:  # fmt: skip
    """Print how many pull requests are failed, and for which cells."""
    looks: dict[str, dict[int, list[Block]]] = {"screen": defaultdict(list), "confirm": defaultdict(list)}
    for block in json.loads(record.read_text())["blocks"]:
        if held_up is not None and not block.get("held_up", block.get("of", 1)) <= held_up * block.get("of", 1):
            continue
        rounds = {(process, float(i)): ratio for i, (process, ratio) in enumerate(block["ratios"])}
        looks[block["look"]][block["seq"]].append(rounds)
    left = (1 - SCREEN_SHARE) * (budget - AROUND_SECONDS)
    counts = {look: sum(map(len, found.values())) for look, found in looks.items()}
    click.echo(f"{requests} pull requests of {cells} cells each, from blocks: {counts}")
    answers = {}
    for extra in (0.0, *extras):
        rng = random.Random(f"{seed} {extra}")
        found = [request(rng, looks, cells, extra / 100, margin / 100, left) for _ in range(requests)]
        false = sum(any(i != one["planted"] for i in one["slower"]) for one in found)
        hit = sum(one["planted"] in one["slower"] for one in found)
        missed = sum(one["planted"] is not None and one["planted"] not in one["again"] for one in found)
        looked = sum(len(one["again"]) for one in found) / requests
        kind = f"{hit} found (without a long look: {missed}), " if extra else ""
        click.echo(f"{extra:g}% longer: {kind}{false} with a false alarm, {looked:.1f} cells with a long look")
        answers[f"{extra:g}"] = found
    if out:
        said = {"record": record.name, "cells": cells, "margin": margin, "budget": budget, "seed": seed}
        said |= {"held_up": held_up}
        out.write_text(json.dumps(said | {"blocks": counts, "answers": answers}))


if __name__ == "__main__":
    main()
