"""A group of processes that share one attention: all are asked at once, and what one of them does ends the group."""

from __future__ import annotations

import select
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Generic, TypeVar

from attnbench.devices import cgroup, machine
from attnbench.workers.about_parallel import Called, CallTogether, Join, Joined, SchemeInstance
from attnbench.workers.ask import describe_exit
from attnbench.workers.channel import Closed, Expired
from attnbench.workers.kinds import Answer, Request
from attnbench.workers.messages import Failure
from attnbench.workers.server import Forkserver, Worker
from attnbench.workload import Workload

_GRACE_SECONDS = 0.5  # in which the ranks that wait for one that failed fail too, or the one that is gone is noticed
# Of the time limit, what a rank waits for another: who waits says so, and who is waited for is then known by silence.
_WAITING_SHARE, _MARGIN_SECONDS = 0.75, 1.0
_OF_PEERS = ("/gloo/", "NCCL", "ncclRemote")  # in what a rank says that has waited for another in vain
_meetings = count()

A = TypeVar("A", bound=Answer)


@dataclass
class Heard(Generic[A]):
    """What came of a question to all ranks, by rank: answers, failures in their order, and who is gone."""

    answers: dict[int, A] = field(default_factory=dict)
    failures: dict[int, Failure] = field(default_factory=dict)
    gone: list[int] = field(default_factory=list)


class Group:
    """The session's handle of so many processes. `status` is set once something went wrong.

    timeout: seconds in which each of them must answer.
    """

    def __init__(self, world: int, timeout: float) -> None:
        self.world, self._timeout = world, timeout
        self.status: str | None = None
        self.reason = self.traceback = ""
        self._workers: list[Worker] = []

    def start(self, server: Forkserver, folder: Path, memory: int | None = None) -> None:
        """Starts the processes, which will meet at a file in this folder. memory: bytes that each may allocate."""
        self._meeting = str(folder / f"meeting-{next(_meetings)}")
        for _ in range(self.world):
            self._workers.append(server.start(memory))

    def join(self, scheme: SchemeInstance, workload: Workload, number: int) -> list[Joined] | None:
        """Lets them meet, and get ready for a workload. None where the group has ended instead.

        A group may be asked again, for another scheme or workload. number: see `CallTogether`.
        """
        given = self.world, self._meeting, _WAITING_SHARE * self._timeout, number
        return self._ask([Join(workload, scheme, rank, *given) for rank in range(self.world)])

    def call(self, asked: CallTogether) -> list[Called] | None:
        """A burst. None where the group has ended instead."""
        return self._ask([asked] * self.world)

    def cpu_seconds(self) -> float:
        """What its processes have used of all cores so far."""
        return sum(machine.cpu_seconds(worker.pid) for worker in self._workers)

    def end(self, status: str | None = None, reason: str = "", traceback: str = "") -> None:
        """Ends all processes; with a status, for good."""
        self.status, self.reason, self.traceback = status or self.status, reason or self.reason, traceback
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.channel.close()  # all at once, so that none waits for another to end
        for worker in workers:
            worker.end()

    def _ask(self, questions: Sequence[Request[A]]) -> list[A] | None:
        kills = cgroup.oom_kills()
        heard = _hear(self._workers, questions, self._timeout + _MARGIN_SECONDS)
        if len(heard.answers) == self.world:
            return [heard.answers[rank] for rank in range(self.world)]
        self._blame(heard, kills)
        return None

    def _blame(self, heard: Heard[A], kills: int) -> None:
        """Ends the group by what went wrong first: in one rank, that the others then failed of, too."""
        own = {r: f for r, f in heard.failures.items() if not any(word in f.reason for word in _OF_PEERS)}
        silent = sorted(set(range(self.world)) - heard.answers.keys() - heard.failures.keys() - set(heard.gone))
        if heard.gone:
            rank = heard.gone[0]
            worker = self._workers[rank]
            code = worker.end()
            if code == -9 and cgroup.oom_kills() > kills:
                self.end("out-of-memory", f"rank {rank}: killed by the kernel: the cgroup's memory ran out")
                return
            last = (worker.output().splitlines() or [""])[-1]
            said = f"; last output: {last[:200]}" if last else ""
            self.end("crashed", f"rank {rank}: {describe_exit(code)}{said}")
        elif own or not silent:
            rank, failure = next(iter((own or heard.failures).items()))
            who = "" if self.world == 1 or self._is_of_all(own) else f"rank {rank}: "
            self.end(failure.status, who + failure.reason, failure.traceback)
        else:
            names = f"rank{'s' * (len(silent) > 1)} {', '.join(map(str, silent))}"
            beside = ", for which the others waited" if heard.failures else ""
            self.end("timeout", f"no answer from {names} within {self._timeout:g} s (--timeout){beside}")

    def _is_of_all(self, failures: Mapping[int, Failure]) -> bool:
        return len(failures) == self.world and len({failure.reason for failure in failures.values()}) == 1


def _hear(workers: Sequence[Worker], questions: Sequence[Request[A]], seconds: float) -> Heard[A]:
    """Asks all at once and waits for all answers; after a failure only a moment longer."""
    heard, waiting, deadline = Heard[A](), dict(enumerate(workers)), time.monotonic() + seconds
    for rank, question in enumerate(questions):
        try:
            workers[rank].send(question)
        except Closed:
            heard.gone.append(rank)
            del waiting[rank]
    while waiting:
        if heard.gone or heard.failures:
            deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        channels = {worker.channel: rank for rank, worker in waiting.items()}
        ready, _, _ = select.select(list(channels), [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for rank in sorted(channels[channel] for channel in ready):
            worker = waiting.pop(rank)
            try:
                answer = worker.answer(questions[rank], max(0.1, deadline - time.monotonic()))
            except (Closed, Expired):
                heard.gone.append(rank)
                continue
            if isinstance(answer, Failure):
                heard.failures[rank] = answer
            else:
                heard.answers[rank] = answer
    return heard
