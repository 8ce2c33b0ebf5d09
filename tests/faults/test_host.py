"""Whatever happens to the machine, a run on disk stays whole, and `--resume` ends it without losing or doubling a row."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from attnbench import records

from .harness import QUICK, SHAPE, Result, Sweep, run

SEQ = (32, 48, 64, 80, 96, 112)
PLUGINS = ("good", "prints", "call-raises")
ARGUMENTS = ("--plugins", ",".join(PLUGINS), "--seq", ",".join(map(str, SEQ)), *QUICK)

pytestmark = pytest.mark.slow  # each kills, fills or cuts off whole sweeps


def isolated(tmp_path_factory: pytest.TempPathFactory) -> bool:
    """Whether this process may make a mount namespace of its own."""
    place = tmp_path_factory.mktemp("mount")
    command = ("unshare", "-m", "mount", "-t", "tmpfs", "none", str(place))
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


@pytest.fixture(scope="session")
def mounts(tmp_path_factory: pytest.TempPathFactory) -> None:
    if not isolated(tmp_path_factory):
        pytest.skip("needs the right to mount")


def assert_whole(result: Result) -> None:
    """Every planned cell is there once, and nothing of the sweep is left."""
    assert result.path is not None
    cells = [(r["plugin"], r["seq"]) for r in result.rows]
    assert sorted(cells) == sorted((plugin, seq) for plugin in PLUGINS for seq in SEQ)
    assert {r["plugin"]: r["status"] for r in result.rows} == {"good": "ok", "prints": "ok", "call-raises": "error"}
    assert "Traceback" not in result.err
    assert result.survivors == []
    assert json.loads((result.path / "run.json").read_text())["finished"]


def assert_one_line(result: Result, *texts: str) -> None:
    assert len(result.err.splitlines()) == 1, result.err
    assert result.err.startswith("attnbench: ")
    for text in texts:
        assert text in result.err


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A run that went well, to be damaged."""
    result = run(tmp_path_factory.mktemp("finished"), *ARGUMENTS)
    assert_whole(result)
    return result


@pytest.fixture
def damaged(finished: Result, tmp_path: Path) -> Iterator[Path]:
    """A copy of it, under the same name in a folder where `Result.path` finds it."""
    assert finished.path is not None
    copy = tmp_path / "results" / finished.path.name
    copy.mkdir(parents=True)
    for name in ("run.json", "cells.jsonl"):
        (copy / name).write_bytes((finished.path / name).read_bytes())
    yield copy


# A run that was cut off.


def test_a_torn_last_line_is_measured_anew(damaged: Path, tmp_path: Path) -> None:
    cells = damaged / "cells.jsonl"
    lines = cells.read_bytes().splitlines(keepends=True)
    kept = b"".join(lines[:-1])
    cells.write_bytes(kept + lines[-1][:-100])
    result = run(tmp_path, "--resume", str(damaged))
    assert_whole(result)
    assert cells.read_bytes().startswith(kept)
    assert len(cells.read_bytes().splitlines()) == len(SEQ)


def test_a_finished_run_has_nothing_to_resume(damaged: Path, tmp_path: Path) -> None:
    before = (damaged / "cells.jsonl").read_bytes()
    assert_whole(run(tmp_path, "--resume", str(damaged)))
    assert (damaged / "cells.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("file", "old", "new", "says"),
    [
        ("cells.jsonl", b'"samples"', b"samples", "line 1 of"),
        ("cells.jsonl", b'"schema": 1', b'"schema": 99', "has schema 99; this attnbench reads up to 1"),
        ("run.json", b'"schema": 1', b'"schema": 99', "has schema 99; this attnbench reads up to 1"),
        ("run.json", b'"cpu": "', b'"cpu": "another ', "was measured on another machine"),
        ("run.json", b'"sweep"', b'"sweeping"', "does not say what the run was asked for"),
        ("run.json", b"{", b"", "is no JSON"),
    ],
)
def test_what_cant_be_resumed_is_refused_and_left_alone(
    damaged: Path, tmp_path: Path, file: str, old: bytes, new: bytes, says: str
) -> None:
    content = (damaged / file).read_bytes().replace(old, new, 1)
    (damaged / file).write_bytes(content)
    before = {p.name: p.read_bytes() for p in damaged.iterdir()}
    sweep = Sweep(tmp_path, "--resume", str(damaged))
    assert sweep.process.wait(120) == 2
    assert sweep.survivors() == []
    lines = sweep.stderr().splitlines()
    assert len(lines) == 1
    assert says in lines[0]
    assert {p.name: p.read_bytes() for p in damaged.iterdir() if p.name != ".lock"} == before


def test_two_runs_at_once_get_a_folder_each(tmp_path: Path) -> None:
    arguments = ("--plugins", "good", "--seq", "64", *QUICK, "--out", str(tmp_path / "results"))
    sweeps = [Sweep(tmp_path / str(i), *arguments) for i in range(2)]
    results = [sweep.wait() for sweep in sweeps]
    assert [r.code for r in results] == [0, 0]
    folders = sorted(p.parent for p in (tmp_path / "results").glob("*/run.json"))
    assert len(folders) == 2
    assert [len(records.rows(folder)) for folder in folders] == [1, 1]


