"""README and the pages of docs/: every command is understood, and README's, made small, do what they say.

docs/lecture.md is test_lecture.py's.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import click
import pytest

from attnbench import AttnbenchError, commands, home
from attnbench.sweep.plan import choose
from attnbench.sweep.settings import Asked, Given

ROOT = Path(__file__).parents[1]
LINE = r"^{}(attnbench .*?)(?:\s+#.*)?$"
DOCS = [page for page in sorted((ROOT / "docs").glob("*.md")) if page.name != "lecture.md"]
PAGES = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *DOCS]


def said(page: Path) -> list[str]:
    """The commands of a page: indented, in a fence, or between backticks in a sentence."""
    text = page.read_text().replace("\\\n", "")  # as a shell joins what a backslash continues
    fences = "\n".join(re.findall(r"^```\w*\n(.*?)^```$", text, re.M | re.S))
    lines = re.findall(LINE.format("    "), text, re.M) + re.findall(LINE.format(""), fences, re.M)
    return lines + [" ".join(words.split()) for words in re.findall(r"(?<!`)`(attnbench [^`]+)`", text)]


def blocks(page: Path) -> list[str]:
    """The Python of a page that uses attnbench."""
    found = re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.M | re.S)
    return [block for block in found if "attnbench" in block]


SAID = [pytest.param(line, id=f"{page.relative_to(ROOT)}: {line}") for page in PAGES for line in said(page)]
README = re.findall(LINE.format("    "), PAGES[0].read_text(), re.M)


@pytest.mark.parametrize("line", SAID)
def test_every_command_is_understood(line: str) -> None:
    words = shlex.split(line.replace("--plugins my-attention", "--plugins naive"))  # the reader's own
    if "--help" in words:
        assert words[1] in commands.COMMANDS
        return
    given = commands.find(words[1]).make_context(words[1], words[2:]).params
    if words[1] == "run" and not given["resume"]:
        asked = Asked.of(**{name: value for name, value in given.items() if name in Given.__annotations__})
        assert replace(asked.sweep, device="cpu", dtype=asked.sweep.dtype or ("float32",)).workloads()
        try:
            choose(asked.plugins, asked.baseline)
        except AttnbenchError as problem:  # a peer's name is known, whether it is installed here or not
            if "is a peer that is not installed: " not in str(problem):
                raise


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_every_command_shows_examples_that_are_understood(name: str) -> None:
    told = commands.find(name).help or ""
    lines = [re.split(r"\s+[#>]", line.strip())[0] for line in told.splitlines() if "attnbench " in line]
    examples = [line for line in lines if line.startswith(f"attnbench {name}")]
    assert examples, told
    for line in examples:
        if name != "compare":  # which wants runs that are there
            test_every_command_is_understood(line)


def test_the_pages_have_commands() -> None:
    assert len(README) > 15
    for name, least in (("cpu-kernels", 2), ("gpu", 1), ("measuring", 3)):
        assert len(said(ROOT / "docs" / f"{name}.md")) >= least, name
    # README's own, docs/guard.md's, which test_testing.py runs, docs/models.md's, of test_hf.py and test_caches.py, and
    # docs/parallel.md's, of test_parallel.py.
    assert [len(blocks(page)) for page in PAGES if blocks(page)] == [2, 1, 2, 1]


@pytest.mark.parametrize("line", ["attnbench run --plugin-names sdpa", "attnbench export RUN --format xml"])
def test_a_wrong_command_would_be_seen(line: str) -> None:
    with pytest.raises(click.ClickException):
        test_every_command_is_understood(line)


FIELDS = [
    ("Does. a: one,\n    two. b, c: three.", "Does.\n\n- `a`: one, two.\n- `b`, `c`: three."),
    ("Does.\n\na: one.\n\nMore of it.", "Does.\n\n- `a`: one.\n\nMore of it."),
    ("Does. other: no field.", "Does. other: no field."),
    ("Does.\n\nRaises:\n    AttnbenchError: a.", "Does.\n\nRaises:\n    AttnbenchError: a."),
]


@pytest.mark.parametrize(("text", "listed"), FIELDS)
def test_the_reference_lists_what_a_docstring_tells_of_fields(text: str, listed: str) -> None:
    pytest.importorskip("griffe")
    assert site("fields").listed(text, {"a", "b", "c"}) == listed


def test_the_reference_has_every_option_and_variant() -> None:
    pytest.importorskip("mkdocs")
    told = site("commands").told
    for name in commands.COMMANDS:
        text = "\n".join(told(name))
        assert all(opt in text for option in commands.find(name).params for opt in option.opts if opt[0] == "-"), name
        assert f"```sh\nattnbench {name}" in text
    variants = site("variants")
    found = {"naive": variants.load("attnbench_plugins.naive:Naive")}
    assert "equation 1" in "\n".join(variants.section("naive", found["naive"]))
    assert "softmax(Q K^T \\* scale) V" in "\n".join(variants.table(found))


def site(name: str) -> ModuleType:
    """A module of docs/site."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / "site" / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# What makes README's commands small: what to look for, and what to put there, in this order.
