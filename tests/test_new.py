"""`attnbench new`: a package that is installed, tested, checked, measured and reported as it is, in a fresh environment."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tomllib
import venv
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from packaging.requirements import Requirement

from attnbench import commands

ROOT = Path(__file__).parents[1]
FILES = {
    ".github/workflows/test.yml", ".gitignore", "README.md", "my_own.py", "pyproject.toml", "tests/test_my_own.py",
}  # fmt: skip


def new(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(commands.main, ["new", *words])
    return done.exit_code, done.output


def test_a_package_has_its_name_everywhere(tmp_path: Path) -> None:
    code, said = new("my-own", "--into", str(tmp_path))
    assert code == 0
    written = {
        path.relative_to(tmp_path / "my-own").as_posix(): path
        for path in (tmp_path / "my-own").rglob("*")
        if path.is_file()
    }
    assert set(written) == FILES
    texts = {name: path.read_text() for name, path in written.items()}
    assert [
        name for name, text in texts.items() for old in ("my-attention", "my_attention", "MyAttention") if old in text
    ] == []
    assert "class MyOwn(Plugin)" in texts["my_own.py"]
    assert 'my-own = "my_own:MyOwn"' in texts["pyproject.toml"]
    steps = yaml.safe_load(texts[".github/workflows/test.yml"])["jobs"]["test"]["steps"]
    assert {"run": "pytest"} in steps
    assert "attnbench check my-own\n" in said


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("sdpa", "a plugin is called 'sdpa' already, from attnbench"),
        ("numpy", "a module is called 'numpy' already"),
        ("json", "a module is called 'json' already"),
        ("class", "is no name for a package: small letters"),
        ("My-Own", "is no name for a package: small letters"),
        ("../up", "is no name for a package: small letters"),
        ("a--b", "is no name for a package: small letters"),
        ("x" * 99, "is no name for a package: small letters"),
        ("my-own", "is there already, and nothing is written over"),
    ],
)
def test_a_name_that_will_not_do_is_one_line(name: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "my-own").mkdir()
    (tmp_path / "my-own" / "kept").write_text("")
    code, said = new(name, "--into", str(tmp_path))
    assert (code, len(said.splitlines())) == (2, 1), said
    assert says in said
    assert [path.name for path in tmp_path.rglob("*")] == ["my-own", "kept"]


def needed(name: str, found: dict[str, Distribution]) -> None:
    """Adds what this package needs without an extra, and what that needs in turn, as they are installed here."""
    for line in distribution(name).requires or ():
        need = Requirement(line)
        if (need.marker is None or need.marker.evaluate({"extra": ""})) and need.name not in found:
            found[need.name] = distribution(need.name)
            needed(need.name, found)


def requirements() -> list[str]:
    """What attnbench needs, by its pyproject.toml."""
    lines = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    needs = map(Requirement, lines)
    return [need.name for need in needs if need.marker is None or need.marker.evaluate()]


def lend(packages: Path, found: dict[str, Distribution]) -> None:
    """Links them into an environment: unpacking torch once more takes minutes, and shows nothing of attnbench."""
    for package in found.values():
        for top in {file.parts[0] for file in package.files or ()} - {"..", "__pycache__"}:
            if not (packages / top).exists():
                (packages / top).symlink_to(package.locate_file(top))


def spent() -> float:
    """Seconds that all processes which have ended used of the cores."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.slow
def test_from_new_to_a_first_report(tmp_path: Path) -> None:
    """With what attnbench and the package say that they need, and nothing else; installed as an index would."""
    home = tmp_path / "venv"
    venv.create(home, symlinks=True)
    found: dict[str, Distribution] = {}
    for name in (*requirements(), "pytest"):  # which is of the package's extra `test`
        found[name] = distribution(name)
        needed(name, found)
    (packages,) = home.glob("lib/python*/site-packages")
    lend(packages, found)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    pip = [sys.executable, "-m", "pip", "--python", str(home / "bin" / "python")]

    def do(*words: object, where: Path = tmp_path) -> str:
        done = subprocess.run([*map(str, words)], cwd=where, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{words}\n{done.stdout}{done.stderr}"
        return done.stdout

    do(*pip, "install", "-q", "--no-deps", ROOT)
    attnbench, package = home / "bin" / "attnbench", tmp_path / "my-own"
    began = spent()
    do(attnbench, "new", "my-own")
    do(*pip, "install", "-q", "--no-deps", "-e", package)
    checked = do(attnbench, "check", "my-own", "--threads", "1")
    quick = ("--scope", "attention", "--threads", "1", "--budget", "20", "--precision", "90%")
    do(attnbench, "run", "--plugins", "my-own,naive", "--seq", "128", *quick)
    do(attnbench, "report")
    assert spent() - began < 180  # three minutes, were this machine not busy with other tests
    assert " well" in checked
    do(*pip, "check")
    script = "import attnbench, sys; print(attnbench.load(sys.argv[1]).to_json(orient='records'))"
    (run,) = (tmp_path / "results").iterdir()
    mine = {row["plugin"]: row for row in json.loads(do(home / "bin" / "python", "-c", script, run))}
    assert list(mine) == ["sdpa:backend=auto", "my-own", "naive"]
    assert (mine["my-own"]["status"], mine["my-own"]["distribution"]) == ("ok", "my-own 0.1.0")
    assert mine["my-own"]["latency_s"] > 0
    assert (tmp_path / "reports" / "index.html").exists()
    do(home / "bin" / "python", "-m", "pytest", "-q", "-p", "no:cacheprovider", where=package)
