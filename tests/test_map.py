"""Maps: what is predicted between measurements on surfaces that are known, and a small one measured and drawn for real."""

from __future__ import annotations

import json
import subprocess
import sys
from math import exp, log, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attnbench.advice.best import Limits
from attnbench.advice.field import Field, Guess, Place, contenders, regret, tied
from attnbench.advice.map import axes_of
from attnbench.errors import AttnbenchError
from attnbench.records.schema import Row
from attnbench.report.style import shade
from attnbench.sizes import Sweep
from attnbench.stats.surface import Surface
from attnbench.sweep.cell import Cell
from attnbench.workload import Workload


def points(*pairs: tuple[float, float]) -> np.ndarray:
    return np.array(pairs, dtype=float)


def test_a_surface_goes_through_its_values_and_bends_between_them() -> None:
    random = np.random.default_rng(0)
    known, asked = random.uniform(0, 5, (15, 2)), random.uniform(0.5, 4.5, (200, 2))

    def truth(p: np.ndarray) -> np.ndarray:
        return 0.5 * p[:, 0] - 0.1 * p[:, 1] + 0.1 * np.sin(p[:, 0])

    surface = Surface.fit(known, truth(known) + 0.01 * random.normal(size=15), np.full(15, 0.01))
    mean, deviation = surface.at(asked)
    off = np.abs(mean - truth(asked))
    assert off.max() < 0.15
    assert (off < 2 * deviation).mean() > 0.9
    far = surface.at(points((20.0, 20.0)))[1]
    assert far > 3 * deviation.max()


def test_one_value_says_little_of_elsewhere() -> None:
    mean, deviation = Surface.fit(points((0, 0)), np.array([1.0]), np.array([0.01])).at(points((0, 0), (4, 0)))
    assert mean[0] == pytest.approx(1.0)
    assert deviation[0] < 0.1
    assert deviation[1] > 1.0


# Seconds of a call of made-up variants by length and batch: a start, and products at a rate of its own.
WORK = {
    "sdpa": (3e-4, 1.0),
    "quick to start": (2e-5, 0.6),
    "quick": (2e-4, 0.3),
    "rough": (1e-5, 0.05),
    "slow": (1e-3, 3),
}
LENGTHS, BATCHES = (64, 128, 256, 512, 1024, 2048), (1, 2, 4, 8)


def flops(place: Place) -> int:
    length, batch = place
    return 128 * 8 * batch * length * length


def seconds(plugin: str, place: Place) -> float:
    start, share = WORK[plugin]
    return start + share * flops(place) / 5e10


def cells(place: Place) -> list[Cell]:
    workload = Workload(seq=place[0], kv_seq=place[0], batch=place[1])
    return [Cell(p, p, "", "", workload, "exact", workspace=0, flops=flops(place)) for p in WORK]


def rows(place: Place, noise: float = 0.0, seed: int = 0) -> list[Row]:
    random = np.random.default_rng([seed, *place])
    told = {plugin: seconds(plugin, place) * exp(noise * random.normal()) for plugin in WORK}
    return [row(plugin, place, took, told["sdpa"] / took) for plugin, took in told.items()]


def row(plugin: str, place: Place, took: float, gain: float) -> dict[str, Any]:
    workload = Workload(seq=place[0], kv_seq=place[0], batch=place[1])
    error = (0.5 if place[0] > 256 else 1e-7) if plugin == "rough" else 1e-3
    figures = {"latency_s": took, "speedup": gain, "speedup_low": gain * 0.98, "speedup_high": gain * 1.02}
    cell = {"plugin": plugin, "variant": plugin, "family": "exact", "status": "ok", "reason": "", "baseline": "sdpa"}
    return cell | workload.as_dict() | figures | {"approximation_rel_l2": error, "peak_bytes": 2**20 * place[1]}


MEASURED = [(64, 1), (64, 8), (256, 1), (256, 8), (512, 2), (1024, 4), (2048, 1), (512, 8)]


def field(limits: Limits, noise: float = 0.0) -> Field:
    known = Field(("seq", "batch"), limits, "sdpa")
    for place in MEASURED:
        known.learn(place, cells(place), rows(place, noise))
    return known


def test_the_choice_between_measurements_is_the_fastest_within_two_per_cent() -> None:
    known, limits = field(Limits(1e-2), noise=0.01), Limits(1e-2)
    shapes = [(length, batch) for length in (70, 99, 200, 333, 480, 777, 1500, 2000) for batch in (1, 3, 5, 8)]
    right = 0
    for place in shapes:
        able = [r for r in rows(place) if not limits.broken_by(r)]
        best = min(r["latency_s"] for r in able)
        choice = known.guesses(place, cells(place))[0]
        assert choice.plugin in {r["plugin"] for r in able} or place[0] == 333
        right += seconds(choice.plugin, place) <= 1.02 * best
    assert right >= 0.95 * len(shapes)


def test_its_seconds_are_about_right() -> None:
    for place in ((100, 2), (700, 4), (2048, 8)):
        assert field(Limits()).seconds(place, cells(place)) == pytest.approx(seconds("sdpa", place), rel=0.3)


