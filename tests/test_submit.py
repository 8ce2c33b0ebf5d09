"""A run that is shared: one file that holds all its rows, and what keeps a run from being one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from attnbench.advice.submit import examine
from attnbench.commands import main
from attnbench.errors import AttnbenchError
from attnbench.records.run import rows
from attnbench.records.submission import content, read

RESULTS = Path(__file__).parents[1] / "results"
FIT = RESULTS / "2026-11-25-phases-2"
Lines = list[dict[str, Any]]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("submissions")
    done = CliRunner().invoke(main, ["submit", str(FIT), "--out", str(out), "--machine", "a <box>, Zen 4"])
    assert done.exit_code == 0, done.output
    assert "132 rows on a <box>, Zen 4: attnbench run --plugins all" in done.output
    assert "few-rounds, 10 cells" in done.output
    (found,) = out.iterdir()
    assert found.name.startswith("2026-11-25-a-box-zen-4-")
    assert str(found) in done.output
    return found


def test_a_file_holds_all_rows_and_is_a_tenth_of_the_run(file: Path) -> None:
    shared = read(file)
    assert shared.meta["machine"]["named"] == "a <box>, Zen 4"
    assert shared.meta["ceilings"]["threads"] == 2
    assert file.stat().st_size < (FIT / "cells.jsonl").stat().st_size / 10
    for had, has in zip(rows(FIT), shared.rows(), strict=True):
        for name in set(had) - {"samples", "traceback"}:
            value = has.get(name) if has.get(name) is not None else had[name] if had[name] == [] else None
            assert value == (pytest.approx(had[name], rel=1e-6) if isinstance(had[name], float) else had[name]), name
    assert content(shared) == file.read_bytes()


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda text: text[:-30], "is no JSON"),
        (lambda text: "[1, 2]", "is no submission"),
        (lambda text: text.replace('"submission": 1', '"submission": 9'), "is of a newer attnbench"),
        (lambda text: text.replace('"rows": 132', '"rows": 131'), "has 132 values for 131 rows"),
        (lambda text: text.replace('"rows": 132', '"rows": 0'), "it has no rows"),
        (lambda text: text.replace('"run": {', '"ran": {'), "it lacks same, columns or run"),
        (lambda text: text.replace('"latency_s": [', '"latency_s": ["fast", '), "latency_s: Expected"),
        (lambda text: text.replace('"plugin": [', '"plugins": ['), "it has no plugin"),
        (lambda text: text.replace('"ok"', '"fine"'), "status 'fine' is none that is known"),
        (lambda text: text.replace('"seq": [512,', f'"seq": [{10**30},'), "seq"),
    ],
)
def test_a_damaged_file_is_refused_in_a_line(file: Path, tmp_path: Path, edit: Callable[[str], str], said: str) -> None:
    path = tmp_path / "x.attnbench.json"
    text = file.read_text()
    changed = edit(text)
    assert changed != text
    path.write_text(changed)
    with pytest.raises(AttnbenchError) as refused:
        read(path)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


UNFIT: dict[str, tuple[Callable[[dict[str, Any], Lines], Any], str]] = {
    "unfinished": (lambda meta, lines: meta.update(finished=None), "attnbench run --resume"),
    "nameless": (lambda meta, lines: meta["machine"].update(cpu="unknown"), "--machine"),
    "uncalibrated": (lambda meta, lines: meta.update(ceilings=None), "attnbench calibrate --only ceilings --device cpu --threads 2"),
    "other threads": (lambda meta, lines: meta["ceilings"].update(threads=1), "--threads 2"),
    "noisy ceilings": (lambda meta, lines: meta["ceilings"].update(disturbed=0.4), "40% of the cores"),
    "uncommitted": (lambda meta, lines: meta["machine"].update(git="abc-dirty"), "commit them"),
    "no version": (lambda meta, lines: (meta["machine"].update(git=None), meta.update(distributions={})), "which version"),
    "no command": (lambda meta, lines: meta.update(command=[]), "which command repeats it"),
    "a cell cut out": (lambda meta, lines: lines[0]["cells"].pop(), "no row of 1 cell that it was asked for"),
    "a workload cut out": (lambda meta, lines: lines.pop(), "no row of 11 cells that"),
    "a variant cut out": (
        lambda meta, lines: [line.update(cells=[r for r in line["cells"] if r["variant"] != "int8"]) for line in lines],
        "no row of int8",
    ),
    "too fast": (lambda meta, lines: lines[-1]["cells"][0].update(latency_s=1e-7), "TFLOP/s"),
    "no ratio": (
        lambda meta, lines: [row.update(speedup_low=None) for line in lines for row in line["cells"]],
        "nobody can verify one",
    ),
}  # fmt: skip


@pytest.mark.parametrize("flaw", UNFIT)
def test_what_is_missing_is_said_with_how_to_mend_it(
    flaw: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # where no machine was ever calibrated
    edit, said = UNFIT[flaw]
    run = tmp_path / "run"
    shutil.copytree(FIT, run)
    meta = json.loads((run / "run.json").read_text())
    lines = [json.loads(line) for line in (run / "cells.jsonl").read_text().splitlines()]
    edit(meta, lines)
    (run / "run.json").write_text(json.dumps(meta))
    (run / "cells.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = examine(run)
    assert len(found.missing) == 1, found.missing
    assert said in f"{found.missing[0].what}; {found.missing[0].mend}"


def test_an_unfit_run_is_not_written(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["submit", str(RESULTS / "2026-11-25-decode"), "--out", str(tmp_path / "out")])
    assert done.exit_code == 1
    assert "missing: it ran from a checkout with changes" in done.output
    assert not (tmp_path / "out").exists()
