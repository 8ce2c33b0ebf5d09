"""Sees that the activations which a sweep's workloads name as inputs are there before anything is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from attnbench import home
from attnbench.activations import Activations
from attnbench.errors import AttnbenchError
from attnbench.models.known import find
from attnbench.workers.ask import ask_captured
from attnbench.workers.server import Forkserver
from attnbench.workload import Workload


def installed(workloads: Iterable[Workload]) -> None:
    """Raises: AttnbenchError: a model is not installed here; the message is the command that does it."""
    for model in {found.source.model for w in workloads if (found := w.activations)}:
        if command := find(model).missing:
            raise AttnbenchError(f"--inputs {model}:LAYER needs the model {model}, which is not installed: {command}")


def capture(
    server: Forkserver, workloads: Iterable[Workload], tell: Callable[[str], object] = lambda line: None
) -> None:
    """Captures what is not there yet. tell: is told what will take a while, in a line.

    Raises:
        AttnbenchError: it can't be.
    """
    windows: dict[tuple[str, int], dict[int, Activations]] = {}
    for w in workloads:
        if found := w.activations:
            windows.setdefault((found.source.model, w.window), {})[found.layer] = found
    for (model, window), layers in windows.items():
        new = [str(found) for found in layers.values() if not (home.activations() / found.file(window)).exists()]
        if new:
            tell(f"capturing {', '.join(new)} on windows of {window} tokens, once for all further runs")
        ask_captured(server, model, list(layers), window)
