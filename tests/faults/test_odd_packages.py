"""Packages that nobody asked for, whose metadata is broken: they are named, left out, and end nothing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

from attnbench import packages, registry

from .harness import QUICK, run
from .test_odd_hosts import attnbench, offer

WARNING = "can't be read, so its package is left out with what it offers; mend or remove it"


def lose_metadata(info: Path) -> None:
    (info / "METADATA").unlink()


def lose_name(info: Path) -> None:
    (info / "METADATA").write_text("Metadata-Version: 2.1\nVersion: 1\n")


def break_entry_points(info: Path) -> None:
    (info / "entry_points.txt").write_text("[attnbench.plugins]\nno equals sign\n")


def encode_entry_points(info: Path) -> None:
    (info / "entry_points.txt").write_bytes("[attnbench.plugins]\nnaïve = n:N\n".encode("latin-1"))


def encode_metadata(info: Path) -> None:
    (info / "METADATA").write_bytes("Metadata-Version: 2.1\nName: stray\nVersion: 1\nAuthor: Jér\n".encode("latin-1"))


def empty(info: Path) -> None:
    for file in info.iterdir():
        file.unlink()
    info.rename(info.parent / ".dist-info")


# torch looks through all packages as it compiles, too.
COMPILES = """
import torch
from torch.nn.functional import scaled_dot_product_attention
from attnbench import Plugin

class Mine(Plugin):
    def build(self, w):
        return torch.compile(lambda q, k, v: scaled_dot_product_attention(q, k, v) * 1.0)
"""
SHAPE_OF_SDPA = ("--heads", "2", "--head-dim", "32", "--scope", "attention", "--threads", "1")
BREAKS = (lose_metadata, lose_name, break_entry_points, encode_entry_points, encode_metadata, empty)


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """One package of each kind, where commands find them."""
    for number, breaks in enumerate(BREAKS):
        breaks(offer(tmp_path / "packages", monkeypatch, f"stray{number}"))
    offer(tmp_path / "others", monkeypatch, "compiles")
    (tmp_path / "others" / "compiles.py").write_text(COMPILES)
    return sorted((tmp_path / "packages").glob("*.dist-info"))


@pytest.mark.parametrize("breaks", BREAKS)
def test_a_broken_package_is_left_out_by_name(
    breaks: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = offer(tmp_path, monkeypatch, "stray")
    monkeypatch.syspath_prepend(tmp_path)
    whole = registry.find()
    assert (whole["stray"].problem, packages.left_out()) == (None, [])
    breaks(info)
    assert registry.find() == {name: found for name, found in whole.items() if name != "stray"}
    (left,) = packages.left_out()
    assert Path(left).parent == tmp_path
    assert Path(left).is_dir()


def test_what_is_hidden_is_seen_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_entry_points(offer(tmp_path, monkeypatch, "stray"))
    monkeypatch.syspath_prepend(tmp_path)
    with packages.only_whole():
        registry.find()  # which hides them, too, for as long as it lasts
        assert metadata.entry_points(group="attnbench.plugins")
    assert any("stray" in str(getattr(package, "_path", "")) for package in metadata.distributions())


def test_a_broken_package_hides_no_whole_one_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offer(tmp_path / "whole", monkeypatch, "same")
    break_entry_points(offer(tmp_path / "broken", monkeypatch, "same", version="2.0"))
    for folder in ("whole", "broken"):
        monkeypatch.syspath_prepend(tmp_path / folder)
    assert registry.find()["same"].version == "1.0"


def test_plugins_are_listed_beside_broken_packages(broken: list[Path]) -> None:
    done = attnbench("plugins", "naive", stdout=subprocess.PIPE)
    assert done.returncode == 0
    assert sorted(done.stderr.splitlines()) == [f"warning: {info} {WARNING}" for info in broken]
    assert "exact" in done.stdout


def test_a_run_and_its_report_beside_broken_packages(broken: list[Path], tmp_path: Path) -> None:
    result = run(tmp_path, "--plugins", "compiles", "--seq", "64", *QUICK, shape=SHAPE_OF_SDPA)
    assert (result.code, result.statuses()) == (0, {"sdpa:backend=auto": "ok", "compiles": "ok"}), result.err
    warned = sorted(line for line in result.err.splitlines() if WARNING in line)
    assert warned == [f"warning: {info} {WARNING}" for info in broken]
    for arguments in (("report", str(result.path), "--out", str(tmp_path / "page")), ("export", str(result.path))):
        done = attnbench(*arguments, stdout=subprocess.PIPE)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ("doctor", "--threads", "1", "--seconds", "5"),
        ("calibrate", "--threads", "1", "--only", "ceilings"),
        ("generate", "--tokens", "2"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_other_commands_beside_broken_packages(
    arguments: tuple[str, ...], broken: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    done = attnbench(*arguments, stdout=subprocess.PIPE)
    assert done.returncode in ((0,) if arguments[0] == "generate" else (0, 1))  # 1: the machine is not quiet
    assert done.stderr.count(WARNING) == len(broken)
    assert all(line.startswith(("warning: ", "measuring, ")) for line in done.stderr.splitlines())


def test_a_variant_is_checked_beside_broken_packages(broken: list[Path]) -> None:
    code = (
        "import attnbench as a; w = a.Workload(seq=64, kv_seq=64); print(a.check('compiles', w)); a.attend('naive', w)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stderr) == (0, "")
    assert "status='ok'" in done.stdout


# Entry points as the packaging standard allows them, and others.


@pytest.mark.parametrize("extras", ["", " [fast]", "[fast, x]"])
def test_an_entry_point_may_name_extras(extras: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = offer(tmp_path, monkeypatch, "extra")
    (info / "entry_points.txt").write_text(f"[attnbench.plugins]\nextra = extra:Mine{extras}\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert registry.find()["extra"].problem is None
    done = attnbench("plugins", "extra", stdout=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, "")
    assert "yes" in done.stdout.splitlines()[1]


@pytest.mark.parametrize("value", ["my own:Mine", "extra-it:Mine", "extra:Mine [fast"])
def test_what_is_no_entry_point_is_said(value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = offer(tmp_path, monkeypatch, "extra")
    (info / "entry_points.txt").write_text(f"[attnbench.plugins]\nextra = {value}\n")
    monkeypatch.syspath_prepend(tmp_path)
    problem = f"extra 1.0 says {value!r} where its entry point should say module:Class"
    assert registry.find()["extra"].problem == problem
