"""`--isa avx2`: whatever computes does with AVX2, which is on record, and no other run goes on with it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import cpuinfo
import pytest

from attnbench import environment, records
from attnbench.commands.options import USAGE
from attnbench.errors import AttnbenchError
from attnbench.records.ceilings import stored_at
from attnbench.report.repeat import repeat_command
from attnbench.sweep.settings import Asked
from attnbench.workers.ask import ask_machine
from attnbench.workers.server import Forkserver

SMALL = ("--plugins", "sdpa,xformers", "--seq", "64", "--heads", "1", "--scope", "attention", "--threads", "1")
has_avx2 = pytest.mark.skipif("avx2" not in cpuinfo.get_cpu_info().get("flags", ()), reason="this CPU has no AVX2")


def attnbench(*arguments: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "attnbench", *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, timeout=120)


@has_avx2
def test_a_run_is_held_to_avx2_and_gone_on_with_so(tmp_path: Path) -> None:
    done = attnbench("run", *SMALL, "--isa", "avx2", "--budget", 3, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "with all kernels held to AVX2" in done.stderr
    path = records.newest(tmp_path)
    meta, rows = records.read_meta(path), records.rows(path)
    assert meta["machine"]["cpu_capability"] == "AVX2"
    assert meta["machine"]["environment"].items() >= environment.ISAS["avx2"].items()
    assert meta["command"][-6:-4] == ["--isa", "avx2"]
    assert [row["variant"] for row in rows if "emulated" in row["warnings"]] == ["xformers"]
    assert "  emulated, 1 cell: what ran only stands in" in done.stdout
    assert {(row["isa"], row["dtype"]) for row in rows} == {("avx2", "float32")}
    assert {"--isa avx2" in repeat_command(row) for row in rows} == {True}
    assert "--isa" not in repeat_command(rows[0] | {"isa": "auto"})

    refused = attnbench("run", "--resume", path, "--isa", "auto")
    assert (refused.returncode, len(refused.stderr.splitlines())) == (USAGE, 1)
    assert "--resume takes the sweep from the run; drop --isa" in refused.stderr
    (path / "cells.jsonl").write_bytes(b"")
    assert attnbench("run", "--resume", path).returncode == 0
    again = records.rows(path)
    assert {row["isa"] for row in again} == {"avx2"}
    assert [row["implementation"] for row in again] == [row["implementation"] for row in rows]

    begun = dict(meta["machine"]["environment"]) | environment.ISAS["avx2"]
    plain = meta["machine"] | {"environment": {n: v for n, v in begun.items() if n not in environment.ISAS["avx2"]}}
    assert stored_at(meta["machine"], "cpu", 1) != stored_at(plain, "cpu", 1)


def test_another_name_gets_one_line() -> None:
    done = attnbench("calibrate", "--isa", "sse")
    assert (done.returncode, len(done.stderr.splitlines())) == (USAGE, 1)
    assert "'sse' is not one of 'auto', 'avx2', 'avx2_vnni'" in done.stderr
    with pytest.raises(AttnbenchError, match="--isa 'sse' is none of auto, avx2, avx2_vnni"):
        Asked.of(isa="sse")
    assert [Asked.of(**given).isa for given in ({}, {"isa": "avx2"})] == ["auto", "avx2"]


def test_what_the_cpu_lacks_is_said_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment.lacks("avx2", ["avx", "fma"]) == "--isa avx2: this CPU has no AVX2; use --isa auto"
    assert environment.lacks("avx2_vnni", ["avx2"]) == "--isa avx2_vnni: this CPU has no AVX-VNNI; use --isa auto"
    assert (
        environment.lacks("avx2", ["avx2"])
        is environment.lacks("avx2_vnni", ["avx_vnni"])
        is environment.lacks("auto", [])
        is None
    )
    monkeypatch.setitem(environment.ISAS, "avx9", {})
    with Forkserver(1, "avx9") as server, pytest.raises(AttnbenchError, match="this CPU has no AVX9"):
        ask_machine(server)


def test_what_the_user_set_to_something_else_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    with Forkserver(1, "avx2") as server:
        assert server.given["ATEN_CPU_CAPABILITY"] == "avx2"
