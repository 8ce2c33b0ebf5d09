"""Exports of a real run, read by the tools that they are for, and their figures against the run's own samples."""

import io
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pandas as pd
import pyarrow.parquet
import pytest
from pytest_benchmark.stats import Stats

from attnbench import commands, records
from attnbench.commands import options
from attnbench.records import exports
from attnbench.records.schema import SCHEMA, WELL, Row

FAULTY = """
import torch.nn.functional as F
from attnbench import Plugin

class Short(Plugin):
    def build(self, workload):
        return lambda q, k, v: F.scaled_dot_product_attention(q, k[:, :, :-1], v[:, :, :-1])
"""
QUICK = ("--budget", 300, "--precision", "90%")  # every interval is that narrow: each cell stops at its first look
PYTEST_BENCHMARK = str(Path(sys.executable).with_name("pytest-benchmark"))


def attnbench(*arguments: object, path: Path | None = None) -> "subprocess.CompletedProcess[str]":
    """The command line as a person calls it; `path` holds a further distribution."""
    extra = {"PYTHONPATH": str(path)} if path else {}
    return subprocess.run(
        [sys.executable, "-m", "attnbench", *map(str, arguments)],
        env=os.environ | extra,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two workloads: naive is well in both, a third party's plugin wrong."""
    root = tmp_path_factory.mktemp("export")
    (root / "faulty.py").write_text(FAULTY)
    info = root / "faulty-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: faulty\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[attnbench.plugins]\nshort = faulty:Short\n")
    sizes = (
        "--seq",
        "16,32",
        "--heads",
        2,
        "--scope",
        "attention",
        "--threads",
        1,
        "--mask",
        "full",
        "--dtype",
        "float32",
    )
    done = attnbench(
        "run", "--plugins", "naive,short", "--baseline", "naive", *sizes, *QUICK, "--out", root / "results", path=root
    )
    assert done.returncode == options.CELL_FAILED, done.stderr
    return records.newest(root / "results")


@pytest.fixture(scope="module")
def ok_rows(measured: Path) -> list[Row]:
    rows = records.rows(measured)
    assert sorted((row["variant"], row["status"]) for row in rows) == [("naive", "ok")] * 2 + [("short", "wrong")] * 2
    return [row for row in rows if row["status"] == "ok"]


def exported(run: Path, kind: str, tmp_path: Path, *, left_out: int = 0) -> Path:
    out = tmp_path / f"exported.{kind}"
    done = attnbench("export", run, "--format", kind, "--out", out)
    said = f"left out: {left_out} rows without a value\n" if left_out else ""
    assert (done.returncode, done.stdout, done.stderr) == (0, "", said)
    return out


def test_the_command_offers_every_format() -> None:
    (kind,) = (p.type for p in commands.find("export").params if p.name == "kind")
    assert isinstance(kind, click.Choice)
    assert set(kind.choices) == set(exports.FORMATS)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_table_is_the_frame_that_load_gives(kind: str, measured: Path, tmp_path: Path) -> None:
    file = exported(measured, kind, tmp_path)
    frame = records.load(measured)
    if kind == "csv":
        read = pd.read_csv(file, keep_default_na=False, na_values={str(c): [""] for c in frame.select_dtypes("number")})
        read["warnings"] = read["warnings"].str.split()
    else:
        read = pd.read_parquet(file)
        read["warnings"] = read["warnings"].map(list)
    pd.testing.assert_frame_equal(read, frame, check_dtype=False)


@pytest.mark.parametrize("column", ["rounds", "processes", "flops", "peak_bytes", "predicted_workspace_bytes"])
def test_counts_are_whole_numbers_though_some_rows_have_none(column: str, measured: Path, tmp_path: Path) -> None:
    text = pd.read_csv(exported(measured, "csv", tmp_path), dtype=str, keep_default_na=False)[column]
    assert all(value.isdigit() or not value for value in text)
    schema = pyarrow.parquet.read_schema(exported(measured, "parquet", tmp_path))
    assert pyarrow.types.is_integer(schema.field(column).type)


@pytest.mark.parametrize("kind", [kind for kind, form in exports.FORMATS.items() if form.text])
def test_text_goes_to_stdout_unless_a_file_is_named(kind: str, measured: Path, tmp_path: Path) -> None:
    left_out = 0 if exports.FORMATS[kind].failed else 2
    printed = attnbench("export", measured, "--format", kind).stdout
    assert printed == exported(measured, kind, tmp_path, left_out=left_out).read_text()


def test_several_runs_make_one_table(measured: Path, tmp_path: Path) -> None:
    other = tmp_path / "another"
    shutil.copytree(measured, other)
    frame = pd.read_csv(io.StringIO(attnbench("export", measured, other).stdout))
    assert frame["run"].value_counts().to_dict() == {measured.name: 4, "another": 4}


