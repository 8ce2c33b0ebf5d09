"""Threads that are asked for and can't run at the same time: tried in real processes, with the variables set."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from attnbench import environment, records
from attnbench.commands.options import warn_of_pinning
from attnbench.devices.machine import usable_cores
from attnbench.devices.threads import at_once
from attnbench.sweep import doctor

pytestmark = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or usable_cores() < 2, reason="needs Linux and two cores"
)
FIRST = min(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
ONE_PLACE = {"OMP_PROC_BIND": "true", "OMP_PLACES": f"{{{FIRST}}}"}
QUICK = ("--seq", "64", "--scope", "attention", "--threads", "2", "--budget", "300", "--precision", "90%")


def python(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = environment.given(os.environ)
    plain = {name: value for name, value in os.environ.items() if name not in kept}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=plain | variables, timeout=300
    )


def counted(threads: int, before: str = "pass", **variables: str) -> int:
    code = f"import os; {before}; from attnbench.devices.threads import at_once; print(at_once({threads}))"
    done = python("-c", code, **variables)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.parametrize(
    ("variables", "running"),
    [
        ({}, 2),
        ({"OMP_PROC_BIND": "true"}, 2),
        ({"OMP_THREAD_LIMIT": "1"}, 1),
        ({"GOMP_CPU_AFFINITY": str(FIRST)}, 1),
        (ONE_PLACE, 1),
        ({"OMP_PLACES": f"{{{FIRST}}},{{{FIRST}}}"}, 1),
    ],
)
def test_variables_are_seen_by_what_they_do(variables: dict[str, str], running: int) -> None:
    assert counted(2, **variables) == running


def test_one_core_for_the_whole_process_is_seen_too() -> None:
    assert counted(2, f"os.sched_setaffinity(0, {{{FIRST}}})") == 1


def test_a_single_thread_runs() -> None:
    assert counted(1) == counted(1, OMP_THREAD_LIMIT="1") == 1


def test_of_more_threads_than_cores_the_cores_run() -> None:
    assert counted(usable_cores() + 3) == usable_cores()
    assert counted(usable_cores() + 3, OMP_THREAD_LIMIT="2") == 2


def test_where_linux_is_not_nothing_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert at_once(2, tasks=tmp_path / "none") is None
    warn_of_pinning(2, {"threads_at_once": None})
    assert capsys.readouterr().err == ""


def test_it_is_said_before_measuring_and_stands_on_the_row(tmp_path: Path) -> None:
    command = ("-m", "attnbench", "run", "--plugins", "naive", "--baseline", "naive", *QUICK, "--out", str(tmp_path))
    done = python(*command, **ONE_PLACE)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    (said,) = (line for line in lines if line.startswith("warning:"))
    assert said.endswith(
        "only 1 of 2 threads can run at a time; unset OMP_PLACES and OMP_PROC_BIND, or ask for --threads 1"
    )
    assert lines.index(said) < next(i for i, line in enumerate(lines) if "fastest" in line)
    run = records.newest(tmp_path)
    assert json.loads((run / "run.json").read_text())["machine"]["threads_at_once"] == 1
    (row,) = records.rows(run)
    assert (row["threads"], "fewer-threads" in row["warnings"]) == (2, True)
    assert "fewer-threads, 1 cell" in done.stdout


def test_where_all_run_nothing_is_said(tmp_path: Path) -> None:
    command = ("-m", "attnbench", "run", "--plugins", "naive", "--baseline", "naive", *QUICK, "--out", str(tmp_path))
    done = python(*command, OMP_PROC_BIND="true")
    assert done.returncode == 0, done.stderr
    assert "warning:" not in done.stderr
    (row,) = records.rows(records.newest(tmp_path))
    assert "fewer-threads" not in row["warnings"]


def test_a_dry_run_says_it_too(tmp_path: Path) -> None:
    done = python("-m", "attnbench", "run", "--plugins", "naive", *QUICK, "--dry-run", OMP_THREAD_LIMIT="1")
    assert done.returncode == 0, done.stderr
    assert "only 1 of 2 threads can run at a time; unset OMP_THREAD_LIMIT" in done.stderr


def test_threads_without_cores_are_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    """`warn_of_threads` has said it, as the whole process may use no more."""
    warn_of_pinning(usable_cores() + 1, {"threads_at_once": usable_cores()})
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("running", "advice"), [(1, "unset OMP_PLACES, or use --threads 1"), (2, ""), (None, "")])
def test_the_doctor_says_what_to_unset(running: int | None, advice: str) -> None:
    facts = {"usable_threads": 4, "cores": 2, "threads_at_once": running, "environment": {"OMP_PLACES": "{0}"}}
    looked = {check.name: check for check in doctor.look(facts, 2, seconds=0.05)}
    assert looked["threads"].advice == advice


_SETTLED = """
import os
from attnbench.devices.threads import Team
cores = os.sched_getaffinity(0)
team = Team({threads})
own = [team.others, [os.sched_getaffinity(thread) == cores for thread in team.others]]
team.settle()
print(own, [os.sched_getaffinity(thread) for thread in team.others], os.sched_getaffinity(0) == cores)
"""


@pytest.mark.skipif(usable_cores() != 2, reason="where a team of two takes all cores")
def test_a_team_that_takes_all_cores_is_settled_on_those_where_its_leader_is_not() -> None:
    done = python("-c", _SETTLED.format(threads=2))
    assert done.returncode == 0, done.stderr
    assert "[True]]" in done.stdout  # it could run anywhere
    first, second = sorted(os.sched_getaffinity(0))
    assert done.stdout.strip().endswith((f"[{{{first}}}] True", f"[{{{second}}}] True"))


def test_a_smaller_team_stays_where_it_is() -> None:
    done = python("-c", _SETTLED.format(threads=1))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[[], []] [] True"
