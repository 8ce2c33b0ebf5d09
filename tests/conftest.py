"""Tests share the machine's few cores; one thread each is faster than threads that wait for one another."""

from collections import Counter

import pytest
import torch
from hypothesis import settings
from instructions import BEST, hold_to

torch.set_num_threads(1)
settings.register_profile("repeatable", derandomize=True)  # a change passes or fails for what it changes
settings.load_profile("repeatable")


@pytest.fixture(params=[BEST, "avx2"], ids=["best", "avx2"])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The instruction sets that the C++ kernels are tried on, one after the other; `indirect` asks for others."""
    hold_to(request.param, monkeypatch)
    return str(request.param)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What this run did not test, in one line that counts it by reason."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(str(report.longrepr[2]).removeprefix("Skipped: ") for report in skipped)
    if reasons:
        counted = "; ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        terminalreporter.write_line(f"not tested here: {counted}")
