"""calibrate, of impl=auto: what is slower is told by name, what is not is left in peace, and what was found is kept."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from test_roofline import FACTS, make

from attnbench.advice import auto
from attnbench.commands import main
from attnbench.devices.machine import default_threads
from attnbench.records import ceilings
from attnbench.records.ceilings import Checked
from attnbench.registry import Found
from attnbench.workers.ask import ask_machine
from attnbench.workers.server import Forkserver

PLANTED = '''
import time

import torch
from torch.nn.functional import scaled_dot_product_attention

from attnbench import Choice, Implementation, Option


class Planted(Choice):
    """Two that compute the same, of which the one called {slow} waits before each call; auto takes the first."""

    options = {{"impl": Option("auto", "", ("auto", "first", "second", "never", "other"))}}

    def implementations(self, workload):
        def attend(name, query, key, value):
            if name == {slow!r}:
                time.sleep(0.02)
            mask = torch.ones(workload.seq, workload.kv_seq, dtype=torch.bool).tril(workload.offset)
            seen = mask if workload.is_causal else None
            return scaled_dot_product_attention(query, key, value, seen, enable_gqa=True)

        def one(name, **more):
            return Implementation(name, lambda w: lambda *tensors: attend(name, *tensors), **more)

        never = one("never", unsupported=lambda w: "not here")
        if self.impl == "other":  # not the same function: auto does not know it
            return (one("other"),)
        return never, one("first"), one("second", passed_over=lambda w: "hoped to be slower")
'''


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "attnbench"


def test_a_slower_choice_is_found_and_named(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = []
    for name, slow in (("wrong", "first"), ("right", "second")):
        (tmp_path / f"{name}.py").write_text(PLANTED.format(slow=slow))
        found.append(Found(name, f"{name}:Planted", "attnbench", "0", path=str(tmp_path)))
    monkeypatch.setattr(auto, "_own", lambda: found)
    monkeypatch.setattr(auto, "LENGTHS", (16, 32))
    monkeypatch.setattr(auto, "DTYPES", ("float32",))
    words = ["calibrate", "--only", "auto", "--seconds", "40", "--threads", "1", "--device", "cpu"]
    done = CliRunner().invoke(main, words, catch_exceptions=False)
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    (kept,) = cache.iterdir()
    told = json.loads(kept.read_text())["checked"]
    wheres = [(one["phase"], one["kv_seq"]) for one in told]
    assert wheres == 2 * [("forward", 16), ("forward", 32), ("decode", 32)]
    assert all((one["took"], one["other"]) == ("first", "second") for one in told)
    assert any(one["sure"] for one in told[:3]), "on a busy machine perhaps not all three"
    assert not any(one["sure"] for one in told[3:])
    named = [line for line in lines if "as fast as auto on" in line]
    assert all(line.startswith("  wrong:impl=second is ") for line in named)
    assert len(named) == sum(one["sure"] and not one["disturbed"] for one in told)
    assert f"auto is certainly slower by over 5% in {len(named)} of 6 cases" in done.stdout
    assert [one["fastest"] for one in told] == 3 * ["second"] + 3 * ["first"]


@pytest.mark.parametrize(
    ("times", "low", "high", "sure", "fastest", "advice"),
    [
        (1.2, 1.06, 1.3, True, "torch", "int8:impl=torch"),
        (1.2, 1.06, 1.3, False, "torch", ""),
        (1.2, 0.99, 1.3, False, "", ""),
        (0.5, 0.4, 0.6, False, "qk", ""),
        (3.0, None, None, False, "", ""),
        (None, None, None, False, "", ""),
    ],
)
def test_a_word_is_said_where_it_is_certain(
    times: float | None, low: float | None, high: float | None, sure: bool, fastest: str, advice: str
) -> None:
    found = Checked("int8", "float32", "forward", 512, "qk", "torch", times, low, high, sure)
    assert (found.fastest, found.advice) == (fastest, advice)
    assert not replace(found, disturbed=True).advice


def test_it_lies_beside_the_ceilings_and_neither_drops_the_other(cache: Path) -> None:
    found = [
        Checked("int8", "float32", "forward", 512, "qk", "torch", 1.2, 1.1, 1.3, True),
        Checked("tiled", "bfloat16", "decode", 4096, "native", why="strip skipped"),
    ]
    assert ceilings.checked(FACTS, "cpu", 1) == []
    path = ceilings.store_checked(found, FACTS, "cpu", 1)
    assert ceilings.stored(FACTS, "cpu", 1) is None
    assert ceilings.store(make(), FACTS) == path
    assert (ceilings.checked(FACTS, "cpu", 1), ceilings.stored(FACTS, "cpu", 1)) == (found, make())
    ceilings.store_checked(found[:1], FACTS, "cpu", 1)
    assert (ceilings.checked(FACTS, "cpu", 1), ceilings.stored(FACTS, "cpu", 1)) == (found[:1], make())
    assert ceilings.checked(FACTS, "cpu", 2) == []


@pytest.mark.parametrize(
    ("ratio", "rounds", "sure"),
    [(1.2, 40, True), (1.2, 6, False), (1.06, 40, False), (1.0, 40, False)],  # the spread is 4%
)
def test_certain_takes_more_than_the_usual_interval(ratio: float, rounds: int, sure: bool) -> None:
    noise = [1 + 0.04 * math.sin(2.3 * i) for i in range(rounds)]
    base = [[0, i, 0.0, 1, 1e-3 * ratio * noise[i], 0.0] for i in range(rounds)]
    other = [[0, i, 0.0, 1, 1e-3, 0.0] for i in range(rounds)]
    assert auto._sure(base, other, ratio * 0.98) == sure
    assert not auto._sure(base, other, None)


@pytest.mark.parametrize("content", ["", "[]", '{"checked": 3}', '{"checked": [{"variant": "int8"}]}'])
def test_what_is_broken_is_nothing(cache: Path, content: str) -> None:
    ceilings.store_checked([], FACTS, "cpu", 1).write_text(content)
    assert ceilings.checked(FACTS, "cpu", 1) == []


def test_plugins_and_a_run_say_what_was_found(cache: Path, tmp_path: Path) -> None:
    with Forkserver(1) as server:
        facts: dict[str, Any] = ask_machine(server).machine
    found = [
        Checked("ssd", dtype, "forward", 512, "fla", "torch", times, 1.1, 1.3, True)
        for dtype, times in (("float32", 1.25), ("bfloat16", 1.2))
    ]
    for threads in {1, default_threads()}:
        ceilings.store_checked(found, facts, "cpu", threads)
    said = "attnbench calibrate: ssd:impl=torch is 1.25x [1.10, 1.30] as fast as auto on float32, forward, 512"
    done = CliRunner().invoke(main, ["plugins", "ssd"], catch_exceptions=False)
    assert said in done.stdout
    words = ["run", "--plugins", "ssd", "--baseline", "none", "--seq", "16", "--scope", "attention", "--budget", "1"]
    words += ["--threads", "1", "--dtype", "float32", "--device", "cpu", "--out", str(tmp_path)]
    done = CliRunner().invoke(main, words, catch_exceptions=False)
    assert said in done.stderr.splitlines()
    assert "bfloat16, forward" not in done.stderr, "it is not what this run computes in"
