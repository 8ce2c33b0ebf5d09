"""calibrate, of impl=auto: what is slower is told by name, what is not is left in peace, and what was found is kept."""

from __future__ import annotations

import json
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
    """Two are as fast, and the one that auto takes waits {seconds} seconds before each call."""

    options = {{"impl": Option("auto", "", ("auto", "first", "second", "never", "other"))}}

    def implementations(self, workload):
        def attend(seconds, query, key, value):
            if seconds:
                time.sleep(seconds)
            mask = torch.ones(workload.seq, workload.kv_seq, dtype=torch.bool).tril(workload.offset)
            seen = mask if workload.is_causal else None
            return scaled_dot_product_attention(query, key, value, seen, enable_gqa=True)

        def one(name, seconds=0.0, **more):
            return Implementation(name, lambda w: lambda *tensors: attend(seconds, *tensors), **more)

        never = one("never", unsupported=lambda w: "not here")
        if self.impl == "other":  # not the same function: auto does not know it
            return (one("other"),)
        return never, one("first", {seconds}), one("second", passed_over=lambda w: "hoped to be slower")
'''


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "attnbench"


def test_a_slower_choice_is_found_and_named(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = []
    for name, seconds in (("slow", 0.02), ("fair", 0.0)):
        (tmp_path / f"{name}.py").write_text(PLANTED.format(seconds=seconds))
        found.append(Found(name, f"{name}:Planted", "attnbench", "0", path=str(tmp_path)))
    monkeypatch.setattr(auto, "_own", lambda: found)
    monkeypatch.setattr(auto, "LENGTHS", (16, 32))
    monkeypatch.setattr(auto, "DTYPES", ("float32",))
    words = ["calibrate", "--only", "auto", "--seconds", "10", "--threads", "1", "--device", "cpu"]
    done = CliRunner().invoke(main, words, catch_exceptions=False)
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert sum(line.startswith("  slow:impl=second is ") for line in lines) == 3
    assert not any("fair:impl" in line for line in lines)
    assert "auto is certainly slower by over 5% in 3 of 6 cases" in done.stdout
    (kept,) = cache.iterdir()
    told = json.loads(kept.read_text())["checked"]
    wheres = [(one["phase"], one["kv_seq"]) for one in told]
    assert wheres == 2 * [("forward", 16), ("forward", 32), ("decode", 32)]
    assert all((one["took"], one["other"]) == ("first", "second") for one in told)
    assert all(one["fastest"] == "second" and one["times"] > 2 for one in told[:3])


@pytest.mark.parametrize(
    ("times", "low", "high", "fastest", "advice"),
    [
        (1.2, 1.06, 1.3, "torch", "int8:impl=torch"),
        (1.2, 1.04, 1.3, "torch", ""),
        (1.2, 0.99, 1.3, "", ""),
        (0.5, 0.4, 0.6, "qk", ""),
        (3.0, None, None, "", ""),
        (None, None, None, "", ""),
    ],
)
def test_a_word_is_said_where_it_is_certain(
    times: float | None, low: float | None, high: float | None, fastest: str, advice: str
) -> None:
    found = Checked("int8", "float32", "forward", 512, "qk", "torch", times, low, high)
    assert (found.fastest, found.advice) == (fastest, advice)


def test_it_lies_beside_the_ceilings_and_neither_drops_the_other(cache: Path) -> None:
    found = [
        Checked("int8", "float32", "forward", 512, "qk", "torch", 1.2, 1.1, 1.3),
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


@pytest.mark.parametrize("content", ["", "[]", '{"checked": 3}', '{"checked": [{"variant": "int8"}]}'])
def test_what_is_broken_is_nothing(cache: Path, content: str) -> None:
    ceilings.store_checked([], FACTS, "cpu", 1).write_text(content)
    assert ceilings.checked(FACTS, "cpu", 1) == []


def test_plugins_says_what_was_found(cache: Path) -> None:
    with Forkserver(1) as server:
        facts: dict[str, Any] = ask_machine(server).machine
    found = Checked("sdpa", "float32", "forward", 512, "native", "strip", 1.2, 1.1, 1.3)
    ceilings.store_checked([found], facts, "cpu", default_threads())
    done = CliRunner().invoke(main, ["plugins", "sdpa"], catch_exceptions=False)
    assert "attnbench calibrate: sdpa:impl=strip is 1.20x [1.10, 1.30] as fast as auto on float32, forward, 512" in (
        done.stdout
    )
