"""A third party's package: installed into a fresh virtual environment, it is found and measured like a built-in."""

import os
import subprocess
import venv
from io import StringIO
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_example_plugin_runs_in_a_fresh_environment(tmp_path: Path) -> None:
    home = tmp_path / "venv"
    venv.create(home, with_pip=True)
    pip = [home / "bin" / "pip", "install", "-q", "-c", ROOT / "constraints.txt"]
    subprocess.run([*pip, ROOT, ROOT / "docs" / "example-plugin"], check=True, cwd=tmp_path)

    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [home / "bin" / "attnbench", "run", "--plugins", "upcast,naive", "--seq", "128", "--scope", "attention"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    script = "import attnbench, sys; print(attnbench.load(sys.argv[1]).to_json(orient='records'))"
    (run,) = (tmp_path / "results").iterdir()
    rows = subprocess.run([home / "bin" / "python", "-c", script, run], capture_output=True, text=True, check=True)
    frame = pd.read_json(StringIO(rows.stdout)).set_index("plugin")
    assert frame.loc["upcast", "status"] == "ok"
    assert frame.loc["upcast", "distribution"] == "attnbench-upcast 1.0"
    assert frame.loc["upcast", "latency_s"] > 0
    assert list(frame.index) == ["sdpa:backend=auto", "upcast", "naive"]


def test_example_is_as_short_as_readme_says() -> None:
    assert len((ROOT / "docs" / "example-plugin" / "upcast.py").read_text().splitlines()) <= 20
