"""What docs/architecture.md promises: to add a thing is to touch what its row says, and no more."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import click
import pytest
from click.testing import CliRunner
from matplotlib.figure import Figure
from test_report import RUN, read, rows

from attnbench import commands
from attnbench.report import page
from attnbench.report.page import write_report

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/architecture.md").read_text()


def test_every_room_and_file_that_the_page_names_is_there() -> None:
    rooms = {path.name for path in (ROOT / "attnbench").iterdir() if path.is_dir() and (path / "__init__.py").exists()}
    named = set(re.findall(r"`(\w+)/`", PAGE))
    assert rooms <= named
    for name in re.findall(r"`([\w./-]+\.(?:py|md|toml))`", PAGE):
        assert (ROOT / name).exists() or (ROOT / "attnbench" / name).exists(), name


def test_a_command_is_a_module_and_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("attnbench.commands.hello")
    module.command = click.command()(lambda: click.echo("hello"))  # type: ignore[attr-defined]
    module.command.short_help = "Say hello."
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(commands, "COMMANDS", (*commands.COMMANDS, "hello"))
    assert CliRunner().invoke(commands.main, ["hello"]).output == "hello\n"
    assert "Say hello." in CliRunner().invoke(commands.main, ["--help"]).output


# Additions that are lines in files: what each row of the page's table says to touch, edited in a copy of attnbench.
ADDED: dict[str, tuple[dict[str, tuple[tuple[str, str], ...]], str, str]] = {
    "an implementation": (
        {"plugins/linear/__init__.py": (
            ("return (gpu, plain, cpu)", 'mine = Implementation("mine", lambda w: Attention(lambda q, k, v: v, "mine"))\n'
             "        return (mine, gpu, plain, cpu)"),
            (" else (cpu, plain, gpu)", " else (mine, cpu, plain, gpu)"),
        )},
        "import attnbench; print(attnbench.attend('linear', attnbench.Workload(seq=8, kv_seq=8)).implementation)",
        "mine",
    ),
    "a column": (
        {
            "attnbench/records/schema.py": (
                ('    Column("warnings", ', '    Column("answer", "number", "", "to everything"),\n    Column("warnings", '),
            ),
            "attnbench/workers/subject.py": (("columns = memory.columns | {", 'columns = memory.columns | {"answer": 42.0,'),),
        },
        "import attnbench; print(*attnbench.run('naive', 8, baseline='none', scope='attention', budget=5)['answer'])",
        "42.0",
    ),
    "an exporter": (
        {
            "attnbench/records/exports.py": (
                ("FORMATS = {", "def names(runs):\n    return b' '.join(r.name.encode() for r in runs)\n\n\n"
                 'FORMATS = {\n    "names": Format(names),'),
            ),
            "attnbench/commands/export.py": (('KINDS = ("csv",', 'KINDS = ("csv", "names",'),),
        },
        "from attnbench.commands import main; main(['export', 'results/one', 'results/two', '--format', 'names'])",
        "one two",
    ),
    "a question": (
        {
            "attnbench/workers/messages.py": (
                ("class AskMachine(", "class Sum(Answer, frozen=True):\n    value: int\n\n\n"
                 "class Add(Request[Sum], frozen=True):\n    values: list[int]\n\n\nclass AskMachine("),
                ("    AskMachine\n", "    Add\n    | AskMachine\n"),
                ("    Failure\n", "    Sum\n    | Failure\n"),
            ),
            "attnbench/workers/serve.py": (
                ("            case messages.AskMachine():", "            case messages.Add():\n"
                 "                return messages.Sum(sum(request.values))\n            case messages.AskMachine():"),
            ),
        },
        "from attnbench.workers.messages import Add; from attnbench.workers.server import Forkserver\n"
        "with Forkserver(1) as server: print(server.start().request(Add([40, 2]), 60).value)",
        "42",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", ADDED)
def test_an_addition_touches_no_more_than_the_page_says(what: str, tmp_path: Path) -> None:
    edits, script, shown = ADDED[what]
    for name, copy in (("attnbench", "attnbench"), ("plugins", "attnbench_plugins")):
        shutil.copytree(ROOT / name, tmp_path / copy, ignore=shutil.ignore_patterns("__pycache__"))
    for name, changes in edits.items():
        path = tmp_path / name.replace("plugins/", "attnbench_plugins/")
        text = path.read_text()
        for old, new in changes:
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        path.write_text(text)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == shown


def test_a_figure_is_what_draws_it_and_a_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    added = page.Kind("A new one", "How to read it.", lambda panels, style, machines: [Figure()])
    monkeypatch.setattr(page, "FIGURES", {"added": added})
    seen = read(write_report(rows("naive", scope="attention", seq=(512,)), [RUN], tmp_path))
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"added.png", "added.svg"}
    assert "A new one" in seen.text
    assert "How to read it." in seen.text


def test_functions_and_files_stay_small() -> None:
    """No file over 400 lines, no function over 60."""
    long: dict[str, int] = {}
    for path in (path for folder in ("attnbench", "plugins") for path in (ROOT / folder).rglob("*.py")):
        text, name = path.read_text(), str(path.relative_to(ROOT))
        if (lines := len(text.splitlines())) > 400:
            long[name] = lines
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and (lines := (node.end_lineno or 0) - node.lineno + 1) > 60:
                long[f"{name} {node.name}"] = lines
    assert long == {}
