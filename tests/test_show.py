"""A run's numbers in the terminal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from attnbench.records.run import load, read_metas, rows
from attnbench.report.numbers import grids, over

RUN = Path(__file__).parents[1] / "results" / "2026-11-29-cpu"


def attnbench(*arguments: object, **environment: str) -> str:
    words = [sys.executable, "-m", "attnbench", *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, env=os.environ | environment)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize("columns", [40, 60, 100, 200])
def test_every_number_is_there_whatever_the_width(columns: int) -> None:
    shown = attnbench("show", RUN, COLUMNS=str(columns))
    tables = [line for line in shown.splitlines() if line.startswith((" ", "length"))]
    assert max(map(len, tables)) <= columns
    (alone, _) = grids(load(RUN), read_metas(RUN))
    for row in alone.rows:
        for cell in row:
            assert all(line in shown for line in cell.split("\n"))


def test_figures_are_those_of_the_records() -> None:
    for grid, scope in zip(grids(load(RUN), read_metas(RUN), memory=True), ("attention", "block"), strict=True):
        cells = {(r["variant"], r["seq"]): r for r in rows(RUN) if r["scope"] == scope}
        assert grid.heads[1] == "sdpa"
        table = {row[0]: dict(zip(grid.heads[1:], row[1:], strict=True)) for row in grid.rows}
        for (plugin, seq), row in cells.items():
            if row["status"] == "unsupported":
                assert any(note.startswith(f"no number, {plugin}: ") for note in grid.notes)
                assert plugin not in grid.heads
                continue
            lines = table[f"{seq // 1024}k" if seq >= 1024 else str(seq)][plugin].split("\n")
            value, unit = lines[0].split()
            assert float(value) * {"s": 1, "ms": 1e-3, "µs": 1e-6}[unit] == pytest.approx(row["latency_s"], rel=5e-3)
            assert len(lines) == (2 if plugin == "sdpa" else 3)
            if plugin != "sdpa":
                assert float(lines[1].split("x")[0]) == pytest.approx(row["speedup"], rel=5e-3)


@pytest.mark.parametrize(
    ("figures", "said"),
    [((2.0, 1.9, 2.1), "2x ±5%"), ((1.31, 1.3, 1.32), "1.31x ±0.76%"), ((1.5, None, None), "1.50x ±?")],
)
def test_an_interval_in_few_words(figures: tuple[float, float | None, float | None], said: str) -> None:
    assert over(*figures) == said


def test_json_holds_the_rows() -> None:
    told = json.loads(attnbench("show", RUN, "--json"))
    assert len(told["cells"]) == len(rows(RUN))
    assert {cell["plugin"]: cell["latency_s"] for cell in told["cells"]} == {
        r["plugin"]: r.get("latency_s") for r in rows(RUN)
    }


def test_a_run_ends_with_its_numbers(tmp_path: Path) -> None:
    sizes = ("--seq", "16,32", "--heads", 2, "--scope", "attention", "--threads", 1, "--precision", "90%")
    words = [sys.executable, "-m", "attnbench", "run", "--plugins", "naive", "--baseline", "naive", *map(str, sizes)]
    done = subprocess.run([*words, "--out", str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0
    (path,) = tmp_path.iterdir()
    assert attnbench("show", path).strip() in done.stdout
    assert done.stdout.splitlines()[-1] == f"run: {path}"