def test_pytest_benchmark_compares_an_exported_run(measured: Path, ok_rows: list[Row], tmp_path: Path) -> None:
    file = exported(measured, "pytest-benchmark", tmp_path, left_out=2)
    table = tmp_path / "compared.csv"
    command = [PYTEST_BENCHMARK, "compare", str(file), "--columns=median,min,rounds,iterations", f"--csv={table}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Failed to load" not in done.stderr
    assert done.stdout.count(": 1 tests") == 2
    read = pd.read_csv(table)
    read = read.sort_values("param:seq", ignore_index=True)
    expected = sorted(ok_rows, key=lambda row: int(row["seq"]))
    assert read["param:plugin"].tolist() == [row["plugin"] for row in expected]
    seconds = [[s[4] / s[3] for s in row["samples"]] for row in expected]
    assert read["median"].tolist() == pytest.approx(list(map(statistics.median, seconds)))
    assert read["min"].tolist() == pytest.approx(list(map(min, seconds)))
    assert read["rounds"].tolist() == [row["rounds"] for row in expected]
    assert all(n in {s[3] for s in row["samples"]} for n, row in zip(read["iterations"], expected, strict=True))


def test_pytest_benchmark_compares_a_run_with_itself(measured: Path, tmp_path: Path) -> None:
    file = exported(measured, "pytest-benchmark", tmp_path, left_out=2)
    again = tmp_path / "again.json"
    shutil.copy(file, again)
    command = [PYTEST_BENCHMARK, "compare", str(file), str(again), "--between=median"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("1 tests, 2 sources") == 2
    assert done.stdout.count("+0.0%") == 2


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 7, 20, 101])
@pytest.mark.parametrize("spread", ["none", "normal", "heavy"])
def test_statistics_are_those_of_pytest_benchmark(count: int, spread: str) -> None:
    draw = random.Random(count)
    noise = {"none": lambda: 0.0, "normal": lambda: draw.gauss(0, 0.01), "heavy": lambda: draw.paretovariate(1)}
    bursts = [(4, 4 * (1.0 + noise[spread]())) for _ in range(count)]
    theirs = Stats()  # type: ignore[no-untyped-call]
    for calls, seconds in bursts:
        theirs.update(seconds / calls)  # type: ignore[no-untyped-call]
    ours = exports._stats(bursts)
    for name, value in theirs.as_dict().items():  # type: ignore[no-untyped-call]
        assert ours[name] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-12, abs=1e-15)), name
    assert (ours["data"], ours["iterations"]) == (theirs.data, 4)


def test_github_action_entries(measured: Path, ok_rows: list[Row], tmp_path: Path) -> None:
    entries = json.loads(exported(measured, "github-action", tmp_path, left_out=2).read_bytes())
    for entry in entries:  # as that action declares its input: all text but the value
        assert {"name", "unit", "value"} <= set(entry) <= {"name", "unit", "value", "range", "extra"}
        assert isinstance(entry.pop("value"), float)
        assert all(isinstance(text, str) for text in entry.values())
    entries = {e["name"]: e for e in json.loads(attnbench("export", measured, "--format", "github-action").stdout)}
    assert len(entries) == 2 * len(ok_rows)
    for row in ok_rows:
        name = f"{row['plugin']} attention 1x2x{row['seq']}x64 float32 full cpu threads=1"
        latency, peak = entries[f"{name}: latency"], entries[f"{name}: peak memory"]
        assert (latency["unit"], latency["value"]) == ("ms", pytest.approx(1e3 * row["latency_s"], rel=1e-5))
        assert (peak["unit"], peak["value"]) == ("MiB", pytest.approx(row["peak_bytes"] / 2**20, rel=1e-5))
        assert latency["extra"].startswith(row["implementation"])


def written(path: Path, rows: list[Row], meta: dict[str, Any]) -> Path:
    """A run on disk that holds `rows`."""
    path.mkdir()
    run = records.Run(path, {"schema": SCHEMA, **meta})
    run.save()
    run.append(rows)
    return path


def changed(row: Row, **values: Any) -> Row:
    return row | values


@pytest.mark.parametrize(
    ("low", "high", "shown"),
    [(0.00098, 0.00102, "± 0.02"), (0.5, 1.5, "± 5e+02"), (0.001, 0.001, "± 0"), (None, None, None)],
)
def test_the_range_is_half_the_interval_in_ms(
    low: float | None, high: float | None, shown: str | None, ok_rows: list[Row], tmp_path: Path
) -> None:
    row = changed(ok_rows[0], latency_low_s=low, latency_high_s=high)
    entries = json.loads(exports.github_action([written(tmp_path / "one", [row], {})]))
    assert [entry.get("range") for entry in entries] == [shown, None]


