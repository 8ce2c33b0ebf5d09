"""Two commits of a plugin package, each in a folder of its own to import it from: git worktrees, and pip.

An environment is what is installed here with that folder before it. attnbench, torch and what else they run on is
shared by both: the harness is the same, and nothing large is installed twice.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from attnbench.advice import folders
from attnbench.errors import AttnbenchError
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
        folders.install(into, [str(source)])
        folders.complete(into)
    except AttnbenchError as problem:
        return Revision(name, commit, problem=f"can't be installed: {problem}")
    return Revision(name, commit, find(str(into)))


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
