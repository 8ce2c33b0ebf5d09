"""Variables that change the kernels: recorded as the user set them, told, and never compared in silence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from attnbench import environment, records
from attnbench.commands.options import USAGE
from attnbench.records.machines import identity
from attnbench.report.page import write_report
from attnbench.report.prepare import arrange, machine_name, prepared
from attnbench.sweep import doctor
from attnbench.workers.server import environment as worker_environment

RESULTS = Path(__file__).parents[1] / "results"
MACHINE = {"cpu": "Some CPU", "cores": 2, "features": ["avx2", "avx512f", "fma"], "libraries": {"torch": "2.13.0"}}
# The last two are replaced by values of our own, and so are not compared.
SET = {"ATEN_CPU_CAPABILITY": "default", "OMP_PROC_BIND": "true", "OMP_NUM_THREADS": "7", "OMP_WAIT_POLICY": "ACTIVE"}
QUICK = ("--seq", "64", "--scope", "attention", "--threads", "1", "--budget", "300", "--precision", "90%")


def attnbench(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = environment.given(os.environ)
    plain = {name: value for name, value in os.environ.items() if name not in kept}
    call = [sys.executable, "-m", "attnbench", *map(str, arguments)]
    return subprocess.run(call, capture_output=True, text=True, env=plain | variables, timeout=300)


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run with torch held to its plainest kernels, and what was said of it."""
    root = tmp_path_factory.mktemp("held")
    done = attnbench("run", "--plugins", "naive", "--baseline", "naive", *QUICK, "--out", root, **SET)
    assert done.returncode == 0, done.stderr
    return records.newest(root), done.stderr


def test_a_run_keeps_what_the_user_set_and_what_torch_made_of_it(held: tuple[Path, str]) -> None:
    machine = records.read_meta(held[0])["machine"]
    assert machine["environment"] == SET
    assert machine["cpu_capability"] == capability(**SET) != capability()


def test_a_pinned_worker_does_not_count_for_the_machine(held: tuple[Path, str]) -> None:
    assert records.read_meta(held[0])["machine"]["usable_threads"] == len(os.sched_getaffinity(0))


def test_workers_wait_as_attnbench_says_whatever_the_user_set() -> None:
    """OpenMP's own default spins for milliseconds, which would reach into the next worker's burst."""
    own = worker_environment(
        {"OMP_WAIT_POLICY": "ACTIVE", "GOMP_SPINCOUNT": "infinite", "OMP_NUM_THREADS": "9", "A": "b"}, 2
    )
    assert "OMP_WAIT_POLICY" not in own
    assert (own["GOMP_SPINCOUNT"], own["KMP_BLOCKTIME"], own["OMP_NUM_THREADS"], own["A"]) == ("20000", "1", "2", "b")


def capability(**variables: str) -> str:
    code = "import torch; print(torch.backends.cpu.get_cpu_capability())"
    plain = {name: value for name, value in os.environ.items() if name not in environment.given(os.environ)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=plain | variables)
    return done.stdout.strip()


def test_a_run_says_so_before_it_measures_and_its_report_says_so_too(held: tuple[Path, str], tmp_path: Path) -> None:
    words = f"torch held to {capability(**SET)}, OMP_PROC_BIND set"
    assert words in held[1]
    meta = records.read_meta(held[0])
    write_report(records.load(held[0]), [meta], tmp_path)
    page = (tmp_path / "report.md").read_text().replace("\\", "")
    assert words in page
    assert "OMP_NUM_THREADS 7" in page


