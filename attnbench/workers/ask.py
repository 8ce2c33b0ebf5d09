"""One question to a worker of its own: what a plugin says, what machine this is."""

from __future__ import annotations

from collections.abc import Sequence

from attnbench.errors import AttnbenchError
from attnbench.registry import Request
from attnbench.theory.roofline import Ceilings
from attnbench.workers.channel import Closed, Expired, Message
from attnbench.workers.server import Forkserver
from attnbench.workload import Workload

_DESCRIBE_SECONDS = 60.0
_CALIBRATE_SECONDS = 600.0  # ten times what it takes


def ask(server: Forkserver, request: Request, workloads: Sequence[Workload], memory: int | None = None) -> Message:
    """What a plugin says of itself and of each workload; a `failed` message if it can't even be asked."""
    found = request.found
    if found.problem:
        return {"failed": "error", "reason": found.problem}
    worker = server.start(memory)
    try:
        message = {"op": "describe", **request.as_dict(), "workloads": [w.as_dict() for w in workloads]}
        return worker.request(message, _DESCRIBE_SECONDS)
    except Expired:
        return {"failed": "timeout", "reason": f"at import: no answer within {_DESCRIBE_SECONDS:.0f} s"}
    except Closed:
        return {"failed": "crashed", "reason": f"at import: {describe_exit(worker.end())}"}
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


def ask_machine(server: Forkserver) -> Message:
    """The facts of this machine, from a worker: what asks for the GPU should not live on here."""
    worker = server.start()
    try:
        return worker.request({"op": "machine"}, 120)
    finally:
        worker.end()


def ask_ceilings(server: Forkserver, device: str, threads: int) -> Ceilings:
    """This machine's ceilings, measured now in a worker.

    Raises:
        AttnbenchError: there is too little memory, or no such device.
    """
    worker = server.start()
    try:
        answer = worker.request({"op": "calibrate", "device": device, "threads": threads}, _CALIBRATE_SECONDS)
    except (Expired, Closed):
        raise AttnbenchError("the process that measured the ceilings came to no end; try again") from None
    finally:
        worker.end()
    found = Ceilings.from_dict(answer)
    if found is None:
        raise AttnbenchError(answer.get("reason", "no ceilings were measured"))
    return found
