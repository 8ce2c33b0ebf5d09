"""What docs/architecture.md promises: to add a thing is to touch what its row says, and no more."""

from __future__ import annotations

import ast
import re
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
