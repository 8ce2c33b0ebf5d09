"""A Ray cluster: its nodes, and tasks on a node that is named. Ray is imported here alone, and when it is asked for.

A task is never tried again by Ray: what becomes of a lost one is for whoever sent it to say.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from attnbench.errors import AttnbenchError

_NAME, _ID = "ray", 8  # hex digits of a node's id that tell it from others of its name


def parse(on: str) -> str | None:
    """The address in "ray=ADDRESS", as ray.init takes it; None in "ray".

    Raises:
        AttnbenchError: it is neither, or Ray is not installed.
    """
    name, given, address = on.partition("=")
    if name != _NAME or (given and not address):
        raise AttnbenchError(f"--on {on!r} must be ray or ray=ADDRESS, such as ray=auto or ray=ray://host:10001")
    if find_spec("ray") is None:
        raise AttnbenchError("--on ray needs Ray, which is not installed: pip install 'attnbench[ray]'")
    return address or None


@dataclass(frozen=True)
class Node:
    """A node that is alive. name: its host's, and of its id. cpus, gpus, memory (bytes): what Ray gives out."""

    id: str
    name: str
    cpus: int
    gpus: int
    memory: int


class Lost(Exception):
    """A task came to nothing; the message says what Ray knows. ran: it did run, and raised."""

    def __init__(self, why: str, ran: bool) -> None:
        super().__init__(why)
        self.ran = ran


class Cluster:
    """The one that this process is connected to. What `send` gives stands for a task until `result`."""

    def __init__(self) -> None:
        self._calls: dict[Callable[..., Any], Any] = {}

    def nodes(self) -> list[Node]:
        """Those that are alive."""
        import ray

        told: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
        return sorted((_node(each) for each in told if each["Alive"]), key=lambda node: node.name)

    def send(self, call: Callable[..., Any], given: Sequence[Any], node: Node, cpus: int, gpus: int) -> Any:
        """Begins `call(*given)` there as soon as so much of the node is free, which it then has alone."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        if call not in self._calls:  # each time it is made a remote one, the cluster keeps it once more
            self._calls[call] = ray.remote(call)
        task = self._calls[call].options(
            num_cpus=cpus,
            num_gpus=gpus,
            max_retries=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False),
        )
        return task.remote(*given)

    def ended(self, tasks: Sequence[Any], seconds: float) -> list[Any]:
        """Those of the tasks that have ended, after no more than so many seconds; with any, at once."""
        import ray

        first, _ = ray.wait(list(tasks), timeout=seconds)
        return list(ray.wait(list(tasks), num_returns=len(tasks), timeout=0)[0]) if first else []

    def result(self, task: Any) -> Any:
        """What a task gives, once it has ended. Raises: Lost."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        try:
            return ray.get(task)
        except RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            raise Lost(f"{type(cause).__name__}: {cause}".splitlines()[0], ran=True) from None
        except RayError as error:
            first = next(filter(None, map(str.strip, str(error).splitlines())), "no more is known")
            raise Lost(f"{type(error).__name__}: {first.partition('. ')[0]}", ran=False) from None

    def cancel(self, task: Any) -> None:
        """Ends a task and its process, wherever it stands."""
        import ray

        with suppress(Exception):  # it may just have ended, or its node
            ray.cancel(task, force=True)


def _node(told: dict[str, Any]) -> Node:
    has = told["Resources"]
    name = f"{told['NodeManagerHostname']} {told['NodeID'][:_ID]}"
    return Node(told["NodeID"], name, int(has.get("CPU", 0)), int(has.get("GPU", 0)), int(has.get("memory", 0)))


@contextmanager
def connected(address: str | None) -> Iterator[Cluster]:
    """The cluster there; by None the one that RAY_ADDRESS or this machine names, else one that is started here.

    Raises:
        AttnbenchError: it can't be reached.
    """
    import ray

    try:
        # What tasks print is not for the terminal: a worker's last words come with its row.
        ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:
        where = address or "RAY_ADDRESS"
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise AttnbenchError(f"--on ray: no cluster at {where}: {why}") from None
    try:
        yield Cluster()
    finally:
        ray.shutdown()
