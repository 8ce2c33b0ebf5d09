"""The cases of `attnbench check` as tests of a plugin's own, a test a case.

    from attnbench.conformance import Conformance

    class TestMine(Conformance):
        plugin = "my-attention"

Each runs in a process beside pytest, so that one that crashes or hangs is a test that fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest

from attnbench.advice.conforms import EXAMPLES, TIMEOUT, Outcome, Trials, instances
from attnbench.judge.cases import Case, chosen, listed
from attnbench.registry import requested
from attnbench.workers.server import Forkserver

__all__ = ["Conformance"]


class Conformance:
    """A base class for tests of one plugin.

    plugin: as `--plugins` takes it, or a `Plugin` class or a function (query, key, value) -> out of a module.
    cases: groups, names or patterns of `attnbench check --case`; all where there are none. examples: shapes that
        Hypothesis draws. timeout: seconds for a case.
    """

    plugin: ClassVar[str | Callable[..., Any]]
    device: ClassVar[str] = "cpu"
    threads: ClassVar[int] = 1
    cases: ClassVar[tuple[str, ...]] = ()
    examples: ClassVar[int] = EXAMPLES
    timeout: ClassVar[float] = TIMEOUT

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "case" in metafunc.fixturenames:
            named = [text for text in self.cases if text != "drawn"]
            found = chosen(named, self.device, self.threads) if self.cases else listed(self.device, self.threads)
            metafunc.parametrize("case", found, ids=[case.spec for case in found])

    @pytest.fixture(scope="class")
    @classmethod
    def trials(cls) -> Iterator[Trials]:
        """The plugin, in a process of its own."""
        with Forkserver(cls.threads) as server:
            (trials,) = instances(server, requested(cls.plugin), cls.timeout)
            with trials:
                yield trials

    def test_case(self, trials: Trials, case: Case) -> None:
        self._told(trials, trials.attempt(case))

    def test_drawn(self, trials: Trials) -> None:
        """Shapes that Hypothesis draws; of those that fail the smallest is told."""
        if not self.examples or (self.cases and "drawn" not in self.cases):
            pytest.skip("not among cases")
        *_, last = trials.drawn(self.device, self.threads, self.examples)
        if last.failed:
            self._told(trials, last)

    def _told(self, trials: Trials, outcome: Outcome) -> None:
        __tracebackhide__ = True
        if outcome.status == "unsupported":
            pytest.skip(outcome.reason)
        if outcome.failed:
            again = trials.repeat(outcome) if isinstance(self.plugin, str) else ""
            told = (f"{outcome.case.spec}: {outcome.status}: {outcome.reason}", outcome.traceback, again)
            pytest.fail("\n".join(filter(None, told)), pytrace=False)
