"""The scripts of benchmarks/ that need a GPU: what they do with what they measure, on parts and clocks made up here."""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


def script(name: str) -> Any:
    return importlib.import_module(name)


def row(plugin: str, seconds: list[float], **fields: Any) -> dict[str, Any]:
    """A row of a run with a sample for each of `seconds`, two calls each."""
    from attnbench.workload import Workload

    w = Workload(seq=512, kv_seq=512, head_dim=128, value_dim=128, dtype="bfloat16")
    samples = [[0, i, 0.0, 2, 2 * s] for i, s in enumerate(seconds)]
    made = {"plugin": plugin, "variant": plugin.split(":")[0], "status": "ok", "reason": "", "samples": samples}
    return {**w.as_dict(), **made, "approximation_rel_l2": 1e-2, **fields}


def saved(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"schema": 1}))
    (folder / "cells.jsonl").write_text(json.dumps({"schema": 1, "cells": rows}) + "\n")
    return folder


# gpu.py


def part(name: str, code: str, share: float = 1.0) -> Any:
    return script("gpu").Part(name, share, [sys.executable, "-c", code])


def test_a_part_that_fails_stops_none_behind_it(tmp_path: Path) -> None:
    gpu = script("gpu")
    todo = [part("one", "print('said'); raise SystemExit(3)"), gpu.Part("none", 1.0, []), part("two", "")]
    gpu.work(todo, time.monotonic() + 60, tmp_path)
    assert [each.rc for each in todo] == [3, None, 0]
    assert (tmp_path / "00-one.log").read_text() == "said\n"
    assert "not run: nothing to do" in str(todo[1])


def test_a_part_that_hangs_is_ended_and_counts_as_failed() -> None:
    gpu = script("gpu")
    hangs = part("hangs", "import time; time.sleep(60)")
    gpu.work([hangs], time.monotonic() + 2, None)
    assert hangs.rc
    assert hangs.why.startswith("ended after")
    assert hangs.seconds < 20


def test_what_one_part_leaves_goes_to_those_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = script("gpu")
    limits = []
    monkeypatch.setattr(gpu, "do", lambda _part, limit, _log: limits.append(limit))
    todo = [part("quick", "", 0.25), part("half", "", 0.25), part("rest", "", 0.5)]
    gpu.work(todo, time.monotonic() + 100, None)
    assert limits == pytest.approx([25, 33.3, 100], abs=1)
    late = part("late", "")
    gpu.work([late], time.monotonic(), None)
    assert "no time left" in str(late)


def test_parts_come_in_order_and_share_all_the_time(tmp_path: Path) -> None:
    gpu = script("gpu")
    names = [each.name for each in gpu.parts("cuda", tmp_path)]
    assert names == ["tests", "calibrate", *gpu.SWEEPS, "gpu-kernels", "do-bench", "memory"]
    assert sum(each.share for each in gpu.parts("cuda", tmp_path)) == pytest.approx(1)


@pytest.mark.slow
def test_sweeps_have_options_that_attnbench_knows_and_are_small_on_a_cpu(tmp_path: Path) -> None:
    from attnbench.commands import main

    gpu = script("gpu")
    for each in gpu.parts("cpu", tmp_path):
        if each.name in gpu.SWEEPS and each.command:  # of peers there may be none
            done = CliRunner().invoke(main, [*each.command[3:], "--budget", "5", "--dry-run"])
            assert done.exit_code == 0, done.output
            assert "512" in done.output
            assert "16384" not in done.output


def test_a_sweep_goes_on_where_it_was_cut_off_on_the_same_machine_alone(tmp_path: Path) -> None:
    gpu, shared = script("gpu"), script("shared")
    run = tmp_path / "2026-01-01-gpu-dense"
    run.mkdir()

    def command(machine: dict[str, Any], finished: str | None) -> list[str]:
        (run / "run.json").write_text(json.dumps({"schema": 1, "machine": machine, "finished": finished}))
        return list(gpu.sweep("gpu-dense", "sdpa", {"seq": "512"}, "cpu", tmp_path))

    here = dict(shared.facts())
    assert command(here, None)[-2:] == ["--resume", str(run)]
    assert command(here, "2026-01-01") == []
    assert "--resume" not in command(here | {"gpu": "another"}, None)

    later = tmp_path / "2026-01-01-gpu-dense-2"
    later.mkdir()
    (later / "run.json").write_text(json.dumps({"schema": 1, "machine": here, "started": "2026-01-01T12"}))
    assert command(here, "2026-01-01")[-2:] == ["--resume", str(later)]


# gpu_kernels.py


