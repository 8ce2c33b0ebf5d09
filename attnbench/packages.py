"""The packages that are installed: one whose metadata can't be read is left out, and stands in nobody's way.

Whoever looks for entry points reads the metadata of all packages there are, torch as it is imported and as it compiles:
a single broken one would end that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Any

_installed = metadata.distributions


@contextmanager
def only_whole() -> Iterator[None]:
    """Meanwhile, broken packages are hidden from this process; may decorate a function."""
    before = metadata.distributions
    metadata.distributions = _whole
    try:
        yield
    finally:
        metadata.distributions = before


def left_out() -> list[str]:
    """Where each broken package's metadata lies."""
    broken = (package for package in _installed() if not _is_whole(package))
    return list(dict.fromkeys(str(getattr(package, "_path", package.locate_file(""))) for package in broken))


def _whole(**context: Any) -> Iterator[metadata.Distribution]:
    return (package for package in _installed(**context) if _is_whole(package))


def _is_whole(package: metadata.Distribution) -> bool:
    try:
        return (
            all(isinstance(text, str) for text in (package.name, package.version)) and package.entry_points is not None
        )
    except Exception:  # whatever ails a package that nobody asked for
        return False
