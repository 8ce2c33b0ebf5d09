"""Results that were copied, edited or written by other tools: one line says what is wrong, and no NaN gets anywhere."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.console import Console

from attnbench import AttnbenchError, Workload, records
from attnbench.commands.watch import Watch
from attnbench.records import exports, strict
from attnbench.records.run import Run, labelled, read_metas
from attnbench.records.schema import NUMBERS, SCHEMA_COLUMNS, Row
from attnbench.report.page import write_report
from attnbench.report.prepare import arrange, prepared
from attnbench.report.style import Style
from attnbench.report.tables.run import side_by_side
from attnbench.sweep.engine import resumed
from attnbench.sweep.settings import Asked
from attnbench.theory.roofline import Ceilings

PLUGINS = ("sdpa", "naive")
NO_NUMBERS = ("NaN", "Infinity", "-Infinity", "1e999", '"fast"', "true", "[1]", "{}", "1" + "0" * 400)


def row(plugin: str, seq: int = 64, **values: Any) -> Row:
    figures = {"latency_s": 0.5, "latency_low_s": 0.4, "latency_high_s": 0.6, "speedup": 1.0, "rounds": 3}
    about = {"variant": plugin, "family": "exact", "baseline": "sdpa", "peak_bytes": 4096, "converged": True}
    samples = [[0, turn, 0.0, 2, 1.0 + turn / 10] for turn in range(3)]
    cell = {"plugin": plugin, **Workload(seq=seq, kv_seq=seq).as_dict(), "status": "ok", "samples": samples}
    return cell | figures | about | values


def written(root: Path, *lines: list[Row], name: str = "run", **meta: Any) -> Path:
    run = Run.create(root, name, meta)
    for line in lines:
        run.append(line)
    return run.path


def edited(path: Path, column: str, value: str, line: int = 1) -> Path:
    """Puts a JSON text where the second row of a line has its value."""
    cells = path / "cells.jsonl"
    lines = cells.read_text().splitlines()
    content = json.loads(lines[line])
    content["cells"][1][column] = "PLACE"
    lines[line] = json.dumps(content).replace('"PLACE"', value)
    cells.write_text("\n".join(lines) + "\n")
    return path


def two_lines(root: Path) -> Path:
    return written(root, *([row(plugin, seq) for plugin in PLUGINS] for seq in (64, 128)))


# What is not a number, in a row.


@pytest.mark.parametrize("value", NO_NUMBERS)
def test_what_is_no_number_is_named_by_line_and_column(value: str, tmp_path: Path) -> None:
    path = edited(two_lines(tmp_path), "latency_s", value)
    before = (path / "cells.jsonl").read_bytes()
    for read in (records.rows, records.load, lambda p: Run.open(p).repair()):
        with pytest.raises(AttnbenchError, match=re.escape(str(path / "cells.jsonl"))) as caught:
            read(path)
        assert all(text in str(caught.value) for text in ("line 2 ", "latency_s of naive", "put null there"))
        assert len(str(caught.value)) < len(str(path)) + 200
    assert (path / "cells.jsonl").read_bytes() == before
    assert len(records.load(edited(path, "latency_s", "null"))) == 4


@pytest.mark.parametrize("column", SCHEMA_COLUMNS, ids=lambda column: column.name)
def test_no_column_takes_what_is_not_of_its_kind(column: Any, tmp_path: Path) -> None:
    path, needed = two_lines(tmp_path), column.kind in ("name", "size")
    for value in ("NaN", "Infinity", "{}", "[3]", *(["null"] if needed else [])):
        edited(path, column.name, value)
        with pytest.raises(AttnbenchError, match=f"{column.name} of .* is ") as caught:
            records.load(path)
        assert ("delete that line" if needed else "put null there") in str(caught.value)


@pytest.mark.parametrize("samples", ["3", "[3]", "[[0, 0, 0.0, 1]]", '[[0, 0, 0.0, 1, "1"]]', "[[0, 0, 0.0, 1, NaN]]"])
def test_samples_are_five_numbers_each_or_more(samples: str, tmp_path: Path) -> None:
    path = edited(two_lines(tmp_path), "samples", samples)
    with pytest.raises(AttnbenchError, match="samples of naive holds what is no list of 5, 10 or 11 finite numbers"):
        records.rows(path)


@pytest.mark.parametrize(
    ("column", "value", "says"),
    [
        ("status", '"splendid"', "none that is known"),
        ("heads", "0", "--heads must be at least 1"),
        ("device", '"tpu"', "--device must be one of"),
    ],
)
def test_a_row_of_no_workload_names_its_line(column: str, value: str, says: str, tmp_path: Path) -> None:
    path = edited(two_lines(tmp_path), column, value)
    with pytest.raises(AttnbenchError, match=r"line 2 of .*; delete that line") as caught:
        records.rows(path)
    assert says in str(caught.value)


def test_a_line_that_is_nested_too_deeply_is_broken(tmp_path: Path) -> None:
    path = two_lines(tmp_path)
    (path / "cells.jsonl").write_text("[" * 100_000 + "\n")
    with pytest.raises(AttnbenchError, match=r"line 1 of .* is broken"):
        records.rows(path)


# Nothing is known: what has no value is left out, and never printed.


@pytest.mark.parametrize("which", ["one", "all"])
def test_no_command_stumbles_over_null_figures(which: str, tmp_path: Path) -> None:
    nothing = dict.fromkeys(NUMBERS) | {"samples": [[0, 0, None, 2, None], [0, 1, 0.0, None, 1.0]]}
    kept = row("sdpa") if which == "one" else row("sdpa", **nothing)
    path = written(tmp_path / "results", [kept, row("naive", **nothing)])
    left = 1 if which == "one" else 0
    assert len(json.loads(exports.pytest_benchmark([path]))["benchmarks"]) == left
    assert len(json.loads(exports.github_action([path]))) == 2 * left
    assert exports.without_value([path]) == 2 - left
    assert len(pd.read_csv(io.BytesIO(exports.csv([path])))) == len(
        pd.read_parquet(io.BytesIO(exports.parquet([path])))
    )
    page = write_report(records.load(path), [records.read_meta(path)], tmp_path / "page").read_text()
    page = re.sub(r"<script>.*?</script>", "", page, flags=re.S)
    texts = re.sub(r'"data:[^"]*"', "", page) + (tmp_path / "page" / "report.md").read_text()
    assert not re.search(r"\b(nan|inf)\b", texts, re.IGNORECASE)


def test_a_count_that_fits_no_integer_is_left_empty(tmp_path: Path) -> None:
    path = written(tmp_path, [row("sdpa", variant_flops=2**64), row("naive", variant_flops=8)])
    for frame in (pd.read_csv(io.BytesIO(exports.csv([path]))), pd.read_parquet(io.BytesIO(exports.parquet([path])))):
        assert frame["variant_flops"].isna().tolist() == [True, False]
    assert records.load(path)["variant_flops"].tolist() == [2.0**64, 8.0]


@pytest.mark.parametrize("latency", [None, float("nan")])
def test_the_fastest_has_a_latency(latency: float | None) -> None:
    said = io.StringIO()
    with Watch(Console(file=said, width=200), 2) as watch:
        watch.rows([row("naive", latency_s=latency)], 9.0)
        watch.rows([row("naive", latency_s=latency), row("sdpa", latency_s=0.002)], 9.0)
    first, second = said.getvalue().splitlines()
    assert "fastest" not in first
    assert "fastest sdpa 2 ms" in second


def test_the_leader_so_far_is_named() -> None:
    said = io.StringIO()
    with Watch(Console(file=said, width=200), 6) as watch:
        for seq, naive, sdpa in ((64, 0.001, 0.002), (128, 0.004, 0.003), (256, 0.009, 0.005)):
            watch.rows([row("naive", seq, latency_s=naive), row("sdpa", seq, latency_s=sdpa)], 9.0)
        watch.again([row("naive", 64, latency_s=0.001), row("sdpa", 64, latency_s=0.002)], 5.0)
    first, *_, last = said.getvalue().splitlines()
    assert "leading" not in first
    assert last.endswith("(at most 5 s left; leading: sdpa, fastest in 2 of 3)")


# run.json, and whatever else is written.


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('"wall": 3.5', '"wall": NaN', "has NaN, which is no number in JSON; put null there"),
        ('"wall": 3.5', '"wall": 1e999', "has 1e999, which is no number"),
        ('"wall": 3.5', '"wall": "long"', "is damaged: Expected `float | null`, got `str`"),
        ('"cores": 2', '"cores": [2]', "$.machine.cores"),
        ('{"cores": 2}', '"mine"', "$.machine"),
        ('"budget": 2.0', '"budget": "2"', "does not say what the run was asked for"),
    ],
)
def test_a_damaged_run_json_is_one_line(old: str, new: str, says: str, tmp_path: Path) -> None:
    asked = Asked.of(plugins="naive", seq=64, budget=2.0).as_dict()
    path = written(tmp_path, machine={"cores": 2}, seconds={"wall": 3.5}, args=asked)
    file, compact = path / "run.json", json.dumps(json.loads((path / "run.json").read_text()))
    file.write_text(compact)
    assert resumed(path) == Asked.from_dict(asked)
    assert old in compact
    file.write_text(compact.replace(old, new))
    with pytest.raises(AttnbenchError, match=r"run\.json") as caught:
        resumed(path)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_command_says_it_in_one_line(tmp_path: Path) -> None:
    path = edited(two_lines(tmp_path), "latency_s", "NaN")
    for arguments in (("report", str(path), "--out", str(tmp_path / "page")), ("export", str(path))):
        command = [sys.executable, "-m", "attnbench", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100)
        assert (done.returncode, done.stdout) == (2, "")
        assert re.fullmatch(r"attnbench: line 2 of .*latency_s of naive is NaN, .* put null there .*\n", done.stderr)


def test_what_is_written_is_json() -> None:
    text = strict.dumps({"a": [float("nan"), (float("inf"), 1.5)], "b": -float("inf")})
    assert strict.loads(text) == {"a": [None, [None, 1.5]], "b": None}
    for broken in ("[NaN]", "[-Infinity]", "[1e999]", "[" * 100_000, "[", ""):
        with pytest.raises(ValueError, match=r"no number in JSON|no JSON|too deeply"):
            strict.loads(broken)


# Runs that two machines called the same.


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (["a/run"], ["run"]),
        (["a/run", "b/other"], ["run", "other"]),
        (["a/run", "b/run"], ["a/run", "b/run"]),
        (["a/run", "b/run", "b/other"], ["a/run", "b/run", "other"]),
        (["a/results/run", "b/results/run"], ["a/results/run", "b/results/run"]),
        (["run", "a/run"], ["{tmp}/run", "a/run"]),
        (["b/run", "a/run", "b/run", "b/../b/./run", "link/run"], ["b/run", "a/run"]),
    ],
)
def test_a_run_goes_by_as_much_of_its_path_as_tells_it_apart(
    given: list[str], names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "b")
    monkeypatch.chdir(tmp_path)
    for paths in (given, [tmp_path / path for path in given]):
        named = labelled(paths)
        assert list(named) == [name.format(tmp=tmp_path.name) for name in names]
        assert [path.resolve() for path in named.values()] == [(tmp_path / p).resolve() for p in given[: len(names)]]


def test_a_run_may_be_given_as_the_folder_one_is_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(two_lines(tmp_path))
    assert set(records.load(".")["run"]) == {Path.cwd().name}


def two_machines(root: Path, name: str = "run") -> list[Path]:
    """Runs of one name in two places, of which the first is the faster by far, and its ceilings as well."""
    runs = []
    for place, rate, latency in (("one", 1e12, 0.001), ("two", 1e10, 0.1)):
        ceilings = Ceilings("cpu", 1, {"float32": rate}, 1e10).as_dict()
        machine = {"cpu": f"CPU {place}", "cores": 2}
        figures = {"latency_s": latency, "latency_low_s": latency, "latency_high_s": latency}
        line = [row(plugin, **figures) for plugin in PLUGINS]
        run = written(root / place, line, machine=machine, ceilings=ceilings, standard=1, started="2026-01-01T10:00")
        runs.append(run.rename(root / place / name))
    return runs


def test_each_machine_keeps_its_rows_and_its_ceilings(tmp_path: Path) -> None:
    runs = two_machines(tmp_path)
    metas, frame = read_metas(runs), prepared(records.load(runs), read_metas(runs))
    assert [meta["name"] for meta in metas] == ["one/run", "two/run"]
    assert set(frame["run"]) == {"one/run", "two/run"}
    assert frame.groupby("run")["ceiling_flops_per_s"].unique().map(list).to_dict() == {
        "one/run": [1e12],
        "two/run": [1e10],
    }
    assert len(arrange(frame, metas)) == 2
    table = side_by_side(frame, metas, Style.of(frame))
    assert table is not None
    assert [line[3:] for line in table.rows] == [
        [plugin, "1.00 ms (1x)", "100 ms (1x)"] for plugin in ("naive", "sdpa")
    ]
    assert list(table.columns)[-2:] == ["one/run: CPU one, 2 cores", "two/run: CPU two, 2 cores"]


def test_a_renamed_run_keeps_its_ceilings(tmp_path: Path) -> None:
    (run, _) = two_machines(tmp_path, name="renamed")
    assert prepared(records.load(run), read_metas(run))["ceiling"].tolist() == ["float32", "float32"]


def test_repeated_results_are_all_reported(tmp_path: Path) -> None:
    runs = two_machines(tmp_path)
    command = [sys.executable, "-m", "attnbench", "report", "--out", str(tmp_path / "page")]
    results = [word for run in runs for word in ("--results", str(run.parent))]
    done = subprocess.run([*command, *results], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")
    text = (tmp_path / "page" / "report.md").read_text()
    assert "The rows come from 2 runs on 2 machines (CPU one, 2 cores; CPU two, 2 cores)." in text
    assert "one/run: CPU one, 2 cores | two/run: CPU two, 2 cores" in text


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_an_export_tells_them_apart(kind: str, tmp_path: Path) -> None:
    runs, read = two_machines(tmp_path), {"csv": pd.read_csv, "parquet": pd.read_parquet}[kind]
    frame = read(io.BytesIO(exports.FORMATS[kind].write([*runs, runs[0]])))
    assert frame.groupby("run").size().to_dict() == {"one/run": 2, "two/run": 2}
    with pytest.raises(AttnbenchError, match="of one machine"):
        exports.pytest_benchmark(runs)
    assert len(json.loads(exports.github_action([runs[0], runs[0]]))) == 4
