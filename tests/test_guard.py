"""A pull request through `attnbench guard`: real commits of a real package, and its decisions on made-up noise."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from attnbench.advice.guard import Look, joined, narrowed
from attnbench.advice.revisions import revisions
from attnbench.errors import AttnbenchError
from attnbench.stats.slower import ERROR, certain, chance, suspicion

# Builds a wheel of the files beside it without asking an index for a builder.
BACKEND = """
import pathlib, zipfile

def build_wheel(folder, config_settings=None, metadata_directory=None):
    info = "mine-1.0.dist-info"
    files = {{
        "mine.py": pathlib.Path("mine.py").read_text(),
        f"{{info}}/METADATA": "Metadata-Version: 2.1\\nName: mine\\nVersion: 1.0\\n{needs}",
        f"{{info}}/WHEEL": "Wheel-Version: 1.0\\nGenerator: test\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n",
        f"{{info}}/entry_points.txt": "[attnbench.plugins]\\n{entries}",
    }}
    with zipfile.ZipFile(pathlib.Path(folder) / "mine-1.0-py3-none-any.whl", "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)
        wheel.writestr(f"{{info}}/RECORD", "".join(f"{{name}},,\\n" for name in [*files, f"{{info}}/RECORD"]))
    return "mine-1.0-py3-none-any.whl"
"""
PROJECT = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
PLUGIN = """
import torch.nn.functional as F
from attnbench import Plugin


class Mine(Plugin):
    times, factor = 1, 1.0

    def build(self, workload):
        def attend(query, key, value):
            for _ in range(self.times):
                out = F.scaled_dot_product_attention(query, key, value)
            return out * self.factor

        return attend


class Other(Mine):
    times, factor = {times}, {factor}


class Wrong(Mine):
    factor = {factor}
"""
SMALL = ("--seq", "64", "--heads", "2", "--mask", "full", "--dtype", "float32", "--threads", "1")


def git(repository: Path, *words: str) -> str:
    who = ("-c", "user.name=t", "-c", "user.email=t@localhost", "-c", "commit.gpgsign=false")
    return subprocess.run(["git", "-C", repository, *who, *words], check=True, capture_output=True, text=True).stdout


def commit(repository: Path, names: str, tag: str, times: int = 1, factor: float = 1.0, needs: str = "") -> None:
    """names: plugins by their classes, `same=Mine`. needs: a line of metadata."""
    entries = "".join(name.replace("=", " = mine:") + "\\n" for name in names.split())
    package = repository / "package"
    package.mkdir(exist_ok=True)
    (package / "pyproject.toml").write_text(PROJECT)
    (package / "backend.py").write_text(BACKEND.format(entries=entries, needs=needs and needs + "\\n"))
    (package / "mine.py").write_text(PLUGIN.format(times=times, factor=factor))
    git(repository, "add", ".")
    git(repository, "commit", "-q", "--allow-empty", "-m", tag)
    git(repository, "tag", tag)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repository")
    git(folder, "init", "-q")
    git(folder, "commit", "-q", "--allow-empty", "-m", "nothing")
    git(folder, "tag", "nothing")
    commit(folder, "same=Mine", "one")
    commit(folder, "same=Mine twice=Other wrong=Wrong gone=Mine", "base")
    commit(folder, "same=Mine twice=Other wrong=Wrong added=Mine", "head", times=4, factor=1.0)
    commit(folder, "wrong=Wrong", "bad", factor=1.5)
    (folder / "package" / "backend.py").write_text("raise RuntimeError('no wheel today')")
    git(folder, "commit", "-q", "-am", "unbuilt")
    git(folder, "tag", "unbuilt")
    return folder


def guard(repository: Path, *words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "attnbench", "guard", *map(str, words)]
    return subprocess.run(command, cwd=repository / "package", capture_output=True, text=True, timeout=300, check=False)


def left_behind(repository: Path) -> list[str]:
    return git(repository, "worktree", "list").splitlines()[1:]


def test_a_slower_cell_fails_and_the_others_do_not(repository: Path) -> None:
    done = guard(repository, "base..head", *SMALL, "--budget", 18, "--json")
    told = json.loads(done.stdout)
    assert (done.returncode, told["failed"]) == (1, True), done.stderr
    verdicts = {cell["plugin"]: cell["verdict"] for cell in told["cells"]}
    assert verdicts.keys() == {"same", "twice", "wrong"}
    assert verdicts.pop("twice") == "slower"
    assert "slower" not in verdicts.values()
    assert [name for name, _ in told["only_new"]] == ["added"]
    assert [name for name, _ in told["only_base"]] == ["gone"]
    assert (told["broken"], left_behind(repository)) == ([], [])


def test_the_same_code_passes_in_words(repository: Path) -> None:
    done = guard(repository, "one..base", "--plugins", "same", *SMALL, "--budget", 12, "--markdown")
    assert done.returncode == 0, done.stderr
    assert "| same |" in done.stdout
    assert done.stdout.splitlines()[-1] == "- no cells slower by more than --fail-over 1% for certain"
    assert "NEW is base (" in done.stderr


def test_a_wrong_answer_fails(repository: Path) -> None:
    done = guard(repository, "base..bad", *SMALL, "--budget", 8)
    assert done.returncode == 1
    assert "broken: wrong, attention 1x2x64x64 float32 full: wrong: " in done.stdout


@pytest.mark.parametrize(
    ("span", "code", "said"),
    [
        ("base..nobody", 2, "'nobody' is no commit here"),
        ("base", 2, "write BASE..NEW"),
        ("base..unbuilt", 1, "can't be installed: "),
        ("base..nothing", 1, "no package in package"),
    ],
)
def test_what_can_not_be_guarded_is_one_line(repository: Path, span: str, code: int, said: str) -> None:
    done = guard(repository, span, *SMALL)
    assert (done.returncode, (done.stdout + done.stderr).count("\n")) == (code, 1), done.stdout + done.stderr
    assert said in done.stdout + done.stderr
    assert left_behind(repository) == []


def test_the_workflow_of_the_page_does_what_it_says(repository: Path, tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "guard.md").read_text()
    (text,) = re.findall(r"^```yaml\n(.*?)^```$", page, re.M | re.S)
    workflow = yaml.safe_load(text)
    assert workflow[True] == "pull_request"  # YAML 1.1 reads `on` so
    (job,) = workflow["jobs"].values()
    assert job["timeout-minutes"] > 5
    checkout, _, install, run = job["steps"]
    assert checkout["uses"].startswith("actions/checkout@")
    assert checkout["with"]["fetch-depth"] == 0
    assert install["run"] == "pip install attnbench"
    assert run["env"] == {"BASE": "origin/${{ github.base_ref }}"}
    assert run["run"].count("--budget 300") == 1
    small = run["run"].replace("--budget 300", shlex.join(["--budget", "8", "--plugins", "same", *SMALL]))
    git(repository, "checkout", "-q", "base")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    summary = tmp_path / "summary.md"
    done = subprocess.run(
        ["bash", "-e", "-c", small], cwd=repository / "package", capture_output=True, text=True, timeout=300, check=False,
        env=os.environ | {"BASE": "one", "GITHUB_STEP_SUMMARY": str(summary), "PATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "| same |" in summary.read_text()


def wheel(folder: Path, name: str, version: str, needs: str = "") -> None:
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as made:
        made.writestr(f"{name}.py", f"VERSION = {version!r}\n")
        made.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}")
        made.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        made.writestr(f"{info}/RECORD", "")


def test_each_revision_has_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what is not here each gets its own version; what attnbench runs on can't be another for one of them."""
    shelf, repository = tmp_path / "shelf", tmp_path / "repository"
    shelf.mkdir()
    repository.mkdir()
    wheel(shelf, "rare", "1.0")
    wheel(shelf, "rare", "2.0", "Requires-Dist: deeper; extra == 'more'\n")
    wheel(shelf, "deeper", "1.0")
    git(repository, "init", "-q")
    commit(repository, "same=Mine", "old", needs="Requires-Dist: rare<2")
    commit(repository, "same=Mine", "new", needs="Requires-Dist: rare[more]; python_version > '3'")
    commit(repository, "same=Mine", "torch", needs="Requires-Dist: torch<1")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    with revisions("old..new", repository / "package") as sides:
        here = [{path.name for path in Path(side.plugins["same"].path).glob("*.dist-info")} for side in sides]
    assert here == [
        {"mine-1.0.dist-info", "rare-1.0.dist-info"},
        {"mine-1.0.dist-info", "rare-2.0.dist-info", "deeper-1.0.dist-info"},
    ]
    with revisions("old..torch", repository / "package") as (_, new):
        assert "needs torch<1, and attnbench runs with torch 2" in new.problem
    with pytest.raises(AttnbenchError, match="in no git repository"), revisions("old..new", shelf):
        pass


def made_up(rng: random.Random, slower: float, processes: int, noise: float) -> dict[tuple[float, float], float]:
    """BASE's time over NEW's in ten rounds of each process, where each round and process has noise of its own."""
    each = [rng.gauss(0, noise) for _ in range(processes)]
    return {(p, i): (1 + each[p] + rng.gauss(0, 2 * noise)) / (1 + slower) for p in range(processes) for i in range(10)}


def test_identical_code_is_seldom_certain_and_a_slowdown_often() -> None:
    rng = random.Random(0)
    for processes in (2, 12, 40):
        same = [chance(made_up(rng, 0.0, processes, 0.02), 0.0) for _ in range(400)]
        assert sum(p < 0.05 for p in same) < 400 * 0.1, processes
        assert chance(made_up(rng, 0.5, processes, 0.02), 0.01) < ERROR / 4, processes
    found = [chance(made_up(rng, 0.03, 40, 0.01), 0.01) < ERROR / 4 for _ in range(100)]
    assert sum(found) > 90
    assert chance({(0, 0): 0.5, (0, 1): 0.5}, 0.01) == 1  # too few rounds to say anything


def test_a_first_look_suspects_what_looks_slower() -> None:
    rng = random.Random(1)
    grounds = [suspicion(made_up(rng, slower, 8, 0.005), 0.01) for slower in (0.1, 0.03, 0.0, -0.05)]
    assert grounds[2:] == [None, None]
    assert (grounds[0] or 0) > (grounds[1] or 0) > 0


def test_all_decisions_share_the_error() -> None:
    assert certain([]) == []
    assert certain([0.004, 0.9], 0.01) == [True, False]
    assert certain([0.006, 0.9], 0.01) == [False, False]
    assert certain([0.009, 0.001], 0.01) == [True, True]  # the smaller is out of the way


def test_many_suspects_are_narrowed_by_a_short_look() -> None:
    rng, asked = random.Random(2), []
    first = {i: made_up(rng, 0.03 if i == 7 else 0.011, 6, 0.01) for i in range(40)}

    def again(i: int, seconds: float) -> dict[tuple[float, float], float]:
        asked.append(i)
        return made_up(rng, 0.03 if i == 7 else 0.0, 12, 0.005)

    chosen, left = narrowed(first, 136, again, 0.01)
    assert (len(asked), chosen[0]) == (8, 7)
    assert len(chosen) <= 2
    assert not {*chosen} & {*left}
    assert len(narrowed(first, 40, again, 0.01)[0]) == 1  # too little time for more than one, and for a short look
    assert len(asked) == 8
    assert narrowed({0: made_up(rng, -0.1, 6, 0.01)}, 136, again, 0.01) == ([], [])


def row(seconds: float, processes: int, **more: Any) -> dict[str, Any]:
    samples = [[p, i, 0.0, 1, seconds, 0, 0, 0, 0, 0] for p in range(processes) for i in range(3)]
    return {"status": "ok", "samples": samples, **more}


def test_looks_are_joined_as_processes_of_one() -> None:
    looks = [Look(row(1.0, 5), row(2.0, 5)), Look(row(1.0, 6), row(2.0, 6))]
    both = joined(looks)
    assert (both.new["processes"], len(both.ratios), both.new["speedup"]) == (11, 33, 0.5)
    failed = Look(row(1.0, 5), {"status": "crashed", "samples": []})
    assert joined([looks[0], failed]) is failed
