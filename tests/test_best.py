"""The fastest variant within limits: on made-up figures whose answer is known, and measured for real."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import attnbench
from attnbench.advice.best import Limits, choose
from attnbench.errors import AttnbenchError
from attnbench.records.run import as_frame
from attnbench.sizes import Sweep
from attnbench.workload import Workload

WORKLOAD = Workload(seq=512, kv_seq=512)


def row(plugin: str, seconds: float, error: float | None = 1e-7, memory: float = 2**20, **more: Any) -> dict[str, Any]:
    """A cell whose speedup over a baseline of one second has an interval of 1% to either side."""
    speedup = 1 / seconds
    figures = {"latency_s": seconds, "speedup": speedup, "speedup_low": speedup * 0.99, "speedup_high": speedup * 1.01}
    cell = {"plugin": plugin, "variant": plugin, "family": "exact", "status": "ok", "reason": "", "baseline": "sdpa"}
    return cell | WORKLOAD.as_dict() | figures | {"approximation_rel_l2": error, "peak_bytes": memory} | more


FIELD = (
    row("sdpa", 1.0, speedup=1.0),
    row("exact", 0.8),
    row("rough", 0.2, error=0.3),
    row("close", 0.5, error=5e-3, memory=2**30),
    row("recurrent", 0.1, error=None),
    row("broken", 0.01, status="wrong", reason="it is"),
)


@pytest.mark.parametrize(
    ("error", "memory", "plugin"),
    [
        (1e-2, None, "close"),
        (1e-2, 2**25, "exact"),
        (1.0, None, "rough"),
        (None, None, "recurrent"),
        (1e-3, None, "exact"),
        (1e-9, None, None),
        (None, 1, None),
    ],
)
def test_the_fastest_that_holds_the_limits(error: float | None, memory: int | None, plugin: str | None) -> None:
    found = choose(as_frame(FIELD), Limits(error, memory))
    assert (found.row and found.row["plugin"]) == plugin
    assert {other["plugin"] for other, _ in found.others} == {r["plugin"] for r in FIELD} - {plugin}
    assert all(why for _, why in found.others)


def test_each_other_has_its_own_reason() -> None:
    why = {other["plugin"]: reason for other, reason in choose(as_frame(FIELD), Limits(1e-2, 2**25)).others}
    assert why == {
        "sdpa": "takes 1.25 times as long",
        "close": "its peak of 1.00 GiB is over 32.0 MiB",
        "rough": "its error of 0.30 is over 0.010",
        "recurrent": "it approximates no softmax attention, so no error of it is known",
        "broken": "wrong: it is",
    }


def test_who_is_not_told_apart_is_named() -> None:
    found = choose(as_frame([*FIELD, row("as fast", 0.503)]), Limits())
    assert (found.tied, found.is_certain) == (("as fast",), False)


def test_a_workload_is_a_sweep_of_one() -> None:
    for workload in (
        Workload(
            seq=100,
            kv_seq=300,
            batch=2,
            heads=8,
            kv_heads=2,
            head_dim=32,
            value_dim=16,
            mask="causal",
            dtype="bfloat16",
        ),
        Workload(seq=1, kv_seq=300, phase="decode", mask="causal"),
        Workload(
            seq=64, kv_seq=64, scope="block", block="decoder-only", norm="post", mask="causal", layers=3, threads=2
        ),
        Workload(seq=64, kv_seq=64, batch=2, lengths="64,30", inputs="outlier", seed=4),
    ):
        assert Sweep.of(workload).workloads() == [workload]


def best(*arguments: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "attnbench", "best", *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, timeout=300)


SMALL = (
    "--heads",
    2,
    "--threads",
    1,
    "--plugins",
    "naive,linear,retention",
    "--baseline",
    "naive",
    "--budget",
    12,
    "--mask",
    "full",
)


def test_it_measures_and_says_why_others_lost(tmp_path: Path) -> None:
    done = best("--seq", 64, *SMALL, "--json", "--results", tmp_path)
    told = json.loads(done.stdout)
    assert (done.returncode, done.stderr, told["plugin"], told["source"]) == (0, "", "naive", "")
    assert told["latency_s"] > 0
    assert told["speedup"] == 1.0
    why = {other["variant"]: other["why"] for other in told["others"]}
    assert "its error of" in why["linear"]
    assert why["retention"].startswith("unsupported: ")
    done = best("--seq", 64, *SMALL, "--max-error", 1e-12, "--results", tmp_path)
    assert (done.returncode, "nothing holds the limits" in done.stdout) == (1, True)


def test_it_reads_a_run_that_tells(tmp_path: Path) -> None:
    words = ("run", "--seq", 64, "--scope", "attention", *SMALL, "--out", tmp_path, "--precision", "90%")
    done = subprocess.run(
        [sys.executable, "-m", "attnbench", *map(str, words)], capture_output=True, text=True, timeout=300
    )
    (path,) = tmp_path.iterdir()
    assert done.returncode == 0
    told = json.loads(best("--seq", 64, *SMALL, "--json", "--results", tmp_path).stdout)
    assert (told["plugin"], told["source"]) == ("naive", str(path))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--seq", "64,128"), "best answers for one workload"),
        (("--seq", 64, "--max-error", "small"), "--max-error 'small' is no error"),
        (("--seq", 64, "--max-memory", "much"), "--max-memory"),
    ],
)
def test_what_is_no_question_is_one_line(arguments: tuple[object, ...], said: str) -> None:
    done = best(*arguments, *SMALL)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert said in done.stderr


def test_the_library_gives_a_callable() -> None:
    workload = Workload(seq=64, kv_seq=64, heads=2, kv_heads=2, head_dim=32, value_dim=32)
    attend = attnbench.best(workload, plugins="naive,linear", budget=10)
    query, key, value = (torch.randn(1, 2, 64, 32) for _ in range(3))
    torch.testing.assert_close(attend(query, key, value), F.scaled_dot_product_attention(query, key, value))
    assert attend.implementation
    with pytest.raises(AttnbenchError, match="nothing holds the limits: "):
        attnbench.best(workload, plugins="linear", max_error=1e-9, budget=10)
    with pytest.raises(AttnbenchError, match="best gives attention alone"):
        attnbench.best(workload.replace(phase="decode", seq=1, mask="causal"))
