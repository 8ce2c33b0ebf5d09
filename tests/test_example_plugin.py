"""A third party's package: installed into a fresh virtual environment, it is found and measured like a built-in."""

import os
import subprocess
import sys
import venv
from importlib.metadata import Distribution, distribution
from io import StringIO
from pathlib import Path

import pandas as pd
import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


def needed(name: str, found: dict[str, Distribution]) -> None:
    """Adds what this package needs without an extra, and what that needs in turn, as they are installed here."""
    for line in distribution(name).requires or ():
        need = Requirement(line)
        if (need.marker is None or need.marker.evaluate({"extra": ""})) and need.name not in found:
            found[need.name] = distribution(need.name)
            needed(need.name, found)


def lend(packages: Path, found: dict[str, Distribution]) -> None:
    """Links them into an environment: unpacking torch once more takes minutes, and shows nothing of attnbench."""
    for package in found.values():
        for top in {file.parts[0] for file in package.files or ()} - {"..", "__pycache__"}:
            if not (packages / top).exists():
                (packages / top).symlink_to(package.locate_file(top))


@pytest.mark.slow
def test_example_plugin_runs_in_a_fresh_environment(tmp_path: Path) -> None:
    """With what attnbench says that it needs, and nothing else; both are built and installed as an index would."""
    home = tmp_path / "venv"
    venv.create(home, symlinks=True)
    found: dict[str, Distribution] = {}
    needed("attnbench", found)
    (packages,) = home.glob("lib/python*/site-packages")
    lend(packages, found)
    pip = [sys.executable, "-m", "pip", "--python", home / "bin" / "python"]
    subprocess.run(
        [*pip, "install", "-q", "--no-deps", ROOT, ROOT / "docs" / "example-plugin"], check=True, cwd=tmp_path
    )
    checked = subprocess.run([*pip, "check"], capture_output=True, text=True, cwd=tmp_path)
    assert checked.returncode == 0, checked.stdout

    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    quick = ("--scope", "attention", "--threads", "1", "--budget", "300", "--precision", "90%")
    command = [home / "bin" / "attnbench", "run", "--plugins", "upcast,naive", "--seq", "128", *quick]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    script = "import attnbench, sys; print(attnbench.load(sys.argv[1]).to_json(orient='records'))"
    (run,) = (tmp_path / "results").iterdir()
    shown = [home / "bin" / "python", "-c", script, run]
    rows = subprocess.run(shown, env=environment, capture_output=True, text=True, check=True)
    frame = pd.read_json(StringIO(rows.stdout)).set_index("plugin")
    assert frame.loc["upcast", "status"] == "ok"
    assert frame.loc["upcast", "distribution"] == "attnbench-upcast 1.0"
    assert frame.loc["upcast", "latency_s"] > 0
    assert list(frame.index) == ["sdpa:backend=auto", "upcast", "naive"]
    report = subprocess.run([home / "bin" / "attnbench", "report"], cwd=tmp_path, env=environment, capture_output=True)
    assert report.returncode == 0, report.stderr


def test_example_is_as_short_as_readme_says() -> None:
    assert len((ROOT / "docs" / "example-plugin" / "upcast.py").read_text().splitlines()) <= 20
