"""The package that `attnbench new` writes: `package/` as it lies here, by another name."""

from __future__ import annotations

import keyword
import re
import sys
from importlib.util import find_spec
from pathlib import Path

from attnbench.errors import AttnbenchError, refusals
from attnbench.registry import find

_PACKAGE = Path(__file__).parent / "package"
_PLACES = {"gitignore": ".gitignore", "workflow.yml": ".github/workflows/test.yml"}
"""Files that would be taken for attnbench's own if they had their names here."""


def write(name: str, into: Path) -> list[Path]:
    """Writes a package for a plugin of this name into the folder `into / name`, which is made. Its files.

    Raises:
        AttnbenchError: the name is none that a package, a module and a plugin may have, or is taken; the folder is
            there already, or can't be written.
    """
    module = name.replace("-", "_")
    _check(name, module)
    folder = into / name
    words = {"my-attention": name, "my_attention": module, "MyAttention": _class(name)}
    with refusals(f"write {folder}", "choose another --into"):
        if folder.exists():
            raise AttnbenchError(f"{folder} is there already, and nothing is written over; choose another name")
        made = []
        for source in sorted(path for path in _PACKAGE.rglob("*") if path.is_file() and path.suffix != ".pyc"):
            place = source.relative_to(_PACKAGE).as_posix()
            target = folder / _named(_PLACES.get(place, place), words)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(_named(source.read_text(encoding="utf-8"), words), encoding="utf-8")
            made.append(target)
    return made


def _named(text: str, words: dict[str, str]) -> str:
    return re.sub("|".join(words), lambda found: words[found[0]], text)


def _class(name: str) -> str:
    return "".join(word.capitalize() for word in name.split("-"))


def _check(name: str, module: str) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name) or keyword.iskeyword(module) or len(name) > 60:
        raise AttnbenchError(
            f"{name!r} is no name for a package: small letters, digits and single dashes, as my-attention"
        )
    if (found := find()).get(name):
        raise AttnbenchError(f"a plugin is called {name!r} already, from {found[name].origin}; choose another name")
    if module in sys.stdlib_module_names or find_spec(module):
        raise AttnbenchError(f"a module is called {module!r} already; choose another name than {name}")