def test_without_the_variable_it_is_not_gone_on_with(held: tuple[Path, str]) -> None:
    path, _ = held
    before = (path / "cells.jsonl").read_bytes()
    plain = attnbench("run", "--resume", path)
    assert (plain.returncode, len(plain.stderr.splitlines())) == (USAGE, 1)
    assert "torch held to" in plain.stderr
    assert "here nothing set" in plain.stderr
    assert (path / "cells.jsonl").read_bytes() == before
    assert attnbench("run", "--resume", path, **SET | {"OMP_NUM_THREADS": "3"}).returncode == 0


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, ""),
        ({"cpu_capability": "AVX512"}, ""),
        ({"cpu_capability": "AVX512", "environment": {"ATEN_CPU_CAPABILITY": "avx512"}}, ""),
        ({"cpu_capability": "AVX2", "environment": {"ATEN_CPU_CAPABILITY": "avx2"}}, "torch held to AVX2"),
        ({"cpu_capability": "AVX2", "environment": dict(environment.ISAS["avx2"])}, "all kernels held to AVX2"),
        (
            {"cpu_capability": "AVX2", "environment": dict(environment.ISAS["avx2_vnni"])},
            "all kernels held to AVX2 and AVX-VNNI",
        ),
        ({"cpu_capability": "AVX2"}, "torch held to AVX2"),  # by a hypervisor, or a torch that was built without
        ({"cpu_capability": "SVE256", "features": ["sve"]}, ""),
        (
            {"cpu_capability": "DEFAULT", "features": ["sve"], "environment": {"ATEN_CPU_CAPABILITY": "default"}},
            "torch held to DEFAULT",
        ),
        ({"environment": {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "ACTIVE"}}, ""),
        ({"environment": {"OMP_PLACES": "{0}", "LD_PRELOAD": "/a.so"}}, "LD_PRELOAD and OMP_PLACES set"),
        ({"environment": None}, ""),
    ],
)
def test_what_changes_kernels_is_told_and_compared(changes: dict[str, Any], told: str) -> None:
    assert environment.words(MACHINE | changes) == told
    assert machine_name({"machine": MACHINE | changes}) == "Some CPU, 2 cores" + (f", {told}" if told else "")
    assert (identity(MACHINE | changes) == identity(MACHINE)) == (not told)


def test_runs_that_differ_in_a_value_alone_do_not_compare() -> None:
    one, other = ({**MACHINE, "environment": {"ONEDNN_MAX_CPU_ISA": isa}} for isa in ("AVX2", "SSE41"))
    assert identity(one) != identity(other)


def test_rows_under_other_variables_get_a_panel_of_their_own(held: tuple[Path, str]) -> None:
    """Runs that measured different cells complete each other, but not these."""
    meta, frame = records.read_meta(held[0]), records.load(held[0])
    other = frame.assign(run="other", seq=128, kv_seq=128)
    both = prepared(pd.concat([frame, other], ignore_index=True))
    plain = meta["machine"] | {"environment": {}, "cpu_capability": capability()}
    assert len(arrange(both, [meta, meta | {"name": "other"}])) == 1
    assert len(arrange(both, [meta, meta | {"name": "other", "machine": plain}])) == 2


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("MALLOC_ARENA_MAX", True),
        ("TORCHINDUCTOR_FREEZING", True),
        ("TRITON_CACHE_DIR", False),
        ("TORCHINDUCTOR_COMPILE_THREADS", False),
        ("HOME", False),
        ("PYTORCH_NVML_BASED_CUDA_CHECK", False),
    ],
)
def test_what_is_kept_is_what_changes_kernels(name: str, kept: bool) -> None:
    assert environment.given({name: "1"}) == ({name: "1"} if kept else {})
    assert environment.given({name: ""}) == {}


def test_runs_from_before_compare_as_they_did() -> None:
    every = [json.loads(path.read_text()).get("machine", {}) for path in RESULTS.glob("*/run.json")]
    machines = [machine for machine in every if not machine.get("environment")]  # the others are held to AVX2
    assert len(machines) > 10
    for machine in machines:
        assert len(identity(machine)) == 5
        assert environment.words(machine) == ""
        assert identity(machine | {"cpu_capability": "AVX512", "environment": {}}) == identity(machine)


def test_the_doctor_names_them() -> None:
    facts = {"usable_threads": 4, "cores": 2} | MACHINE | {"cpu_capability": "AVX2"}
    looked = {check.name: check for check in doctor.look(facts, 2, seconds=0.05)}
    assert looked["kernels"].found == "CPU capability AVX2; torch held to AVX2"
    assert looked["kernels"].advice
    looked = {check.name: check for check in doctor.look(facts | {"cpu_capability": "AVX512"}, 2, seconds=0.05)}
    assert not looked["kernels"].advice
    meant = facts | {"environment": dict(environment.ISAS["avx2"])}
    for isa, is_meant in (("auto", False), ("avx2", True)):
        looked = {check.name: check for check in doctor.look(meant, 2, 0.05, isa)}
        assert looked["kernels"].found == "CPU capability AVX2; all kernels held to AVX2"
        assert bool(looked["kernels"].advice) is not is_meant
