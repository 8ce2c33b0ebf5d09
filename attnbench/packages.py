"""The packages that are installed: one whose metadata can't be read is left out, and stands in nobody's way.

Whoever looks for entry points reads the metadata of all packages there are, torch as it is imported and as it compiles:
a single broken one would end that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib import metadata
from pathlib import Path
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


def about(package: metadata.Distribution) -> tuple[str, str]:
    """Its name and version. Each asking of importlib's parses the whole metadata anew, a README with it."""
    said = _said(package)
    return said or (package.name, package.version)


def _whole(**context: Any) -> Iterator[metadata.Distribution]:
    return (package for package in _installed(**context) if _is_whole(package))


def _is_whole(package: metadata.Distribution) -> bool:
    return _said(package) is not None


def _said(package: metadata.Distribution) -> tuple[str, str] | None:
    """Name and version, or None where the metadata can't be read."""
    folder = getattr(package, "_path", None)
    if not isinstance(folder, Path):  # in a zip file, or of a finder of its own
        return _read(package)
    return _kept(str(folder), *(_stamp(folder / name) for name in _FILES))


_FILES = ("METADATA", "PKG-INFO", "entry_points.txt", "")  # what name, version and entry points are read from


def _stamp(path: Path) -> tuple[int, ...]:
    """Another one as soon as the file is."""
    try:
        status = path.stat()
    except OSError:
        return ()
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino


@lru_cache(maxsize=4096)
def _kept(folder: str, *stamps: tuple[int, ...]) -> tuple[str, str] | None:
    return _read(metadata.PathDistribution(Path(folder)))


def _read(package: metadata.Distribution) -> tuple[str, str] | None:
    try:
        name, version = package.name, package.version
        whole = isinstance(name, str) and isinstance(version, str) and package.entry_points is not None
    except Exception:  # whatever ails a package that nobody asked for
        return None
    return (name, version) if whole else None
