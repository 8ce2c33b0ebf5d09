"""A run on disk: what is appended comes back, whatever cut the writing off, and nobody else writes meanwhile."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pandas.api.types import is_numeric_dtype

import attnbench
from attnbench import AttnbenchError, Workload, records
from attnbench.commands.options import USAGE
from attnbench.records import schema
from attnbench.records.run import Run
from attnbench.records.schema import COLUMNS, NUMBERS, SCHEMA, Row


def row(seq: int, plugin: str = "sdpa", **values: Any) -> Row:
    workload = Workload(seq=seq, kv_seq=seq)
    samples = [[0, turn, 1.5 * turn, 4, 0.25 + turn] for turn in range(3)]
    return {"plugin": plugin, **workload.as_dict(), "status": "ok", "samples": samples} | values


def new(root: Path, name: str = "run", **meta: Any) -> Run:
    return Run.create(root, name, meta)


def filled(root: Path, workloads: int = 3) -> tuple[Run, list[bytes]]:
    """A run with a line for each workload, and those lines."""
    run = new(root)
    for count in range(workloads):
        run.append([row(16 << count, plugin) for plugin in ("sdpa", "naive")])
    return run, run.cells.read_bytes().splitlines(keepends=True)


def seqs(rows: Sequence[Row]) -> list[int]:
    return [r["seq"] for r in rows]


# -- what is written comes back --


def test_rows_come_back_in_order(tmp_path: Path) -> None:
    run = new(tmp_path)
    assert records.rows(run.path) == []
    for seq in (16, 32):
        run.append([row(seq, "sdpa"), row(seq, "naive")])
    told = [row(seq, plugin, machine="an unnamed machine") for seq in (16, 32) for plugin in ("sdpa", "naive")]
    assert records.rows(run.path) == told
    assert records.key(records.rows(run.path)[0]) == ("sdpa", Workload(seq=16, kv_seq=16))


def test_what_was_asked_comes_back(tmp_path: Path) -> None:
    run = new(tmp_path, args={"seq": [16]}, seconds=float("nan"))
    opened = Run.open(run.path)
    assert opened.meta == {"schema": SCHEMA, "name": run.path.name, "args": {"seq": [16]}, "seconds": None}
    opened.meta["finished"] = "now"
    opened.save()
    assert records.read_meta(run.path)["finished"] == "now"
    assert sorted(p.name for p in run.path.iterdir()) == ["run.json"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_no_number_is_written_that_json_does_not_know(value: float, tmp_path: Path) -> None:
    run = new(tmp_path)
    run.append([row(16, latency_s=value, samples=[[0, 0, value, 1, 1.0]])])
    (line,) = run.cells.read_text().splitlines()
    json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} in the file"))
    assert records.rows(run.path)[0]["latency_s"] is None
    assert np.isnan(records.load(run.path)["latency_s"][0])


# -- writing that was cut off --


def test_a_torn_last_line_is_cut_off_wherever_it_was_torn(tmp_path: Path) -> None:
    run, lines = filled(tmp_path)
    earlier, last = b"".join(lines[:-1]), lines[-1]
    for cut in [*range(0, len(last), 37), len(last) - 1]:
        run.cells.write_bytes(earlier + last[:cut])
        assert seqs(records.rows(run.path)) == [16, 16, 32, 32]
        assert run.cells.read_bytes() == earlier + last[:cut]  # reading changes nothing
        assert seqs(run.repair()) == [16, 16, 32, 32]
        assert run.cells.read_bytes() == earlier
    run.append([row(64, plugin) for plugin in ("sdpa", "naive")])
    assert run.cells.read_bytes() == earlier + last


@pytest.mark.parametrize(
    "line", [b"", b"garbage", b"\xff\xfe", b"[]", b"null", b"{}", b'{"schema": 1}', b'{"schema": 1, "cells": 3}']
)
def test_a_broken_line_in_the_middle_is_named_and_nothing_is_changed(line: bytes, tmp_path: Path) -> None:
    run, lines = filled(tmp_path)
    broken = lines[0] + line + b"\n" + lines[2] + b'{"torn'
    run.cells.write_bytes(broken)
    for read in (lambda: records.rows(run.path), lambda: records.load(run.path), run.repair):
        with pytest.raises(AttnbenchError, match=r"cells\.jsonl") as caught:
            read()
        assert "\n" not in str(caught.value)
        assert line == b"{}" or "line 2" in str(caught.value)
    assert run.cells.read_bytes() == broken


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    run, lines = filled(tmp_path)
    newer = json.dumps({"schema": SCHEMA + 1, "cells": []}).encode() + b"\n"
    run.cells.write_bytes(lines[0] + newer)
    with pytest.raises(AttnbenchError, match="newer"):
        run.repair()
    assert run.cells.read_bytes() == lines[0] + newer
    (run.path / "run.json").write_text(json.dumps({"schema": SCHEMA + 1}))
    for read in (Run.open, records.rows, records.load):
        with pytest.raises(AttnbenchError, match="newer"):
            read(run.path)


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"3", b"\xff", b"{}", b'{"schema": "1"}'])
def test_what_is_no_run_is_refused(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "run.json").write_bytes(content)
    for read in (Run.open, records.rows, records.load):
        with pytest.raises(AttnbenchError, match=re.escape(str(tmp_path))):
            read(tmp_path)


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from attnbench import AttnbenchError
from attnbench.records import Run

run, more = Run.open(Path(sys.argv[1])), int(sys.argv[2])
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)

def attempt(what):
    try:
        what()
    except AttnbenchError as error:
        print(error)

def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))

limit(run.cells.stat().st_size + more)
attempt(lambda: run.append([{"plugin": "sdpa", "seq": 128, "reason": "x" * 5000}]))
run.meta["finished"] = "x" * 5000
limit(more)
attempt(run.save)
limit(most)
"""