def test_bars_compare_rounds_of_both_and_name_what_is_missing(tmp_path: Path) -> None:
    kernels = script("gpu_kernels")
    rate = {"flops_per_s": 6e14, "flops": 1, "latency_low_s": None, "latency_high_s": None, "implementation": "torch"}
    slow, fast = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], [0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5]
    rows = [
        row("sdpa:backend=flash", slow, **rate),
        row("sdpa:backend=cudnn", [], status="unsupported", reason="no kernel"),
        row("int8:rows=1", fast),
        row("block-sparse:pattern=window:window=1024", fast, density=0.25),
        row("flex-dense", slow, density=None),
    ]
    table = kernels.Rows([saved(tmp_path / "run", rows)])
    found = {bar.what: bar for bar in kernels.bars(table, dict.fromkeys(kernels.LENGTHS, "512"))}

    flash = found["int8, full, 512, head dim 128: x sdpa:backend=flash"]
    assert (flash.measured, flash.low, flash.high, flash.verdict) == (2.0, 2.0, 2.0, "met")
    sage = found["int8, full, 512, head dim 128: x sageattention"]
    assert sage.measured is None
    assert sage.verdict.startswith("not run: ")
    assert found["int8, full, 512, head dim 128: relative L2"].verdict == "met"
    assert found["int8, causal, 512, head dim 128: relative L2"].verdict.startswith("not run")
    assert found["sdpa:backend=flash, full, 512: TFLOP/s"].verdict == "met"
    # Twice as fast, at a quarter of the pairs: half of what was promised.
    share = found["block-sparse:window=1024, full, 512: share of 4.0 x flex-dense"]
    assert (share.measured, share.verdict) == (0.5, "MISSED")
    assert any("unsupported: no kernel" in line for line in kernels.reached(table, 512))


def test_rounds_that_only_one_took_part_in_are_left_out() -> None:
    shared = script("shared")
    of, over = row("a", [1.0] * 8), row("b", [3.0] * 6)
    over["samples"] += [[1, 0, 0.0, 1, 100.0]]
    assert shared.speedup(of, over).median == 3
    assert shared.speedup(of, row("c", [])).low is None


def test_the_bar_of_the_bare_call_runs_on_a_cpu_too() -> None:
    kernels = script("gpu_kernels")
    w = kernels.workload(64, 64, "full", "cpu", tokens=64)
    found = kernels.bare(w)
    assert 0.2 < found.measured < 5


@pytest.mark.parametrize("name", ["gpu_kernels", "do_bench", "gpu"])
def test_without_a_gpu_there_is_one_clear_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(script("shared"), "facts", lambda: {"gpu": None})
    done = CliRunner().invoke(script(name).main, [])
    assert done.exit_code != 0
    assert "needs a CUDA device" in done.output + str(done.exception)


# do_bench.py


def test_clocks_take_turns_and_pair() -> None:
    said: list[str] = []
    seconds = {"ours": iter([1.0, 2.0, 4.0, 8.0, 1.0, 1.0]), "theirs": iter([1.01, 2.02, 4.04, 8.08, 1.01, 1.01])}

    def clock(name: str) -> float:
        said.append(name)
        return next(seconds[name])

    made = script("do_bench").compare("naive", 512, lambda: clock("ours"), lambda: clock("theirs"), 6)
    assert said == ["ours", "theirs", "theirs", "ours"] * 3
    assert made["paired_ratio"] == pytest.approx(1.01)
    assert made["agree"]
    assert "met" in script("do_bench").show(made)
    off = script("do_bench").compare("naive", 512, lambda: 1.0, lambda: 1.04, 6)
    assert not off["agree"]
    assert "not run: too large" in script("do_bench").show({"plugin": "naive", "seq": 1, "skipped": "too large"})


# memory.py


def test_memory_by_hand_leaves_out_the_output_and_what_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    memory = script("memory")
    for name in ("empty_cache", "synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    figures = {"memory_allocated": 100, "max_memory_allocated": 100 + 4096 + 2**20}
    figures |= {"memory_reserved": 2**20, "max_memory_reserved": 2**20 + 4096 + 2**21}
    for name, value in figures.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    driver = iter([5 * 2**20, 9 * 2**20 + 4096])
    monkeypatch.setattr(memory, "driver_bytes", lambda: next(driver))
    found = memory.by_hand(memory.touching(2**20), [torch.zeros(1024)])
    assert found == {"allocated_bytes": 2**20, "reserved_bytes": 2**21, "driver_bytes": 4 * 2**20}
    assert memory._cuda_row("x", 1, 2**20, {"measured_bytes": 2**20, **found})["within_1_mib_or_1_percent"]
    assert not memory._cuda_row("x", 1, 2**20, {"measured_bytes": 3 * 2**20, **found})["within_1_mib_or_1_percent"]


# gpu_tiles.py


def test_a_tile_is_chosen_among_those_that_run_and_agree(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    import torch

    def fails() -> Any:
        raise RuntimeError("out of shared memory")

    right, wrong = (lambda x=x: torch.full((2,), x) for x in (1.0, 2.0))
    calls = [("default", lambda: right), ("wrong", lambda: wrong), ("large", fails), ("fast", lambda: right)]
    took = iter([2.0, 1.0])
    assert script("gpu_tiles").best(calls, lambda _: next(took)) == "fast"
    said = capsys.readouterr().out
    assert "WRONG" in said
    assert "out of shared memory" in said
    assert "2.000 x the default" in said
