"""Two commits of a plugin package, each in a folder of its own to import it from: git worktrees, and pip.

An environment is what is installed here with that folder before it. attnbench, torch and what else they run on is
shared by both: the harness is the same, and nothing large is installed twice.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from attnbench.errors import AttnbenchError
from attnbench.packages import only_whole
from attnbench.registry import Found, find

_BUILDS = ("pyproject.toml", "setup.py")


@dataclass(frozen=True)
class Revision:
    """A commit whose package is installed.

    name: as it was asked for. plugins: what the package offers, by name. problem: why there is no package, or why it
    can't be installed; "" where it was.
    """

    name: str
    commit: str
    plugins: dict[str, Found] = field(default_factory=dict)
    problem: str = ""

    def __str__(self) -> str:
        short = self.commit[:9]
        return short if self.commit.startswith(self.name) else f"{self.name} ({short})"


@contextmanager
def revisions(span: str, package: Path) -> Iterator[tuple[Revision, Revision]]:
    """Both commits of BASE..NEW, installed; on exit nothing of it is left. BASE...NEW begins where the two parted.

    package: its folder in the repository.

    Raises:
        AttnbenchError: there is no such commit.
    """
    root = Path(_git(package, "rev-parse", "--show-toplevel", why=f"{package} is in no git repository"))
    within = package.resolve().relative_to(root.resolve())
    names, commits = _commits(root, span)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="attnbench-guard-")))
        # Names as long as each other: what a path is long moves what lies in memory behind it.
        sides = [(folder / "base", names[0], commits[0]), (folder / "head", names[1], commits[1])]
        trees = [stack.enter_context(_worktree(root, place, commit)) / within for place, _, commit in sides]
        with ThreadPoolExecutor() as pool:
            base, new = pool.map(_installed, sides, trees)
        yield base, new


def _commits(root: Path, span: str) -> tuple[list[str], list[str]]:
    """Both names, HEAD where one is left out, and their commits."""
    parts = re.fullmatch(r"(.*?)(\.{2,3})(.*)", span)
    if not parts:
        raise AttnbenchError(f"{span!r} names no two commits; write BASE..NEW, such as main..HEAD")
    names = [parts[1] or "HEAD", parts[3] or "HEAD"]
    hint = "fetch it; a checkout in CI needs its whole history (fetch-depth: 0)"
    commits = [
        _git(
            root,
            "rev-parse",
            "--verify",
            "--quiet",
            "--end-of-options",
            f"{n}^{{commit}}",
            why=f"{n!r} is no commit here; {hint}",
        )
        for n in names
    ]
    if parts[2] == "...":
        commits[0] = _git(root, "merge-base", *commits, why=f"{span!r} have no commit in common; {hint}")
    return names, commits


@contextmanager
def _worktree(root: Path, place: Path, commit: str) -> Iterator[Path]:
    tree = place / "tree"
    # Hooks are for whoever works in the repository.
    add = ("-c", f"core.hooksPath={os.devnull}", "worktree", "add", "--quiet", "--detach", "--force")
    _git(root, *add, str(tree), commit, why=f"can't check {commit[:9]} out")
    try:
        yield tree
    finally:
        subprocess.run(["git", "-C", root, "worktree", "remove", "--force", "--force", tree], capture_output=True)


def _installed(side: tuple[Path, str, str], source: Path) -> Revision:
    place, name, commit = side
    if not any((source / build).exists() for build in _BUILDS):
        return Revision(name, commit, problem=f"no package in {source.name}: neither {' nor '.join(_BUILDS)}")
    into = place / "site"
    try:
        _pip(into, [str(source)])
        _complete(into)
    except AttnbenchError as problem:
        return Revision(name, commit, problem=f"can't be installed: {problem}")
    return Revision(name, commit, find(str(into)))


def _pip(into: Path, what: Sequence[str]) -> None:
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


def _complete(into: Path) -> None:
    """Installs what the packages in the folder need, and neither they nor the environment have, until nothing is.

    Raises:
        AttnbenchError: something is not to be had, or needs another version of what attnbench itself runs on.
    """
    tried: set[str] = set()
    while missing := [need for need in _missing(into) if need not in tried]:
        tried.update(missing)
        _pip(into, missing)


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
                raise AttnbenchError(f"it needs {need}, and both revisions run with {other} {here[other].version}")
            else:
                found[str(need).partition(";")[0].strip()] = None
    return list(found)


def _git(where: Path, *words: str, why: str) -> str:
    """What git answers. Raises: AttnbenchError: why, as git can't."""
    try:
        command = ["git", "-C", str(where), *words]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=True)
    except OSError as error:
        raise AttnbenchError(f"git: {error.strerror}") from None
    except subprocess.CalledProcessError as error:
        said = (error.stderr.strip().splitlines() or [""])[-1].removeprefix("fatal: ")
        raise AttnbenchError(why + (f" ({said})" if said else "")) from None
    return done.stdout.strip()
