"""Whether someone's speedups hold here: what is drawn, what is said of a pair of figures, and a run of made-up claims."""

from __future__ import annotations

from typing import Any

import pytest
from click.testing import CliRunner
from test_compare import RUN, row

from attnbench.advice import verify as advice
from attnbench.advice.verify import FAILS, HOLDS, UNABLE, UNSURE, claims, draw, verify
from attnbench.commands import main
from attnbench.commands import verify as command
from attnbench.errors import AttnbenchError
from attnbench.records.run import rows
from attnbench.workload import Workload

W = Workload(seq=512, kv_seq=512)


def test_a_draw_is_of_claims_alone_and_its_seed_repeats_it() -> None:
    every = rows(RUN)
    able = claims(every)
    assert 0 < len(able) < len(every)
    assert all(each["plugin"] != each["baseline"] and each["speedup_low"] < each["speedup_high"] for each in able)
    drawn = draw(able, 8, seed=3)
    assert drawn == draw(able, 8, seed=3) != draw(able, 8, seed=4)
    assert [able.index(each) for each in drawn] == sorted(able.index(each) for each in drawn)
    assert {each["plugin"] for seed in range(60) for each in draw(able, 8, seed)} == {each["plugin"] for each in able}
    assert draw(able, 10**6, seed=0) == able


@pytest.mark.parametrize(
    ("ours", "verdict", "why"),
    [
        ({"speedup": 2.02, "seconds": 9.0}, HOLDS, ""),  # seconds are another machine's
        ({"speedup": 2.16}, HOLDS, ""),  # faster for certain, and by less than a tenth
        ({"speedup": 1.5}, FAILS, ""),
        ({"speedup": 3.0}, FAILS, ""),
        ({"speedup": 2.2}, UNSURE, "longer --budget"),
        ({"speedup": 2.0, "half": 0.3}, UNSURE, "longer --budget"),
        ({"speedup": 2.0, "speedup_low": None}, UNSURE, "too few rounds"),
        ({"speedup": 1.5, "warnings": ["disturbed"]}, UNSURE, "busy"),
        ({"status": "wrong", "reason": "NaN"}, FAILS, "wrong here: NaN"),
        ({"status": "unsupported", "reason": "no AMX"}, UNABLE, "unsupported: no AMX"),
        ({}, UNABLE, "baseline sdpa has no number"),
    ],
)
def test_a_verdict_is_that_of_the_speedups(ours: dict[str, Any], verdict: str, why: str) -> None:
    found = advice._judged(row(speedup=2.0), W, row(**ours), "", margin=0.1)
    assert found.verdict == verdict
    assert why in found.why
    assert bool(found.why) == bool(why)


def test_the_terminal_tells_both_sides_and_counts_verdicts(capsys: pytest.CaptureFixture[str]) -> None:
    pairs = [(2.0, {"speedup": 2.02}), (2.0, {"speedup": 3.0}), (2.0, {"status": "unsupported", "reason": "no AMX"})]
    checked = [advice._judged(row(speedup=had), W, row(**has), "", margin=0.1) for had, has in pairs]
    command._print(advice.Verified(checked, 9, {"cpu": "mine", "cores": 4}), {"machine": {"cpu": "yours"}}, 5, "10%")
    said = capsys.readouterr().out
    for words in ("theirs: yours\n", "here:   mine, 4 cores\n", "2.02x [2.01, 2.03]", "1.50x [1.49, 1.51]", "no AMX"):
        assert words in said
    assert said.endswith("(--seed 5): 1 holds, 1 does not hold, 1 can't run here (holds: within 10%)\n")


def test_claims_are_measured_here_and_those_that_cannot_be_say_why() -> None:
    def claim(plugin: str, seq: int, speedup: float, **more: Any) -> dict[str, Any]:
        size = {"seq": seq, "kv_seq": seq, "threads": 1, **more}
        return row(plugin, speedup=speedup, variant=plugin.split(":")[0], **size)

    lies = [claim("naive", 32, 1e4), claim("linear", 32, 1e-4)]
    impossible = [
        claim("gone:impl=auto", 32, 2.0),
        claim("int8:magic=1", 32, 2.0),
        claim("naive", 64, 2.0, threads=4000),
        claim("naive", 96, 2.0, device="cuda"),
        claim("naive", 96, 2.0, baseline="lost"),
    ]
    silent = [row("naive", variant="naive"), row("sdpa", speedup=1.0)]
    found = verify([*lies, *impossible, *silent], seed=0, budget=8)
    assert found.claims == len(found.checked) == 7
    for each in found.checked[:2]:
        assert each.verdict in (FAILS, UNSURE)  # the latter where this machine is busy
        assert each.ours
        assert (each.ours["status"], each.ours["baseline"]) == ("ok", "sdpa")
        assert 0.001 < each.ours["speedup"] < 1000
        assert each.change
        assert each.change.ratio == pytest.approx(each.ours["speedup"] / each.theirs["speedup"])
    assert [each.verdict for each in found.checked[2:]] == [UNABLE] * 5
    for each, word in zip(found.checked[2:], ("gone", "magic", "--threads", "cuda", "lost"), strict=True):
        assert word in each.why
    assert found.failed
    assert found.facts["cpu"]


def test_a_run_without_a_speedup_is_refused_in_a_line(tmp_path: Any) -> None:
    with pytest.raises(AttnbenchError, match="no cell of it has a speedup"):
        verify([row("naive")], seed=0)
    asked = CliRunner().invoke(main, ["verify", str(tmp_path / "none")])
    assert asked.exit_code == 2
    assert "none is not there" in asked.output
