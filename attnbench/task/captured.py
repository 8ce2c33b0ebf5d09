"""Queries, keys and values that a model's layer had while it read the shipped text, as a workload's inputs.

They lie in a file in the user's cache, which `models.capture` makes: "query" (windows, heads, window, head_dim), "key"
and "value" (windows, kv_heads, window, head_dim), in float32, each window from its first token on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from attnbench import activations, home
from attnbench.activations import Activations
from attnbench.errors import AttnbenchError
from attnbench.workload import Workload

NAMES = ("query", "key", "value")
"""Of the tensors in a file, in the order in which attention takes them."""
_FEW = 1 << 22  # values of all sets, up to which there are as many sets as new tokens to choose among


def path(found: Activations, window: int) -> Path:
    """Where the activations of a layer on windows of so many tokens lie."""
    return home.activations() / found.file(window)


def sets(workload: Workload) -> int:
    """How many sets of inputs calls get in turn."""
    new = workload.batch * workload.heads * workload.seq * workload.head_dim * activations.NEW_TOKENS
    return activations.NEW_TOKENS if workload.decodes and new <= _FEW else activations.SETS


def fill(tensors: Sequence[Tensor], workload: Workload, draw: int) -> None:
    """Overwrites query, key and value, (sets * batch, heads, length, head_dim) each, with windows that `draw` says.

    The i-th token of a window is the i-th of the problem, from 0 on where its window ends. Decoding, windows are those
    of the past, and each set has other new tokens behind it.

    Raises:
        AttnbenchError: they were not captured.
    """
    with _Windows(workload) as windows:
        drawn, count = Random((workload.seed << 20) + draw), len(tensors[0])
        entries = workload.entries()
        if workload.decodes:
            choice = windows.of_past()
            picks = [choice[entry % workload.batch] for entry in range(count)]
            late = [windows.size - own.past - own.seq for own in entries]
            shifts = [drawn.randint(0, max(0, late[entry % len(late)])) for entry in range(count)]
        else:
            turns = -(-count // windows.count)
            picks = [i for _ in range(turns) for i in drawn.sample(range(windows.count), windows.count)]
            shifts = [0] * count
        for entry in range(count):
            own = entries[entry % len(entries)]
            for name, tensor in zip(NAMES, tensors, strict=True):
                start = own.past if workload.decodes else max(0, own.offset) if name == "query" else 0
                windows.copy(name, picks[entry], start + shifts[entry], tensor[entry])


def fill_past(tensors: Sequence[Tensor], workload: Workload) -> None:
    """Overwrites key and value of the tokens that a decoding step finds, (batch, kv_heads, past, head_dim) each.

    Raises:
        AttnbenchError: they were not captured.
    """
    with _Windows(workload) as windows:
        for entry, pick in enumerate(windows.of_past()):
            for name, tensor in zip(NAMES[1:], tensors, strict=True):
                windows.copy(name, pick, 0, tensor[entry])


class _Windows:
    """The file of a workload's inputs."""

    def __init__(self, workload: Workload) -> None:
        from safetensors import safe_open

        found = workload.activations
        assert found is not None
        found.check(workload.heads, workload.kv_heads, workload.head_dim, workload.value_dim)
        self._workload, self.size = workload, workload.window
        try:
            self._file: Any = safe_open(path(found, self.size), framework="pt")
        except OSError:
            raise AttnbenchError(
                f"{found} was not captured on {self.size} tokens yet: `attnbench run --inputs {found}` does it"
            ) from None

    def __enter__(self) -> _Windows:
        self._file.__enter__()
        self.count: int = self._file.get_slice("query").get_shape()[0]
        return self

    def __exit__(self, *raised: object) -> None:
        self._file.__exit__(*raised)

    def of_past(self) -> list[int]:
        """The window of each entry of a batch that decodes: the seed says which."""
        return [(self._workload.seed + entry) % self.count for entry in range(self._workload.batch)]

    def copy(self, name: str, pick: int, start: int, out: Tensor) -> None:
        """Tokens of a window, the first of them number `start`, into (heads, length, head_dim)."""
        window = self._file.get_slice(name)[pick]  # (heads, window, head_dim)
        length = out.shape[1]
        if start + length <= self.size:
            out.copy_(window[:, start : start + length])
        else:
            out.copy_(window[:, torch.arange(start, start + length) % self.size])
