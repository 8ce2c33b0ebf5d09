"""What a call must return besides the right values: shapes, dtypes, memory of its own, and a process left as it was.

Each check gives None, or what is wrong in a few words.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

_TORCH = os.path.dirname(torch.__file__)


def poison(like: Tensor) -> None:
    """Leaves NaN where an output-sized allocation may land next, so that an unwritten output shows."""
    torch.full_like(like, float("nan"))


def misshapen(outs: Sequence[Any], shapes: Sequence[tuple[int, ...]], tensors: Sequence[Tensor]) -> str | None:
    """Of what a call on `tensors` returned: the output, and in phase train the gradients behind it."""
    if len(outs) != len(shapes):
        return f"returned {len(outs)} results, not {len(shapes)}"
    like, taken = tensors[0], {storage(x) for x in tensors}
    for i, (out, shape) in enumerate(zip(outs, shapes, strict=True)):
        what = "output" if i == 0 else "a gradient"
        if type(out) is not Tensor:  # one of a class of its own may compute only when somebody looks
            return f"returned a {type(out).__name__} as {what}, not a plain tensor"
        if tuple(out.shape) != shape:
            return f"{what} has shape {tuple(out.shape)}, not {shape}"
        if out.dtype != like.dtype:
            return f"{what} is {out.dtype}, not {like.dtype}"
        if out.device.type != like.device.type:
            return f"{what} is on {out.device}, not on {like.device.type}"
        if storage(out) in taken:
            return f"{what} shares its memory with an input"
    return None


def overwritten(outs: Iterable[Tensor], earlier: Iterable[Tensor]) -> str | None:
    """Whether a call put its results where those of the call before still are."""
    kept = {storage(x) for x in earlier}
    return "a call overwrites the output of the call before" if any(storage(x) in kept for x in outs) else None


Glimpse: TypeAlias = "list[tuple[tuple[Tensor, ...], Tensor]]"
_SEEN = 64  # elements of each output


def glimpse(outs: Iterable[Tensor], number: int) -> Glimpse:
    """Some elements of what a call returned, as they are now; `number` says which."""
    draws = torch.Generator().manual_seed(number)
    found = []
    for out in outs:
        at = tuple(torch.randint(n, (_SEEN,), generator=draws).to(out.device) for n in out.shape)
        found.append((at, out.detach()[at]))
    return found


def unfinished(outs: Iterable[Tensor], seen: Glimpse) -> str | None:
    """Whether results are no longer what they were when the call returned."""
    for out, (at, was) in zip(outs, seen, strict=True):
        now = out.detach()[at]
        if not bool(((now == was) | (now.isnan() & was.isnan())).all()):
            return "its output changes after the call has returned"
    return None


def changed(tensors: Iterable[Tensor], values: Iterable[Tensor]) -> str | None:
    """Whether the tensors that a call got still hold these values."""
    same = all(torch.equal(x, value) for x, value in zip(tensors, values, strict=True))
    return None if same else "a call changes its inputs"


def disturbed(before: Mapping[str, Any]) -> str | None:
    """What of `global_state` is not as it was."""
    now = global_state()
    for name, value in before.items():
        if now.get(name) != value:
            # What the environment holds may be a secret.
            values = "" if name.startswith("os.environ") else f" was {value}, now {now[name]}"
            return f"changes global state: {name}{values}"
    return None


def global_state() -> dict[str, Any]:
    """What other variants in this process, or the next call, would be disturbed by."""
    return {
        "torch.get_num_threads()": torch.get_num_threads(),
        "torch.get_default_dtype()": str(torch.get_default_dtype()),
        "torch.is_grad_enabled()": torch.is_grad_enabled(),
        "torch.get_float32_matmul_precision()": torch.get_float32_matmul_precision(),
        "torch.backends.cudnn.allow_tf32": torch.backends.cudnn.allow_tf32,
        "torch.initial_seed()": torch.initial_seed(),
        # Variables that are added, as torch.compile does, change nothing for others.
        **{f"os.environ[{name!r}]": value for name, value in os.environ.items()},
    }


class Functions:
    """The functions that calls and their checks are made of, as they are now: torch's, the clock's and attnbench's."""

    def __init__(self) -> None:
        ours = [module for name, module in list(sys.modules.items()) if name.split(".")[0] == "attnbench"]
        kinds = [kind for module in ours for kind in vars(module).values() if isinstance(kind, type)]
        kinds = [kind for kind in kinds if kind.__module__.split(".")[0] == "attnbench"]
        self._known: list[tuple[Any, dict[str, Any]]] = [
            (owner, {name: value for name, value in vars(owner).items() if callable(value)})
            for owner in (torch, torch.Tensor, torch.nn.functional, torch.linalg, time, *ours, *kinds)
        ]

    def replaced(self) -> str | None:
        """What is wrong where one is another by now. What was added disturbs nobody, nor what torch itself does."""
        for owner, known in self._known:
            now = vars(owner)
            for name, value in known.items():
                code = getattr(now.get(name), "__code__", None)
                if now.get(name) is not value and not (code and code.co_filename.startswith(_TORCH)):
                    return f"replaces {owner.__name__}.{name}"
        return None


def storage(tensor: Tensor) -> int:
    """Where its memory begins."""
    return int(tensor.untyped_storage().data_ptr())
