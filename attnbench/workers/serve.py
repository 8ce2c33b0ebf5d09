"""Runs inside a worker process: makes one plugin ready for one workload, then times blocks of it on request.

Whatever a plugin does here (raise, hang, crash, print, exit) ends this process at worst, never the sweep.
"""

from __future__ import annotations

import errno
import os
import traceback
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from attnbench.devices import device, memory
from attnbench.errors import AttnbenchError, Failed
from attnbench.plugin import Plugin
from attnbench.registry import canonical, instances, load
from attnbench.task.call import NoGradient
from attnbench.task.promise import promise, refusal
from attnbench.theory import costs
from attnbench.workers import calibration
from attnbench.workers.channel import Channel, Closed, Message, printable
from attnbench.workers.generation import generate
from attnbench.workers.subject import Subject
from attnbench.workload import Workload

_LONGEST_TEXT = 4000


def serve(channel: Channel) -> None:
    """Answers requests until the session hangs up."""
    subject: Subject | None = None
    process = os.getpid()
    try:
        while True:
            message = channel.receive()
            try:
                match message.pop("op"):
                    case "machine":
                        answer = device.describe()
                    case "calibrate":
                        answer = calibration.measure(**message).as_dict()
                    case "describe":
                        answer = describe(load(message.pop("target")), **message)
                    case "generate":
                        answer = _generate(Workload.from_dict(message.pop("workload")), **message)
                    case "prepare":
                        subject = Subject(Workload.from_dict(message.pop("workload")), **message)
                        answer = subject.prepare()
                    case "burst":
                        assert subject is not None
                        answer = subject.burst(**message)
                    case "release":  # the process goes on to another workload
                        subject, answer = None, {}
                        memory.release()
                    case _:
                        assert subject is not None
                        answer = subject.finish(**message)
            except BaseException as problem:  # SystemExit and KeyboardInterrupt too: it is the plugin's doing
                answer = _failure(problem, subject.stage if subject else "import")
            if os.getpid() != process:  # a fork that a plugin made came back from its call: it has nothing to say
                os._exit(0)
            try:
                channel.send(printable(answer))
            except (TypeError, ValueError) as problem:  # the plugin said something that JSON can't hold
                channel.send(printable(_failure(problem, subject.stage if subject else "import")))
    except Closed:
        pass


def _failure(problem: BaseException, stage: str) -> Message:
    if isinstance(problem, NoGradient):
        return {"failed": "unsupported", "reason": "its output carries no gradient: it has no backward pass"}
    if isinstance(problem, Failed):
        return {"failed": problem.status, "reason": problem.reason}
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
    return {
        "failed": "out-of-memory" if memory_ran_out else "error",
        "reason": f"at {stage}: {type(problem).__name__}: {first_line}".removesuffix(": ")[:500],
        "traceback": "".join(traceback.format_exception(problem))[-_LONGEST_TEXT:],
    }


def describe(
    kind: type[Plugin], name: str, options: Mapping[str, str], every: bool, workloads: list[Message]
) -> Message:
    """What a plugin is, and for each set of its options what it says of each workload."""
    try:
        chosen = instances(kind, options, every)
    except AttnbenchError as problem:
        raise Failed("usage", str(problem)) from None
    known = [Workload.from_dict(w) for w in workloads]
    return {
        "family": kind.family,
        "devices": list(kind.devices),
        "doc": (kind.__doc__ or "").strip().partition("\n")[0],
        "options": {
            n: {"default": o.default, "help": o.help, "choices": list(o.choices)} for n, o in kind.options.items()
        },
        "instances": [
            {
                "plugin": canonical(name, values),
                "options": values,
                "answers": [asdict(promise(kind(**values), w)) for w in known],
            }
            for values in chosen
        ],
    }


def _generate(workload: Workload, target: str, options: dict[str, Any], **sizes: int) -> Message:
    plugin = load(target)(**options)
    for part in costs.attentions(workload).values():
        if reason := refusal(plugin, part):
            raise Failed("unsupported", reason)
    return generate(plugin, workload, **sizes)
