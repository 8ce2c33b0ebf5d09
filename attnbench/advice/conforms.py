"""Is a plugin right, and does it keep what it promises? `Trials` asks it case by case, in worker processes.

A process serves one case after the other, so that what a plugin remembers of one and takes for another shows; whatever
goes wrong ends it. What then goes well by itself is tried again behind each of the cases before it.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from hypothesis import HealthCheck, Phase, find, settings
from hypothesis import strategies as st
from hypothesis.errors import Flaky, NoSuchExample

from attnbench.devices import machine
from attnbench.devices.device import of
from attnbench.errors import AttnbenchError
from attnbench.judge.cases import LAYS, Case
from attnbench.plugin import Value
from attnbench.registry import Request
from attnbench.workers.ask import ask, describe_exit
from attnbench.workers.channel import Closed, Expired
from attnbench.workers.messages import Failure, Try
from attnbench.workers.server import Forkserver, Worker
from attnbench.workload import DTYPES, MASKS, Workload

FINE = ("ok", "unsupported")
TIMEOUT = 120.0
EXAMPLES = 40
_ALONE = ("workspace", "compiled")  # trials that want a process of their own
_SEARCH_SECONDS = 15.0  # for the case behind which another goes wrong
_SMALLER_SECONDS = 20.0  # for the smallest shape that fails


@dataclass(frozen=True)
class Outcome:
    """What became of a case.

    status: "ok", "unsupported" or how it failed: "wrong", "error", "crashed", "timeout", "out-of-memory". after: cases
    that must have been tried before for it to fail. measures: see `judge.trials.Checked`.
    """

    case: Case
    status: str
    reason: str = ""
    implementation: str = ""
    measures: dict[str, float] = field(default_factory=dict)
    traceback: str = ""
    after: tuple[Case, ...] = ()

    @property
    def failed(self) -> bool:
        return self.status not in FINE


class Trials:
    """Cases tried on one plugin with its options set. A context manager: on exit its process is gone.

    given: options of the command line that a line to repeat a case needs as well. deprecated: see `registry`.
    """

    def __init__(
        self,
        server: Forkserver,
        request: Request,
        plugin: str,
        options: dict[str, Value],
        timeout: float = TIMEOUT,
        given: Sequence[str] = (),
        deprecated: Sequence[str] = (),
    ) -> None:
        self.plugin, self.timeout, self.deprecated = plugin, timeout, deprecated
        self._server, self._request, self._options, self._given = server, request, options, given
        self._worker: Worker | None = None
        self._before: list[Case] = []

    def __enter__(self) -> Trials:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def repeat(self, outcome: Outcome) -> str:
        """The command that tries this case, and no more than it needs."""
        cases = [word for case in (*outcome.after, outcome.case) for word in ("--case", case.spec)]
        return shlex.join(["attnbench", "check", self.plugin, *self._given, *cases])

    def attempt(self, case: Case) -> Outcome:
        """What becomes of a case, behind all those before it."""
        if case.trial in _ALONE:
            self._end()
        before = tuple(self._before)
        found = self._try(case)
        if found.failed and before and found.status != "timeout":
            self._end()
            alone = self._try(case)
            found = alone if alone.failed else self._after(found, before)
        if found.failed or case.trial in _ALONE:
            self._end()
        return found

    def _after(self, found: Outcome, before: tuple[Case, ...]) -> Outcome:
        """With the case behind which it fails, the last one first; behind all of them where it is no single one."""
        until = time.monotonic() + _SEARCH_SECONDS
        for earlier in reversed(before):
            if time.monotonic() > until:
                break
            self._end()
            self._try(earlier)
            if (again := self._try(found.case)).failed:
                return replace(again, after=(earlier,), reason=f"after another case: {again.reason}")
        return replace(found, after=before, reason=f"after other cases: {found.reason}")

    def drawn(self, device: str, threads: int, examples: int = EXAMPLES) -> Iterator[Outcome]:
        """Shapes that Hypothesis draws, the same each time: those tried until one fails, and then the smallest such."""
        tried: dict[Case, Outcome] = {}
        until = float("inf")

        def fails(case: Case) -> bool:
            nonlocal until
            if case not in tried:
                if time.monotonic() > until:
                    return False
                tried[case] = self.attempt(case)
                if tried[case].failed:  # smaller ones are looked for, but not where each takes the time of a hang
                    wait = 0.0 if tried[case].status == "timeout" else _SMALLER_SECONDS
                    until = min(until, time.monotonic() + wait)
            return tried[case].failed

        try:
            smallest = find(
                _shapes(device, threads),
                fails,
                settings=settings(
                    max_examples=examples, database=None, deadline=None, phases=(Phase.generate, Phase.shrink),
                    suppress_health_check=list(HealthCheck),
                ),
                random=Random(0),
            )  # fmt: skip
        except NoSuchExample:
            yield from tried.values()
            return
        except Flaky:
            smallest = next(case for case, found in tried.items() if found.failed)
        yield from (found for found in tried.values() if not found.failed)
        yield tried[smallest]

    def _try(self, case: Case) -> Outcome:
        if self._worker is None:
            limit = machine.available_memory() // 2 if of(case.workload.device).limits_process else None
            self._worker = self._server.start(limit, self._request.found.path)
        worker = self._worker
        self._before.append(case)
        try:
            answer = worker.request(Try(case, self._request.found.target, self._options), self.timeout)
        except Expired:
            return Outcome(case, "timeout", f"no answer within {self.timeout:.0f} s (--timeout)")
        except Closed:
            said = describe_exit(worker.end())
            return Outcome(case, "crashed", said, traceback=worker.output())
        if isinstance(answer, Failure):
            return Outcome(case, answer.status, answer.reason, traceback=answer.traceback)
        return Outcome(case, answer.status, answer.reason, answer.implementation, answer.measures, answer.traceback)

    def _end(self) -> None:
        if self._worker is not None:
            self._worker.end()
        self._worker, self._before = None, []


@st.composite
def _shapes(draw: Callable[[Any], Any], device: str, threads: int) -> Case:
    """A case of any shape that is quickly tried."""
    mask, group = draw(st.sampled_from(MASKS)), draw(st.integers(1, 4))
    kv_heads, seq = draw(st.integers(1, 3)), draw(st.integers(1, 150))
    kv_seq = seq + draw(st.integers(0, 150)) if mask == "causal" else draw(st.integers(1, 300))
    dims = st.integers(2, 32).map(lambda n: 8 * n) | st.integers(16, 256)
    head_dim = draw(dims)
    workload = Workload(
        batch=draw(st.integers(1, 3)), heads=group * kv_heads, kv_heads=kv_heads, seq=seq, kv_seq=kv_seq,
        head_dim=head_dim, value_dim=draw(st.just(head_dim) | dims), dtype=draw(st.sampled_from(list(DTYPES))),
        mask=mask, device=device, threads=threads,
    )  # fmt: skip
    return Case("drawn", "drawn", workload, lay=draw(st.sampled_from(LAYS)))


def instances(
    server: Forkserver, request: Request, timeout: float = TIMEOUT, given: Sequence[str] = ()
) -> Iterator[Trials]:
    """What a request stands for, each with its options set.

    Raises:
        AttnbenchError: the plugin can't be loaded, or does not know an option or its value.
    """
    found, answer = request.found, ask(server, request, [])
    if isinstance(answer, Failure):
        raise AttnbenchError(f"{found.name} of {found.origin}: {answer.status}: {answer.reason}")
    for each in answer.instances:
        yield Trials(server, request, each.plugin, each.options, timeout, given, answer.deprecated)


def conform(
    trials: Trials, cases: Iterable[Case], draw: Callable[[], Iterator[Outcome]] | None = None, first: bool = False
) -> Iterator[Outcome]:
    """All outcomes as they come. draw: further ones, behind them. first: no more behind the first that fails."""
    for case in cases:
        outcome = trials.attempt(case)
        yield outcome
        if first and outcome.failed:
            return
    yield from draw() if draw else ()
