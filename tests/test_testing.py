"""The pytest fixture, in a pytest of its own: claims that hold and that don't, and what pytest-benchmark is told."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from attnbench.testing import _unless
from attnbench.workload import Workload

TESTS = """
import pytest
import torch.nn.functional as F

SMALL = dict(seq=64, heads=2, threads=1, mask="full", dtype="float32", budget=15, precision="40%")


def quick(query, key, value):
    return F.scaled_dot_product_attention(query, key, value)


def slow(query, key, value):
    for _ in range(29):
        quick(query, key, value)
    return quick(query, key, value)


def test_holds(attnbench):
    attnbench(quick).faster_than(slow, by=1.5, **SMALL)


@pytest.mark.attnbench("naive")
def test_fails(attnbench):
    attnbench.faster_than(quick, by=50, **SMALL)


def test_unsupported(attnbench):
    attnbench("retention").faster_than(quick, **SMALL)


def test_local(attnbench):
    attnbench(lambda query, key, value: value).faster_than("sdpa", **SMALL)


def test_nobody(attnbench):
    attnbench.faster_than("sdpa", **SMALL)


def test_own_timing(attnbench, benchmark):
    attnbench(quick).faster_than(slow, by=1.5, **SMALL)
    benchmark.pedantic(sum, args=([1, 2],), rounds=3)
"""


def pytest_in(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "--strict-markers", *words]
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    return subprocess.run(command, cwd=folder, env=own, capture_output=True, text=True, timeout=300, check=False)


def test_claims_in_a_pytest_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_speed.py").write_text(TESTS)
    done = pytest_in(tmp_path, "-rf", "--import-mode=importlib", "--benchmark-json=told.json")
    assert "4 failed, 2 passed" in done.stdout, done.stdout + done.stderr
    assert "naive at attention 1x2x64x64 float32 full is not 50x as fast as quick: " in done.stdout
    assert "at attention 1x2x64x64 float32 full: unsupported: " in done.stdout
    assert "can't be imported by another process" in done.stdout
    assert 'none is installed beside attnbench\'s own; write attnbench("NAME")' in done.stdout
    told = {one["name"]: one for one in json.loads((tmp_path / "told.json").read_text())["benchmarks"]}
    assert told.keys() == {"test_holds", "test_fails", "test_own_timing"}
    (claim,) = told["test_holds"]["extra_info"]["attnbench"]
    assert claim["by"] == 1.5
    assert claim["speedup"] > 2
    assert 0.2 < told["test_holds"]["stats"]["median"] / claim["latency_s"] < 5
    assert told["test_own_timing"]["stats"]["rounds"] == 3
    assert len(told["test_own_timing"]["extra_info"]["attnbench"]) == 1


def test_the_page_shows_tests_that_run(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "guard.md").read_text()
    (text,) = re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)
    for long, short in (
        ("seq=4096", "seq=64, heads=2, threads=1, budget=40"),
        ("by=1.5", "by=0.01"),
        ("by=0.5", "by=0.01"),
    ):
        assert long in text
        text = text.replace(long, short)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_page.py").write_text(text)
    done = pytest_in(tmp_path)
    assert "2 passed" in done.stdout, done.stdout + done.stderr


def test_it_loads_nothing_heavy(tmp_path: Path) -> None:
    (tmp_path / "test_none.py").write_text(
        "import sys\n\n\ndef test_it():\n    assert 'torch' not in sys.modules\n    assert 'pandas' not in sys.modules\n"
    )
    done = pytest_in(tmp_path, "-q")
    assert done.returncode == 0, done.stdout


def row(speedup: float, half: float, processes: int = 10, status: str = "ok") -> dict[str, object]:
    interval = {"speedup": speedup, "speedup_low": speedup * (1 - half), "speedup_high": speedup * (1 + half)}
    names = {"plugin": "mine", "baseline": "sdpa", "status": status, "reason": "it is", "processes": processes}
    return Workload(seq=64, kv_seq=64).as_dict() | interval | names


def test_only_what_is_certain_passes() -> None:
    assert _unless(row(1.3, 0.02), 1.2) is None
    assert "can't tell whether mine at" in (_unless(row(1.22, 0.05), 1.2) or "")
    assert "is not 1.2x as fast as sdpa: 1.1" in (_unless(row(1.1, 0.02), 1.2) or "")
    assert "can't tell" in (_unless(row(1.22, 0.001, processes=1), 1.2) or "")  # the next process may differ by more
    assert (_unless(row(9.0, 0.02, status="wrong"), 1.2) or "").endswith(": wrong: it is")