def test_what_a_row_does_not_know_is_left_out(ok_rows: list[Row], tmp_path: Path) -> None:
    row = changed(ok_rows[0], speedup=None, peak_bytes=None)
    (entry,) = json.loads(exports.github_action([written(tmp_path / "one", [row], {})]))
    assert entry["extra"] == f"{row['implementation']}, {row['rounds']} rounds"


OTHER: dict[str, dict[str, Any]] = {
    "device": {"device": "cuda"},
    "threads": {"threads": 2},
    "inputs": {"inputs": "outlier"},
    "mask": {"mask": "causal"},
    "dtype": {"dtype": "bfloat16"},
    "value dim": {"value_dim": 32},
    "kv heads": {"kv_heads": 1},
    "key length": {"kv_seq": 64},
    "option": {"plugin": "naive:option=1"},
    "block": {"scope": "block", "block": "decoder", "norm": "pre"},
}


@pytest.mark.parametrize("values", OTHER.values(), ids=OTHER)
@pytest.mark.parametrize("kind", ["pytest-benchmark", "github-action"])
def test_other_workloads_have_other_names(
    kind: str, values: dict[str, Any], measured: Path, ok_rows: list[Row], tmp_path: Path
) -> None:
    rows = [ok_rows[0], changed(ok_rows[0], **values)]
    if "norm" in values:
        rows.append(changed(rows[1], norm="post"))
    content: Any = json.loads(
        exports.FORMATS[kind].write([written(tmp_path / "two", rows, records.read_meta(measured))])
    )
    entries = content["benchmarks"] if kind == "pytest-benchmark" else content
    names = [entry.get("fullname", entry["name"]) for entry in entries]
    assert len(set(names)) == len(names) == len(rows) * (1 if kind == "pytest-benchmark" else 2)


REFUSED: dict[str, tuple[str, Row, dict[str, Any], str]] = {
    "one name twice": ("pytest-benchmark", {"seed": 1}, {}, "two rows are naive"),
    "one name twice, for github": ("github-action", {"seed": 1}, {}, "two rows are naive"),
    "two machines": ("pytest-benchmark", {"threads": 9}, {"cpu": "another"}, "of several"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_format_cannot_hold_is_refused(case: str, measured: Path, ok_rows: list[Row], tmp_path: Path) -> None:
    kind, values, machine, message = REFUSED[case]
    meta = records.read_meta(measured)
    meta["machine"] |= machine
    other = written(tmp_path / "other", [changed(ok_rows[0], **values)], meta)
    done = attnbench("export", measured, other, "--format", kind)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (options.USAGE, "", 1)
    assert message in done.stderr


USAGE = {
    "no such run": (["{tmp}/nowhere"], "is no run"),
    "parquet to a terminal": (["{run}", "--format", "parquet"], "name a file with --out"),
    "a folder that is not there": (["{run}", "--out", "{tmp}/no/x.csv"], "choose another --out"),
    "a file that is a folder": (["{run}", "--out", "{tmp}"], "choose another --out"),
}


@pytest.mark.parametrize("case", USAGE)
def test_what_cannot_be_done_is_one_line_and_exit_code_2(case: str, measured: Path, tmp_path: Path) -> None:
    arguments, message = USAGE[case]
    done = attnbench("export", *(a.format(run=measured, tmp=tmp_path) for a in arguments))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (options.USAGE, "", 1)
    assert message in done.stderr


def test_names_are_data(measured: Path, ok_rows: list[Row], tmp_path: Path) -> None:
    name = 'a|b,"<script>\n[../x]'
    run = written(tmp_path / "odd", [changed(ok_rows[0], plugin=name)], records.read_meta(measured))
    assert pd.read_csv(io.BytesIO(exports.csv([run])))["plugin"].tolist() == [name]
    file = tmp_path / "odd.json"
    file.write_bytes(exports.pytest_benchmark([run]))
    done = subprocess.run([PYTEST_BENCHMARK, "compare", str(file)], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, "Failed to load" in done.stderr) == (0, False)
    assert "a|b" in done.stdout


def test_a_run_whose_rows_all_failed(measured: Path, ok_rows: list[Row], tmp_path: Path) -> None:
    bad = [row for row in records.rows(measured) if row["status"] not in WELL]
    run = written(tmp_path / "bad", bad, records.read_meta(measured))
    assert json.loads(exports.github_action([run])) == []
    assert json.loads(exports.pytest_benchmark([run]))["benchmarks"] == []
    assert len(pd.read_csv(io.BytesIO(exports.csv([run])))) == len(bad)
    good = written(tmp_path / "good", ok_rows, records.read_meta(measured))
    types = [pyarrow.parquet.read_schema(io.BytesIO(exports.parquet([r]))).remove_metadata() for r in (run, good)]
    assert types[0] == types[1]  # so that the files can be read as one data set
