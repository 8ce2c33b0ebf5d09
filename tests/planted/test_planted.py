"""Each mistake that an author may make is found by its case, and what is right is found right."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from .mistakes import MISTAKES, PLUGINS, found, row

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/plugins.md").read_text()


def check(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The command, with the mistakes installed as plugins of these names."""
    info = folder / "mistakes-1.0.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mistakes\nVersion: 1.0\n")
    entries = [f"{name} = mistakes:{name}" for name in (*MISTAKES, "Right", "RefusesAll")]
    (info / "entry_points.txt").write_text("\n".join(["[attnbench.plugins]", *entries]))
    path = os.pathsep.join([str(folder), PLUGINS, str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "attnbench", "check", *words],
        env=os.environ | {"PYTHONPATH": path}, cwd=folder, capture_output=True, text=True,
    )  # fmt: skip


def test_every_mistake_is_found_by_its_case_and_told_in_the_table() -> None:
    bad, rows = [], []
    for mistake, outcomes, _ in found(MISTAKES):
        last = outcomes[-1]
        after = last.after[-1].name if last.after else ""
        if not (last.failed and (last.case.name, after) == (mistake.case, mistake.after)):
            bad.append(f"{mistake.name}: {last.case.spec}: {last.status}: {last.reason}")
        elif not re.search(mistake.reason, last.reason):
            bad.append(f"{mistake.name}: {last.reason}")
        rows.append(row(mistake, last))
    assert bad == []
    table = [line for line in PAGE.splitlines() if re.search(r"\| (wrong|error|crashed|timeout) at `", line)]
    assert table == rows


def test_what_is_right_is_found_right(tmp_path: Path) -> None:
    done = check(tmp_path, "Right", "--threads", "1", "--json", "--examples", "15")
    (told,) = json.loads(done.stdout)["plugins"]
    assert done.returncode == 0, [case for case in told["cases"] if case["status"] not in ("ok", "unsupported")]
    assert told["well"]
    assert len(told["cases"]) > 200
    assert {case["status"] for case in told["cases"]} == {"ok"}


@pytest.mark.parametrize("name", ["MaskByLength", "WildPointer", "ValueScale"])
def test_the_line_that_is_told_repeats_what_failed_and_no_more(name: str, tmp_path: Path) -> None:
    """One that shows behind another case alone, one that ends its process, and a shape that Hypothesis drew."""
    group = "drawn" if name == "ValueScale" else "shapes"
    done = check(tmp_path, name, "--threads", "1", "--case", group, "--first")
    assert done.returncode == 1, done.stdout + done.stderr
    (line,) = (line.strip() for line in done.stdout.splitlines() if line.startswith("    attnbench check"))
    again = check(tmp_path, *shlex.split(line)[2:], "--json")
    cases = json.loads(again.stdout)["plugins"][0]["cases"]
    assert again.returncode == 1
    assert len(cases) == line.count("--case") == (2 if name == "MaskByLength" else 1)
    assert cases[-1]["status"] == ("crashed" if name == "WildPointer" else "wrong")
    if group == "drawn":  # shrunk to what matters
        assert re.search(r"--case drawn:seq=1:kv_seq=2:heads=1:kv_heads=1:head_dim=16:value_dim=\d+:", line), line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("Rihgt",), "did you mean Right"),
        (("Right", "--case", "groupd"), "no case is called 'groupd'; did you mean grouped"),
        (("Right", "--case", "odd:seq=many"), "seq='many' is no number"),
        (("Right", "--case", "odd:sequence=3"), "'sequence=3' is no field of a case"),
        (("Right", "--case", "odd:lay=flat"), "lay is one of contiguous"),
        (("Right", "--case", "grouped:heads=3"), "must be a multiple"),
        ((), "Missing argument"),
    ],
)
def test_what_can_not_be_tried_is_one_line(words: tuple[str, ...], said: str, tmp_path: Path) -> None:
    done = check(tmp_path, *words)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert said in done.stderr


def test_one_that_refuses_all_has_shown_nothing(tmp_path: Path) -> None:
    done = check(tmp_path, "RefusesAll", "--threads", "1", "--case", "odd")
    assert done.returncode == 1
    assert "nothing could be tried" in done.stdout
    assert "not today" in done.stdout
