"""Tests share the machine's few cores; one thread each is faster than threads that wait for one another."""

from collections import Counter

import pytest
import torch
from attnbench_plugins.native import compiler
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("repeatable", derandomize=True)  # a change passes or fails for what it changes
settings.load_profile("repeatable")

BEST = ""  # all that the CPU has


@pytest.fixture(params=[BEST, "avx2"], ids=["best", "avx2"])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The instruction sets that the C++ kernels are tried on, one after the other; `indirect` asks for others."""
    monkeypatch.setenv(compiler.HIDE, request.param)
    if reason := compiler.unsupported("float32"):
        pytest.skip(reason)
    if request.param.startswith("avx512") and compiler.isa() is not compiler.ISAS[0]:
        pytest.skip("this CPU lacks AVX-512")
    return str(request.param)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What this run did not test, in one line that counts it by reason."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(str(report.longrepr[2]).removeprefix("Skipped: ") for report in skipped)
    if reasons:
        counted = "; ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        terminalreporter.write_line(f"not tested here: {counted}")
