"""Packages in a folder to import from, before what is installed here: pip, without what attnbench itself runs on."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from attnbench.errors import AttnbenchError
from attnbench.packages import only_whole
from attnbench.peers import Peer


def install_peer(peer: Peer) -> None:
    """Puts a peer's library into its folder, in the place of what was there; what fails leaves that as it was.

    Raises:
        AttnbenchError: there is no release for this torch, pip can't install it, or the folder can't be written.
    """
    if peer.misfit:
        raise AttnbenchError(f"{peer.name} is {peer.misfit}")
    new = peer.folder.with_name(f"{peer.name}.new")
    try:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        install(new, [str(need) for need in peer.requirements])
        if not peer.alone:
            complete(new)
        shutil.rmtree(peer.folder, ignore_errors=True)
        new.rename(peer.folder)
    except OSError as error:
        raise AttnbenchError(f"can't write {peer.folder}: {error.strerror}; set XDG_DATA_HOME") from None
    finally:
        shutil.rmtree(new, ignore_errors=True)


def install(into: Path, what: Sequence[str]) -> None:
    """Raises: AttnbenchError: it can't install that."""
    words = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--target", str(into)]
    # --target and a user's own folder exclude each other, and what is in front of Python's path is not for pip.
    environment = {n: v for n, v in os.environ.items() if n not in ("PIP_USER", "PYTHONPATH")}
    done = subprocess.run(
        [sys.executable, *words, *what], capture_output=True, encoding="utf-8", errors="replace", env=environment
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["pip says nothing"]
        said = [line for line in lines if "error" in line.lower() and not line.rstrip().endswith(":")] or lines
        raise AttnbenchError(" ".join(said[0].split())[:300])


def complete(into: Path) -> None:
    """Installs what the packages in the folder need, and neither they nor the environment have, until nothing is.

    Raises:
        AttnbenchError: something is not to be had, or needs another version of what attnbench itself runs on.
    """
    tried: set[str] = set()
    while missing := [need for need in _missing(into) if need not in tried]:
        tried.update(missing)
        install(into, missing)


def _missing(into: Path) -> list[str]:
    shared = {canonicalize_name(Requirement(r).name) for r in metadata.requires("attnbench") or ()} | {"attnbench"}
    with only_whole():
        own = {canonicalize_name(p.name): p for p in metadata.distributions(path=[str(into)])}
        here = {canonicalize_name(p.name): p for p in reversed([*metadata.distributions()])} | own
    found, seen = dict[str, None](), set[tuple[str, str]]()
    ahead = [(name, "") for name in own]
    while ahead:
        name, extra = ahead.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        for need in map(Requirement, here[name].requires or ()):
            if need.marker and not need.marker.evaluate({"extra": extra}):
                continue
            other = canonicalize_name(need.name)
            if other in here and need.specifier.contains(here[other].version, prereleases=True):
                ahead += [(other, e) for e in need.extras] + ([(other, "")] if other in own else [])
            elif other in shared:
                raise AttnbenchError(f"it needs {need}, and attnbench runs with {other} {here[other].version}")
            else:
                found[str(need).partition(";")[0].strip()] = None
    return list(found)
