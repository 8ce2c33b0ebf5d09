"""The page of variants, from what each says of itself: its docstrings, family, options."""

from __future__ import annotations

import inspect
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from attnbench.plugin import Plugin
from attnbench.registry import load

ROOT = Path(__file__).parents[2]
HEAD = """# Variants

What comes with attnbench. `attnbench plugins` says what of it would run on your machine, `attnbench check NAME` whether
it is right. Other libraries' attention stands beside it as [peers](../cpu-kernels.md#peers).

*Made for* is the phase in which `--plugins all` takes a variant in; a *study* is there to be read, and is taken in
where it is named.
"""
WRAPPED = 100  # a shorter line that does not end its paragraph ends there on purpose


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the page."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = {name: load(target) for name, target in project["entry-points"]["attnbench.plugins"].items()}
    text = "\n".join([HEAD, *table(found), *(line for name, kind in found.items() for line in section(name, kind))])
    files.append(File.generated(config, "reference/variants.md", content=text))
    return files


def table(found: dict[str, type[Plugin]]) -> Iterator[str]:
    """A line for each."""
    yield from ("| variant | what | family | made for |", "| --- | --- | --- | --- |")
    for name, kind in found.items():
        what = said(sys.modules[kind.__module__]).split("\n\n")[0].replace("\n", " ")
        made_for = kind.phases[0] + (", a study" if kind.study else "")
        yield f"| [`{name}`](#{name}) | {markdown(what)} | {kind.family} | {made_for} |"


def section(name: str, kind: type[Plugin]) -> Iterator[str]:
    """All that one says."""
    module = sys.modules[kind.__module__]
    path = Path(str(inspect.getsourcefile(module))).resolve().relative_to(ROOT)
    yield from ("", f"## {name}", "", markdown(said(module)), "", markdown(said(kind)), "")
    yield f"Family {kind.family}; phases {', '.join(kind.phases)}; [{path}](../../{path})"
    if kind.options:
        yield from ("", "| option | default | choices | |", "| --- | --- | --- | --- |")
    for option, told in kind.options.items():
        choices = ", ".join(f"`{choice}`" for choice in told.choices)
        yield f"| `{option}` | `{told.default}` | {choices} | {markdown(told.help)} |"


def said(what: object) -> str:
    """A docstring of its own, as it is."""
    return inspect.cleandoc(getattr(what, "__doc__", None) or "")


def markdown(text: str) -> str:
    """Of a docstring: stars and bars as they are, and lines that end on purpose, as formulas do, kept apart."""
    lines = text.replace("*", r"\*").replace("|", r"\|").replace("<", "&lt;").split("\n")
    ends = [*(not line for line in lines[1:]), True]
    kept = (line + "  " if 0 < len(line) < WRAPPED and not end else line for line, end in zip(lines, ends, strict=True))
    return "\n".join(kept)