def test_a_limit_holds_where_it_held_on_every_side() -> None:
    known = field(Limits(1e-2))
    holds = {
        place: {g.plugin: g.holds for g in known.guesses(place, cells(place))}["rough"]
        for place in ((100, 2), (400, 2), (1500, 2), (2048, 8), (64, 1))
    }
    assert holds == {(100, 2): 1.0, (400, 2): 0.5, (1500, 2): 0.0, (2048, 8): 0.0, (64, 1): 1.0}
    first = known.guesses((400, 2), cells((400, 2)))[0]
    assert (first.plugin, first.holds) == ("quick", 1.0)


def test_memory_that_is_predicted_to_be_too_much_is() -> None:
    known, place = field(Limits(None, 3 * 2**20)), (300, 1)
    assert all(g.holds == 1 for g in known.guesses(place, cells(place)))
    big = cells(place)
    for cell in big:
        cell.workspace = 4 << 20
    assert all(g.holds == 0 for g in known.guesses(place, big))


def test_only_those_that_may_win_are_measured_and_only_what_is_near_is_tied() -> None:
    guesses = [
        Guess("first", log(3.0), 0.02, 1.0),
        Guess("near", log(2.95), 0.02, 1.0),
        Guess("behind", log(2.0), 0.02, 1.0),
        Guess("too rough", log(9.0), 0.02, 0.0),
        Guess("unknown", log(1.5), 0.5, 1.0),
    ]
    assert contenders(guesses) == ["first", "near", "unknown"]
    assert "too rough" in contenders(guesses, any_error=True)
    assert tied(guesses) == ("near", "unknown")


def test_regret_is_what_another_might_save_beyond_two_per_cent() -> None:
    first = Guess("first", 1.0, 0.0, 1.0)
    assert regret([first]) == 0.0
    assert regret([first, Guess("sure", 1.1, 0.0, 0.5)]) == pytest.approx(
        0.04, abs=1e-3
    )  # by half a chance, 0.1 - 0.02
    even = regret([first, Guess("as fast", 1.02, 0.1, 1.0)])
    assert even == pytest.approx(0.1 / sqrt(2 * np.pi), rel=1e-3)
    assert regret([first, Guess("behind", 0.0, 0.1, 1.0)]) < 1e-6
    assert regret([Guess("rough", 1.0, 0.1, 0.5)]) == 0.5


def test_axes_are_the_words_with_several_values() -> None:
    axes = axes_of(Sweep(seq=(64, 32, 128), batch=(1, 2), mask=("causal",)))
    assert [(axis.name, axis.values) for axis in axes] == [("seq", (32, 64, 128)), ("batch", (1, 2))]
    axes = axes_of(Sweep(seq=(64,), heads=(8, 4), phase=("forward", "decode", "train")))
    assert [(axis.name, axis.is_size) for axis in axes] == [("heads", True), ("phase", False)]
    with pytest.raises(AttnbenchError, match="--seq, --batch and --heads have several"):
        axes_of(Sweep(seq=(64, 32), batch=(1, 2), heads=(1, 2)))
    with pytest.raises(AttnbenchError, match="none has several"):
        axes_of(Sweep(seq=(64,)))


SMALL = "--heads 2 --threads 1 --plugins naive,linear,retention --baseline naive --budget 12 --mask full"


def best(*arguments: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "attnbench", "best", *SMALL.split(), *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)


def test_a_small_map_is_measured_and_drawn(tmp_path: Path) -> None:
    picture = tmp_path / "map.svg"
    done = best("--map", picture, "--seq", "16,32,64", "--batch", "1,2", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    assert told["axes"] == {"seq": [16, 32, 64], "batch": [1, 2]}
    assert {(cell["seq"], cell["batch"]) for cell in told["cells"]} == {(n, b) for n in (16, 32, 64) for b in (1, 2)}
    assert {cell["plugin"] for cell in told["cells"]} == {"naive"}  # nothing else is this close to exact attention
    assert any(cell["measured"] for cell in told["cells"])
    drawn = picture.read_text()
    assert drawn.startswith("<?xml")
    assert shade("exact") in drawn, "in the colour of its family"


def test_a_map_of_which_nothing_holds_the_limits_says_so(tmp_path: Path) -> None:
    picture = tmp_path / "map.png"
    done = best("--map", picture, "--seq", "16,32", "--phase", "forward,decode", "--max-error", 1e-12, "--budget", 6)
    assert done.returncode == 1
    assert "none" in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--map", "map.pdf", "--seq", "16,32"), "ends with .png or .svg"),
        (("--map", "no/such/map.png", "--seq", "16,32"), "no/such is no folder"),
        (("--map", "map.png", "--seq", "16", "--batch", "1"), "none has several"),
        (("--map", "map.png", "--seq", "16,32", "--batch", "1,2", "--head-dim", "8,16"), "have several values"),
    ],
)
def test_what_is_no_map_is_one_line(arguments: tuple[object, ...], said: str) -> None:
    done = best(*arguments)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert said in done.stderr
