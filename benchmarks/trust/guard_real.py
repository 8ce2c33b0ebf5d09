"""Real pull requests to a small plugin package, half of them with a planted slowdown, through `attnbench guard`.

python benchmarks/trust/guard_real.py --requests 20 --out FILE

FILE is added to. A pull request is a commit: of a comment, or one after which the plugin takes so much longer at one
length, drawn, by waiting for that share of its time after each call (see `planted.py`).
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click

HERE = Path(__file__).parent
PROJECT = """
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "mine"
version = "1.0"
dependencies = ["attnbench"]

[project.entry-points."attnbench.plugins"]
mine = "mine:Mine"

[tool.setuptools]
py-modules = ["mine", "planted"]
"""
PLUGIN = """# {comment}
from planted import Planted

SLOWER = {slower}  # per cent, by length


class Mine(Planted):
    options = {{}}

    def build(self, workload):
        self.extra = SLOWER.get(workload.seq, 0.0)
        return super().build(workload)
"""


def git(repository: Path, *words: str) -> str:
    who = ("-c", "user.name=benchmarks", "-c", "user.email=benchmarks@localhost")
    return subprocess.run(["git", "-C", repository, *who, *words], check=True, capture_output=True, text=True).stdout


def commit(repository: Path, comment: str, slower: dict[int, float]) -> None:
    (repository / "mine.py").write_text(PLUGIN.format(comment=comment, slower=slower))
    git(repository, "add", ".")
    git(repository, "commit", "-q", "-m", comment)


def guarded(slower: dict[int, float], lengths: str, budget: float) -> dict[str, Any]:
    """What the command says of one pull request."""
    with tempfile.TemporaryDirectory() as folder:
        repository = Path(folder)
        git(repository, "init", "-q")
        (repository / "pyproject.toml").write_text(PROJECT)
        (repository / "planted.py").write_text((HERE / "planted.py").read_text())
        commit(repository, "before", {})
        commit(repository, "after", slower)
        words = ["guard", "HEAD~..HEAD", "--seq", lengths, "--dtype", "float32", "--mask", "full", "--json"]
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "attnbench", *words, "--budget", str(budget)],
            cwd=repository, capture_output=True, text=True, check=False,
        )  # fmt: skip
    if done.returncode not in (0, 1):
        raise RuntimeError(done.stderr)
    found = json.loads(done.stdout)
    cells = [{k: cell[k] for k in ("seq", "ratio", "low", "high", "verdict")} for cell in found["cells"]]
    seconds = round(time.monotonic() - began, 1)
    return {"planted": slower, "code": done.returncode, "cells": cells, "s": seconds}


@click.command()
@click.option("--requests", default=20, show_default=True, help="Every other one has a slowdown.")
@click.option("--by", "extra", default=3.0, show_default=True, help="Per cent.")
@click.option("--lengths", default="256,512,1024,1536", show_default=True)
@click.option("--budget", default=45.0, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(requests: int, extra: float, lengths: str, budget: float, seed: int, out: Path) -> None:
    """Run pull requests, add the answers to FILE, and count all that it holds."""
    rng = random.Random(seed)
    record = json.loads(out.read_text()) if out.exists() else {"by": extra, "budget": budget, "answers": []}
    for i in range(requests):
        at = rng.choice(lengths.split(","))
        record["answers"].append(guarded({int(at): extra} if i % 2 else {}, lengths, budget))
        out.write_text(json.dumps(record))
        click.echo(f"{i + 1} of {requests}: {record['answers'][-1]}", err=True)
    slower = [
        ({int(length) for length in one["planted"]}, {c["seq"] for c in one["cells"] if c["verdict"] == "slower"})
        for one in record["answers"]
    ]
    identical, planted = ([s for s in slower if bool(s[0]) is kind] for kind in (False, True))
    click.echo(f"identical: {sum(bool(called) for _, called in identical)} of {len(identical)} with a false alarm")
    click.echo(
        f"planted: {sum(where <= called for where, called in planted)} of {len(planted)} found, "
        f"{sum(bool(called - where) for where, called in planted)} with a false alarm elsewhere"
    )
    click.echo(f"seconds: {max(one['s'] for one in record['answers'])} at most")


if __name__ == "__main__":
    main()