SMALL = [
    (r"(?<=--seq )\S+\.\.\S+", "64,128"),
    (r"(?<=--seq )\d+(?!\S)", "64"),
    (r"(?<=--kv-seq )\d+", "128"),
    (r"(?<=--lengths )\S+", "64,30,7,9"),
    (r"(?<=--batch-spec )\S+", "q64_2q1s64"),
    (r"(?<=--layers )1,\S+", "1,2"),
    (r"(?<=--layers )4(?!\S)", "2"),
    (r",smollm2:3", ""),  # it takes a minute to capture, where the model is installed: see test_activations.py
    (r"--preset standard", "--preset standard --dry-run"),  # one fixed sweep, which can't be cut
    # All variants are in the first command, and in test_lecture.py in every phase; the others, about other options, would
    # spend their seconds on starting eleven and skip most of them.
    (r"^attnbench run (?!.*--(resume|dry-run|plugins))", "attnbench run --plugins linear "),
    (r"^attnbench run (?!.*--(resume|dry-run))", "attnbench run --budget 5 --precision 90% "),
    (r"^attnbench best ", "attnbench best --plugins naive,linear --budget 5 "),
    (r"^attnbench check ", "attnbench check --case odd "),
    (r"^attnbench doctor", "attnbench doctor --seconds 2"),
    (r"^attnbench calibrate", "attnbench calibrate --only ceilings"),
    # Of runs that are fit for it, which a run of seconds is not.
    (r"verify results/RUN", f"verify --cells 1 --budget 5 {ROOT / 'results/2026-11-29-cpu-isa-auto'}"),
    (r"submit results/RUN", f"submit {ROOT / 'results/2026-11-25-phases-2'}"),
    (r"^attnbench generate ", "attnbench generate --prompt 16 --tokens 2 --repeats 1 "),
]


def small(line: str) -> str:
    for pattern, by in SMALL:
        line = re.sub(pattern, by, line)
    return line


def python(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache")}  # what the machine's owner measured stays
    if not (own := folder / "cache" / "attnbench").exists():
        own.mkdir(parents=True)
        for library in home.cache().glob("*.so"):  # kernels that were compiled are those that would be
            shutil.copy(library, own)
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_the_commands_of_the_readme_run_in_order(tmp_path: Path) -> None:
    for line in README:
        runs = sorted(path.name for path in (tmp_path / "results").glob("*"))
        line = small(line)
        if runs:
            alike = [run for run in runs if "MAX_CPU_ISA" not in (tmp_path / "results" / run / "run.json").read_text()]
            line = line.replace("RUN", runs[0]).replace("OTHER", alike[-1])
        words = shlex.split(line)
        done = python(tmp_path, "-m", *words)
        busy = words[1] in ("doctor", "calibrate", "verify") and done.returncode == 1  # the machine is, and it says so
        assert done.returncode == 0 or busy, f"{line}\n{done.stdout}{done.stderr}"
        made = [path.parent.name for path in (tmp_path / "results").glob("*/cells.jsonl")]
        if words[1] == "run" and not {"--dry-run", "--resume"} & set(words):
            assert len(made) == len(runs) + 1, line
        else:
            assert sorted(made) == runs, line
        if words[1] == "report":
            out = tmp_path / ("page" if "page" in words else "reports")
            assert {path.name for path in out.iterdir()} == {"index.html", "report.md", "figures"}
        if words[1] == "export":
            assert "latency_s" in done.stdout.splitlines()[0].split(",")


@pytest.mark.slow
def test_the_python_of_the_readme_runs(tmp_path: Path) -> None:
    call, plugin = blocks(PAGES[0])
    for long, short in (('"512..4096"', '"64,128"'), ("budget=60", "budget=10"), ("1024", "64")):
        assert long in call
        call = call.replace(long, short)
    shown = "print(len(frame), attnbench.load('results/mine').equals(frame))"
    used = "print(attnbench.check(Upcast(), Workload(seq=64, kv_seq=64)).status)"
    done = python(tmp_path, "-c", "\n".join([call, shown, plugin, used]))
    assert done.returncode == 0, done.stderr
    checked, implementation, measured, own = done.stdout.splitlines()
    assert checked.startswith("ok ")
    assert implementation
    assert measured == "8 True"  # two variants and lengths, alone and in a block
    assert own == "ok"