@pytest.mark.parametrize("more", [0, 1, 100])
def test_a_full_disk_leaves_whole_files(more: int, tmp_path: Path) -> None:
    run, lines = filled(tmp_path)
    meta = (run.path / "run.json").read_bytes()
    command = [sys.executable, "-c", FULL_DISK, str(run.path), str(more)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    appended, saved = done.stdout.splitlines()
    assert f"can't write {run.cells}" in appended
    assert f"--resume {run.path}" in appended
    assert f"can't write {run.path / 'run.json'}" in saved
    assert run.cells.read_bytes() == b"".join(lines)
    assert (run.path / "run.json").read_bytes() == meta
    run.append([row(128)])
    assert seqs(Run.open(run.path).repair()) == [16, 16, 32, 32, 64, 64, 128]


# -- one writer --

HOLD = """
import sys
from pathlib import Path
from attnbench.records import Run
with Run.open(Path(sys.argv[1])) as run:
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("end", ["orderly", "killed"])
def test_a_run_is_written_by_one_process_at_a_time(end: str, tmp_path: Path) -> None:
    run = new(tmp_path)
    command = [sys.executable, "-c", HOLD, str(run.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(AttnbenchError, match="another attnbench"), Run.open(run.path):
            pytest.fail("two processes hold one run")
        assert records.rows(run.path) == []  # reading needs no lock
        if end == "killed":
            os.kill(other.pid, signal.SIGKILL)
        other.communicate(timeout=30)
    with Run.open(run.path) as mine:
        mine.append([row(16)])
    assert seqs(records.rows(run.path)) == [16]


def test_runs_made_at_once_get_folders_of_their_own(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        paths = {run.path for run in pool.map(lambda _: new(tmp_path), range(16))}
    assert len(paths) == 16
    assert all(records.read_meta(path)["name"] == path.name for path in paths)


# -- folders --


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("cpu", "cpu"),
        ("../x", "x"),
        ("/etc/passwd", "etc-passwd"),
        ("..", "run"),
        ("", "run"),
        ("-x", "x"),
        (".hidden", "hidden"),
        ("a b\n|<script>", "a-b-script"),
        ("über\0", "ber"),
    ],
)
def test_a_name_never_leaves_the_folder(name: str, stem: str, tmp_path: Path) -> None:
    root = tmp_path / "results"
    paths = [new(root, name).path for _ in range(3)]
    assert [re.sub(r"^\d{4}-\d\d-\d\d-", "", path.name) for path in paths] == [stem, f"{stem}-2", f"{stem}-3"]
    assert {path.resolve().parent for path in paths} == {root.resolve()}
    assert list(tmp_path.iterdir()) == [root]


@pytest.mark.parametrize(("root", "name"), [("file", "x"), ("file/deeper", "x"), (".", "x" * 300)])
def test_a_folder_that_cannot_be_made_is_one_line(root: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(AttnbenchError, match="can't make") as caught:
        new(tmp_path / root, name)
    assert "\n" not in str(caught.value)


def test_the_newest_run_is_the_one_started_last(tmp_path: Path) -> None:
    with pytest.raises(AttnbenchError, match="attnbench run"):
        records.newest(tmp_path)
    late = new(tmp_path, "late", started="2026-02-01T10:00:00+00:00")
    early = new(tmp_path, "z-early", started="2026-01-31T23:59:59+00:00")
    early.save()  # written last, started first
    new(tmp_path, "zz-not-begun")
    broken = new(tmp_path, "zzz-broken", started="2027-01-01T00:00:00+00:00")
    (broken.path / "run.json").write_text('{"torn')
    newer = new(tmp_path, "zzz-newer", started="2027-01-01T00:00:00+00:00", schema=SCHEMA + 1)
    assert newer.path.exists()
    assert records.newest(tmp_path) == late.path


# -- tables --

MIXED: dict[str, list[Row]] = {
    "all well": [row(16, latency_s=0.5, peak_bytes=1 << 40, rounds=3, converged=True, warnings=["few-rounds"])],
    "none well": [row(16, status="error", reason="at import", traceback="...", samples=[], converged=None)],
    "both": [
        row(16, latency_s=0.5, peak_bytes=1 << 40, rounds=3, converged=True, warnings=[]),
        {"plugin": "gone", **Workload(seq=16, kv_seq=16).as_dict(), "status": "crashed"},
    ],
}


@pytest.mark.parametrize("case", MIXED)
def test_the_columns_of_a_table_have_one_kind_each(case: str, tmp_path: Path) -> None:
    run = new(tmp_path)
    run.append(MIXED[case])
    frame = attnbench.load(run.path)
    assert list(frame.columns) == ["run", *COLUMNS]
    assert set(frame["run"]) == {run.path.name}
    sizes = [name for name, value in Workload(seq=1, kv_seq=1).as_dict().items() if isinstance(value, int)]
    for column in [*NUMBERS, *sizes]:
        assert is_numeric_dtype(frame[column]), column
    assert frame["converged"].dtype == bool
    for kept, written in zip(frame.to_dict("records"), MIXED[case], strict=True):
        for column, value in written.items():
            if column in COLUMNS and value is not None:
                assert kept[column] == value, column
        for column in ("implementation", "reason", "traceback", "baseline", "block", "norm"):
            assert kept[column] == written.get(column, "")
        assert kept["warnings"] == written.get("warnings", [])
        assert kept["converged"] is bool(written.get("converged"))
        assert np.isnan(kept["speedup"])


@pytest.mark.parametrize("one", [True, False])
def test_runs_are_joined_in_the_order_given(one: bool, tmp_path: Path) -> None:
    runs = [new(tmp_path, name) for name in "ba"]
    for seq, run in enumerate(runs, 1):
        run.append([row(seq)])
    frame = records.load(str(runs[0].path) if one else (str(r.path) for r in runs))
    assert frame["seq"].tolist() == ([1] if one else [1, 2])
    assert frame["run"].tolist() == [r.path.name for r in runs[: 1 if one else 2]]


def test_an_empty_run_is_an_empty_table(tmp_path: Path) -> None:
    run = new(tmp_path)
    assert list(records.load(run.path).columns) == ["run", *COLUMNS]
    assert records.load(run.path).empty
    assert records.load([]).empty


# -- a real run, cut off and resumed --


def command(*arguments: object) -> "subprocess.CompletedProcess[str]":
    call = [sys.executable, "-m", "attnbench", "run", *map(str, arguments)]
    return subprocess.run(call, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three workloads in one run, some of them and the plugin asked for twice; the baseline once more."""
    root = tmp_path_factory.mktemp("records")
    sizes = ("--seq", "16,32,16,64", "--heads", "2,2", "--scope", "attention", "--threads", 1)
    quick = ("--budget", 300, "--precision", "90%")  # every interval is that narrow: each cell stops at its first look
    done = command("--plugins", "naive,na?ve,naive", "--baseline", "naive", *sizes, *quick, "--out", root)
    assert done.returncode == 0, done.stderr
    return records.newest(root)


def test_no_two_rows_share_a_key(measured: Path) -> None:
    keys = [records.key(r) for r in records.rows(measured)]
    assert [(plugin, w.seq) for plugin, w in keys] == [("naive", 16), ("naive", 32), ("naive", 64)]
    assert len(set(keys)) == len(keys)


def test_a_run_that_was_cut_off_goes_on(measured: Path) -> None:
    cells = measured / "cells.jsonl"
    lines = cells.read_bytes().splitlines(keepends=True)
    before = [records.key(r) for r in records.rows(measured)]
    cells.write_bytes(lines[0] + lines[1][: len(lines[1]) // 2])  # as kill -9 may leave it
    done = command("--resume", measured)
    assert done.returncode == 0, done.stderr
    assert cells.read_bytes().startswith(lines[0])
    assert [records.key(r) for r in records.rows(measured)] == before
    again = cells.read_bytes()
    assert command("--resume", measured).returncode == 0  # nothing is left to do
    assert cells.read_bytes() == again


def test_on_another_machine_it_does_not(measured: Path) -> None:
    run = Run.open(measured)
    cells = run.cells.read_bytes()
    run.meta["machine"]["cpu"] = "another"
    run.save()
    done = command("--resume", measured)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (USAGE, "", 1)
    assert "another machine" in done.stderr
    assert run.cells.read_bytes() == cells


def test_the_page_of_columns_is_the_schema() -> None:
    """To add a column is to add its line to the schema; this says what to put into the page."""
    page = (Path(__file__).parents[1] / "docs/columns.md").read_text()
    assert page.endswith("\n\n" + schema.table())


def test_columns_are_what_their_kinds_and_names_say() -> None:
    for column in schema.SCHEMA_COLUMNS:
        ends = {"s": "_s", "bytes": "_bytes", "Hz": "_hz", "W": "_w", "J": "_j", "degrees C": "_c"}
        if column.unit in ends and column.kind != "text":
            assert column.name.endswith(ends[column.unit]), column
        assert column.means, column
    assert set(schema.WORKLOAD) == {field.name for field in dataclasses.fields(Workload)}
