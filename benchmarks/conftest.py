"""Options of `pytest benchmarks/`."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("attnbench")
    group.addoption("--attnbench-plugins", default="all", help="As `attnbench run --plugins`.  [default: all]")
    group.addoption("--attnbench-seq", default="512,1024", help="As `attnbench run --seq`.  [default: 512,1024]")
    group.addoption("--attnbench-device", default="cpu", choices=["cpu", "cuda"], help="[default: cpu]")