def test_a_run_that_is_being_written_is_refused(tmp_path: Path) -> None:
    first = Sweep(tmp_path, "--plugins", "hang-python", "--seq", "64", *QUICK, "--timeout", "60")
    try:
        first.wait_for("cells, budget")
        (run_json,) = first.results.glob("*/run.json")
        second = Sweep(tmp_path / "second", "--resume", str(run_json.parent))
        assert second.process.wait(120) == 2
        assert "is being written by another attnbench" in second.stderr()
        assert first.process.poll() is None
    finally:
        first.process.kill()
        assert first.survivors() == []


# kill -9 and Ctrl-C.


def kill_and_resume(folder: Path, kills: int, seed: int) -> int:
    """Kills the parent at random moments until so many kills are done. Returns how many found a row on disk.

    Where none has, the last waits for a row to be reported.
    """
    chance, found = random.Random(seed), 0
    resume: tuple[str, ...] = ()
    while kills:
        sweep = Sweep(folder, *(resume or ARGUMENTS))
        try:
            if chance.random() < 0.7:  # most often where rows are written, else anywhere
                sweep.wait_for("cells, budget")
            if kills == 1 and not found:
                sweep.wait_for("] attention")
            time.sleep(chance.uniform(0, 5))
        finally:
            sweep.process.kill()
        code = sweep.process.wait(60)
        kills -= code == -signal.SIGKILL
        assert sweep.survivors() == [], f"seed {seed}"
        runs = sorted(sweep.results.glob("*/run.json"))
        if code != -signal.SIGKILL or not runs:  # it was quicker, or had not begun: the next is a new run
            assert len(runs) <= 1
            if code != -signal.SIGKILL:
                check_resumed(folder, sweep, b"")
                runs[0].parent.rename(folder / f"done-{kills}-{chance.random()}")
            resume = ()
            continue
        resume = ("--resume", str(runs[0].parent))
        cells = runs[0].parent / "cells.jsonl"
        found += cells.exists()
    if not resume:
        return found
    cells = Path(resume[1]) / "cells.jsonl"
    before = cells.read_bytes() if cells.exists() else b""
    last = Sweep(folder, *resume)
    check_resumed(folder, last, before[: before.rfind(b"\n") + 1])
    return found


def check_resumed(folder: Path, sweep: Sweep, before: bytes) -> None:
    result = sweep.wait()
    assert_whole(result)
    kept = {(row["plugin"], row["seq"]): row for row in result.rows}
    for line in before.splitlines():
        for row in json.loads(line)["cells"]:  # a row with more rounds may stand for it
            after = kept[row["plugin"], row["seq"]]
            assert after == row or after["rounds"] > row["rounds"]


def test_kill_9_loses_no_row_and_leaves_no_process(tmp_path: Path) -> None:
    kill_and_resume(tmp_path, kills=3, seed=0)


@pytest.mark.timeout(3000)
def test_kill_9_at_thirty_random_moments(tmp_path: Path) -> None:
    with ThreadPoolExecutor(5) as pool:  # they sleep most of the time
        found = pool.map(lambda seed: kill_and_resume(tmp_path / str(seed), kills=6, seed=seed), range(1, 6))
    assert all(rows > 0 for rows in found)


def name(process: psutil.Process) -> str:
    """Empty for one that has ended since it was listed."""
    try:
        return process.name()
    except psutil.NoSuchProcess:
        return ""


def test_kill_9_while_a_plugin_hangs_with_a_grandchild(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, "--plugins", "hang-session", "--seq", "64", *QUICK, "--timeout", "100")
    deadline = time.monotonic() + 120
    while not any("sleep" in name(p) for p in sweep.living()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    sweep.process.kill()
    assert sweep.survivors() == []


@pytest.mark.parametrize("gap", [None, 0.001, 0.02, 0.05, 0.1, 0.2])
def test_ctrl_c_says_what_is_there_and_how_to_go_on(tmp_path: Path, gap: float | None) -> None:
    """gap: seconds after which a second one follows."""
    sweep = Sweep(tmp_path, "--plugins", "good,hang-python", "--seq", "64", *QUICK, "--timeout", "100")
    sweep.wait_for("cells, budget")
    time.sleep(0.5)
    sweep.process.send_signal(signal.SIGINT)
    if gap is not None:
        time.sleep(gap)
        sweep.process.send_signal(signal.SIGINT)
    result = sweep.wait(30)
    assert result.code == 130
    assert "Traceback" not in result.err
    assert result.survivors == []
    assert result.path is not None
    if gap is None:
        assert result.out.startswith("0 of 2 cells")
        assert f"go on with: attnbench run --resume {result.path}" in result.err


def test_ctrl_c_keeps_the_rows_so_far(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, "--plugins", "good", "--seq", "32,4096", "--budget", "120", "--precision", "0.01%")
    sweep.wait_for("[1/2]")
    sweep.process.send_signal(signal.SIGINT)
    result = sweep.wait(60)
    assert (result.code, result.statuses()) == (130, {"good": "ok"})
    assert result.out.startswith("1 of 2 cells: 1 ok")
    assert result.path is not None
    resumed = run(tmp_path, "--resume", str(result.path), "--budget", "5")  # as precise as asked for it never is
    assert [r["seq"] for r in resumed.rows] == [32, 4096]
    assert resumed.code == 0


def test_ctrl_c_while_planning(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, "--plugins", "import-hang", "--seq", "64")
    deadline = time.monotonic() + 60
    while len(sweep.living()) < 3:  # itself, the server and the worker that imports
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.3)
    sweep.process.send_signal(signal.SIGINT)
    result = sweep.wait(30)
    assert (result.code, result.survivors, result.path) == (130, [], None)
    assert "Traceback" not in result.err


