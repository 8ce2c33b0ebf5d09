"""The reference of commands, from click itself, in place of a comment in reference/commands.md.

mkdocs-click would run the examples in a command's help together, which stand behind click's mark for what is to be left
alone.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

import click
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

from attnbench import commands

MARK = "<!-- commands -->"
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*(?: [A-Z]+)?")


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Puts all commands where the page has the mark."""
    if MARK not in markdown:
        return markdown
    return markdown.replace(MARK, "\n".join(line for name in commands.COMMANDS for line in told(name)))


def told(name: str) -> Iterator[str]:
    """A section for a command: its help with the examples, its usage, its options."""
    command = commands.find(name)
    context = click.Context(command, info_name=f"attnbench {name}")
    yield from (f"## attnbench {name}", "")
    for text in inspect.cleandoc(command.help or "").split("\n\n"):
        kept = text.removeprefix("\b\n")
        yield from ("", marked(text) if kept == text else f"```sh\n{kept}\n```", "")
    yield from (f"```text\n{command.get_usage(context)}\n```", "", "| option | |", "| --- | --- |")
    for parameter in command.get_params(context):
        if record := parameter.get_help_record(context):
            spelled, text = record
            yield f"| `{spelled.replace('|', ' | ')}` | {marked(text)} |"  # where a narrow page may break it
    yield ""


def marked(text: str) -> str:
    """A sentence of click's as Markdown: options as code, and stars as they are."""
    return OPTION.sub(r"`\g<0>`", text.replace("*", r"\*").replace("|", r"\|"))
