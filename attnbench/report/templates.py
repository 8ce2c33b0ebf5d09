"""The templates of pages, with the style and the scripts that stand in each."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup


def templates(scripts: Sequence[str], **settings: Any) -> Environment:
    """Every value is escaped, by `settings`, unless it is marked safe. scripts: files below this folder."""
    here = Path(__file__).parent
    loader = FileSystemLoader(here)
    made = Environment(loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, **settings)
    made.globals["css"] = Markup((here / "report.css").read_text(encoding="utf-8"))
    made.globals["scripts"] = [Markup((here / name).read_text(encoding="utf-8")) for name in scripts]
    return made
