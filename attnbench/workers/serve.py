"""Runs inside a worker process: answers what the session asks, one request after the other.

Whatever a plugin does here (raise, hang, crash, print, exit) ends this process at worst, never the sweep.
"""

from __future__ import annotations

import errno
import os
import traceback
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import TypeVar

import torch

from attnbench.devices import device, threads
from attnbench.errors import AttnbenchError, Failed
from attnbench.plugin import Plugin
from attnbench.registry import canonical, deprecated, instances, load
from attnbench.task.call import NoGradient
from attnbench.task.promise import Promise, promise, refusal
from attnbench.theory import costs
from attnbench.workers import about_witness, caches, calibration, messages, model, parallel, system
from attnbench.workers.about_caches import DescribeCache, JudgeCache
from attnbench.workers.about_models import AskModel, JudgeModel
from attnbench.workers.about_parallel import CallTogether, DescribeScheme, Join
from attnbench.workers.channel import Channel, Closed
from attnbench.workers.generation import generate
from attnbench.workers.kinds import Choice
from attnbench.workers.messages import AnyAnswer, AnyRequest, Failure, printable
from attnbench.workers.subject import Subject
from attnbench.workers.trial import tried
from attnbench.workers.witness import Witness
from attnbench.workload import DEVICES, Workload

T = TypeVar("T")
_LONGEST_TEXT = 4000


def serve(channel: Channel) -> None:
    """Answers requests until the session hangs up."""
    worker, process = _Worker(), os.getpid()
    try:
        while True:
            request = messages.decode_request(channel.receive())
            try:
                answer = messages.encode(worker.answer(request))
            except BaseException as problem:  # SystemExit and KeyboardInterrupt too: it is the plugin's doing
                answer = messages.encode(_failure(problem, worker.stage))
            if os.getpid() != process:  # a fork that a plugin made came back from its call: it has nothing to say
                os._exit(0)
            channel.send(answer)
            del request, answer  # an output would count as what the next call keeps
    except Closed:
        pass


class _Worker:
    """What lives from one request to the next: the plugin that is ready for a workload."""

    def __init__(self) -> None:
        self._subject: Subject | None = None
        self._rank: parallel.Rank | None = None
        self._witness = Witness()

    @property
    def stage(self) -> str:
        """What was being done, for whoever asks why it failed."""
        at_work = self._subject or self._rank
        return at_work.stage if at_work else "import"

    def answer(self, request: AnyRequest) -> AnyAnswer:
        match request:
            case messages.AskMachine():
                running = {"threads_at_once": threads.at_once(request.threads)}  # before anything else starts threads
                return messages.Facts(device.describe() | running, {name: _found(name) for name in DEVICES})
            case messages.Calibrate():
                return _or("usage", lambda: messages.Calibrated(calibration.measure(request.device, request.threads)))
            case messages.Capture():
                return _capture(request)
            case messages.Describe():
                return _describe(request)
            case messages.Generate():
                return _generate(request)
            case AskModel():
                return _or("usage", lambda: model.facts(request))
            case DescribeCache():
                return _or("usage", lambda: caches.describe(request))
            case DescribeScheme():
                return _or("usage", lambda: parallel.describe(request))
            case JudgeCache():
                return _or("unsupported", lambda: caches.judge(request))
            case JudgeModel():
                return _or("unsupported", lambda: model.judge(load(request.target)(**request.options), request))
            case messages.Try():
                self._subject = None
                return tried(request)
            case about_witness.Witness(workload, given, rows, output):
                error, columns, wrong = self._witness.judge(workload, given, rows, output)
                return about_witness.Witnessed(**asdict(error), problem=wrong, columns=columns)
            case Join():
                self._rank = parallel.Rank(request)
                return self._rank.ready()
            case CallTogether():
                assert self._rank is not None
                return self._rank.call(request)
            case messages.Prepare():
                self._subject = None
                self._subject = Subject(request)
                return self._subject.prepare(request)
            case messages.Release():  # the process goes on to another workload
                assert self._subject is not None
                on, self._subject = self._subject.device, None
                on.release()
                return messages.Released()
        assert self._subject is not None
        match request:
            case messages.Aim():
                return self._subject.aim(request)
            case messages.Burst():
                return self._subject.burst()
            case messages.Look():
                return self._subject.look()
            case messages.Judge():
                return self._subject.judge()
        return self._subject.finish(request)


def _or(status: str, work: Callable[[], T]) -> T:
    """What it gives; where it refuses, the cell ends with this status."""
    try:
        return work()
    except AttnbenchError as problem:
        raise Failed(status, str(problem)) from None


def _failure(problem: BaseException, stage: str) -> Failure:
    if isinstance(problem, NoGradient):
        return Failure("unsupported", "its output carries no gradient: it has no backward pass")
    if isinstance(problem, Failed):
        return Failure(problem.status, printable(problem.reason))
    try:
        text = str(problem)
    except BaseException:  # an exception of the plugin's own that can't even be printed
        text = ""
    first_line = (text.strip().splitlines() or [""])[0]
    memory_ran_out = (
        isinstance(problem, MemoryError | torch.OutOfMemoryError)
        or (isinstance(problem, RuntimeError) and "can't allocate memory" in text)
        or (isinstance(problem, OSError) and problem.errno == errno.ENOMEM)
    )
    return Failure(
        "out-of-memory" if memory_ran_out else "error",
        printable(f"at {stage}: {type(problem).__name__}: {first_line}".removesuffix(": "))[:500],
        printable("".join(traceback.format_exception(problem)))[-_LONGEST_TEXT:],
    )


def _capture(request: messages.Capture) -> messages.Captured:
    from attnbench.models.capture import capture

    _or("usage", lambda: capture(request.model, request.layers, request.window))
    return messages.Captured()


def _found(name: str) -> messages.Found:
    on = device.of(name)
    if missing := on.missing():
        return messages.Found(missing)
    limits = system.unlimited() if on.limits_process else {}
    return messages.Found(None, on.free_bytes(), on.unmeasured() | limits, on.usual_dtype())


def _describe(request: messages.Describe) -> messages.Described:
    """What a plugin is, and for each set of its options what it says of each workload."""
    kind = load(request.target)
    chosen = _or("usage", lambda: instances(kind, request.options, request.every))
    return messages.Described(
        family=kind.family,
        devices=list(kind.devices),
        phases=list(kind.phases),
        options={n: Choice(o.default, o.help, o.choices) for n, o in kind.options.items()},
        instances=[
            messages.Instance(
                canonical(request.name, values), values, [_promised(kind(**values), w) for w in request.workloads]
            )
            for values in chosen
        ],
        deprecated=tuple(deprecated(kind)),
        study=bool(kind.study),
    )


def _promised(plugin: Plugin, workload: Workload) -> Promise:
    said = promise(plugin, workload)
    return replace(
        said,
        unsupported=said.unsupported and printable(said.unsupported),
        runs=printable(said.runs),
        chosen=printable(said.chosen),
        choices=tuple(map(printable, said.choices)),
    )


def _generate(request: messages.Generate) -> messages.Generated:
    plugin = load(request.target)(**request.options)
    for part in costs.attentions(request.workload).values():
        if reason := refusal(plugin, part):
            raise Failed("unsupported", reason)
    return generate(plugin, request.workload, request.prompt, request.tokens, request.repeats)