# Disks.


def test_a_write_that_fails_leaves_the_file_whole(finished: Result, tmp_path: Path) -> None:
    """The limit is this process's own; the workers may still write what they like."""
    assert finished.path is not None
    # In the midst of a line: by the shortest of the six, as one that a restless machine gave more rounds is far longer.
    limit = min(map(len, (finished.path / "cells.jsonl").read_bytes().splitlines())) * 7 // 2
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    sweep = Sweep(
        tmp_path / "full", *ARGUMENTS, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    )
    check_full(sweep.wait(), tmp_path / "full")


def check_full(result: Result, folder: Path) -> None:
    assert result.code not in (0, 130)
    assert "Traceback" not in result.err
    assert result.survivors == []
    last = result.err.splitlines()[-1]
    assert result.path is not None
    assert last.startswith(f"attnbench: can't write {result.path / 'cells.jsonl'}: ")
    assert f"--resume {result.path}" in last
    content = (result.path / "cells.jsonl").read_bytes()
    assert content.endswith(b"\n")
    assert 0 < len(result.rows) < len(SEQ) * len(PLUGINS)
    resumed = run(folder, "--resume", str(result.path))
    assert_whole(resumed)
    assert (result.path / "cells.jsonl").read_bytes().startswith(content)


def test_a_full_disk_is_said_and_survived(mounts: None, tmp_path: Path) -> None:
    script = """
        mkdir results && mount -t tmpfs -o size=28k none results || exit 99  # the first of six lengths, not all
        "$@"; code=$?
        cp -r results kept; exit $code
    """
    wrapper = ("unshare", "-m", "sh", "-c", script, "sh")
    sweep = Sweep(tmp_path, *ARGUMENTS, "--out", "results", wrapper=wrapper)
    code = sweep.process.wait(200)
    assert code not in (0, 99, 130), sweep.stderr()
    assert sweep.survivors() == []
    last = sweep.stderr().splitlines()[-1]
    assert "cells.jsonl: No space left on device" in last
    assert "--resume results/" in last
    (kept,) = (tmp_path / "kept").iterdir()
    assert (kept / "cells.jsonl").read_bytes().endswith(b"\n")
    assert records.rows(kept)
    (tmp_path / "results").rmdir()
    (tmp_path / "kept").rename(tmp_path / "results")
    assert_whole(run(tmp_path, "--resume", f"results/{kept.name}"))


def test_no_folder_can_be_made_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here first")
    result = run(tmp_path, "--plugins", "good", "--seq", "64", "--out", "file")
    assert result.code == 2
    assert_one_line(result, "can't make file", "choose another --out")


def test_a_read_only_results_folder(mounts: None, tmp_path: Path, damaged: Path) -> None:
    script = 'mount --bind results results && mount -o remount,bind,ro results || exit 99; "$@"'
    wrapper = ("unshare", "-m", "sh", "-c", script, "sh")
    new = run(tmp_path, "--plugins", "good", "--seq", "64", wrapper=wrapper)
    assert new.code == 2
    assert_one_line(new, "can't make ", "Read-only file system", "choose another --out")
    resumed = run(tmp_path, "--resume", str(damaged), wrapper=wrapper)
    assert resumed.code == 2
    assert_one_line(resumed, "can't write to ", "Read-only file system")


def test_no_shared_memory_is_needed(mounts: None, tmp_path: Path) -> None:
    script = 'mkdir empty && mount --bind empty /dev/shm && mount -o remount,bind,ro /dev/shm || exit 99; "$@"'
    result = run(
        tmp_path,
        "--plugins",
        "good",
        "--seq",
        "64",
        *QUICK,
        wrapper=("unshare", "-m", "sh", "-c", script, "sh"),
    )
    assert (result.code, result.statuses()) == (0, {"good": "ok"})


def test_no_place_for_temporary_files(tmp_path: Path) -> None:
    code = (
        "import sys, tempfile; tempfile.tempdir = '/nowhere'; "
        "from attnbench.commands import main; sys.argv[0] = 'attnbench'; main()"
    )
    arguments = ("run", *SHAPE, "--baseline", "sdpa", "--seq", "64", "--out", str(tmp_path / "results"))
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=os.environ, timeout=120
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["attnbench: can't make a temporary file: No such file or directory; set TMPDIR"]
