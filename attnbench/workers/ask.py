"""One question to a worker of its own: what a plugin says, what machine this is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from msgspec import structs

from attnbench import environment
from attnbench.devices import machine
from attnbench.errors import AttnbenchError
from attnbench.registry import Request
from attnbench.theory.roofline import Ceilings
from attnbench.workers.channel import Closed, Expired
from attnbench.workers.kinds import Answer
from attnbench.workers.kinds import Request as Question
from attnbench.workers.messages import AskMachine, Calibrate, Capture, Describe, Described, Facts, Failure
from attnbench.workers.server import Forkserver
from attnbench.workload import Workload

A = TypeVar("A", bound=Answer)

_DESCRIBE_SECONDS = 60.0
_MACHINE_SECONDS = 120.0
_CALIBRATE_SECONDS = 600.0  # ten times what it takes
_CAPTURE_SECONDS = 1800.0  # likewise, of the last layer at the longest window


def ask(
    server: Forkserver, request: Request, workloads: Sequence[Workload], memory: int | None = None
) -> Described | Failure:
    """What a plugin says of itself and of each workload; a failure if it can't even be asked."""
    found = request.found
    if found.problem:
        return Failure("error", found.problem)
    worker = server.start(memory, found.path)
    try:
        question = Describe(found.name, found.target, dict(request.options), request.every, list(workloads))
        return worker.request(question, _DESCRIBE_SECONDS)
    except Expired:
        return Failure("timeout", f"at import: no answer within {_DESCRIBE_SECONDS:.0f} s")
    except Closed:
        return Failure("crashed", f"at import: {describe_exit(worker.end())}")
    finally:
        worker.end()


def ask_once(
    server: Forkserver, question: Question[A], seconds: float, memory: int | None = None, path: str = ""
) -> A | Failure:
    """One question to a process of its own, which may allocate so many bytes and imports from `path` too.

    seconds: the user's, as `--timeout` says.
    """
    worker = server.start(memory, path)
    try:
        return worker.request(question, seconds)
    except Expired:
        return Failure("timeout", f"no answer within {seconds:.0f} s (--timeout)")
    except Closed:
        return Failure("crashed", describe_exit(worker.end()))
    finally:
        worker.end()


def describe_exit(code: int | None) -> str:
    """An exit code in words."""
    import signal

    if code is None:
        return "the process is gone"
    if code >= 0:
        return f"exit code {code} without a result"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


def ask_machine(server: Forkserver) -> Facts:
    """What is to be known of this machine and its devices, from a worker: what asks a GPU should not live on here.

    Raises:
        AttnbenchError: a library that knows them failed, or the CPU lacks the instructions that workers are held to.
    """
    worker = server.start()
    try:
        answer = worker.request(AskMachine(server.threads), _MACHINE_SECONDS)
    finally:
        worker.end()
    if isinstance(answer, Failure):
        raise AttnbenchError(f"can't tell what machine this is: {answer.reason}")
    # What the user has set, before a worker gets values of ours and OpenMP binds its first thread to a core.
    own = {"environment": environment.given(server.given), "usable_threads": machine.usable_cores()}
    if reason := environment.lacks(server.isa, answer.machine["features"]):
        raise AttnbenchError(reason)
    return structs.replace(answer, machine=answer.machine | own)


def ask_ceilings(server: Forkserver, device: str, threads: int) -> Ceilings:
    """This machine's ceilings, measured now in a worker.

    Raises:
        AttnbenchError: there is too little memory, or no such device.
    """
    worker = server.start()
    try:
        answer = worker.request(Calibrate(device, threads), _CALIBRATE_SECONDS)
    except (Expired, Closed):
        raise AttnbenchError("the process that measured the ceilings came to no end; try again") from None
    finally:
        worker.end()
    if isinstance(answer, Failure):
        raise AttnbenchError(answer.reason)
    return answer.ceilings


def ask_captured(server: Forkserver, model: str, layers: Sequence[int], window: int) -> None:
    """Sees that a model's activations lie in the user's cache: see `models.capture`.

    Raises:
        AttnbenchError: they can't be had, and why.
    """
    worker = server.start()
    try:
        answer = worker.request(Capture(model, list(layers), window), _CAPTURE_SECONDS)
    except (Expired, Closed):
        raise AttnbenchError(
            f"the process that captured layers of {model} came to no end; is there memory for it?"
        ) from None
    finally:
        worker.end()
    if isinstance(answer, Failure):
        raise AttnbenchError(answer.reason)
