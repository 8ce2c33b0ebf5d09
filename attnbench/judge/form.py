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
        "modes of torch": torch._C._len_torch_function_stack() + torch._C._len_torch_dispatch_stack(),
        "what follows Python's calls": str((sys.getprofile(), sys.gettrace())),
        # Variables that are added, as torch.compile does, change nothing for others; nor do its own notes.
        **{f"os.environ[{k!r}]": value for k, value in os.environ.items() if not k.startswith("_TORCHINDUCTOR_")},
    }


# What the reference and the judge are made of, below Python.
_OPERATORS = """
    _softmax softmax.int matmul mm bmm mul.Tensor mul_.Tensor div.Tensor add.Tensor sub.Tensor masked_fill_.Scalar exp
    linalg_vector_norm norm.Scalar norm.ScalarOpt_dim abs max amax sum sum.dim_IntList clamp_min cat index.Tensor copy_
    index_select _to_copy clone equal eq.Tensor all isnan isfinite item _local_scalar_dense
"""


class Functions:
    """What calls and their checks are made of, as it is now: functions and operators of torch, the clock, attnbench."""

    def __init__(self, others: Iterable[Any] = ()) -> None:
        """others: modules and classes to watch beside those."""
        ours = [module for name, module in list(sys.modules.items()) if name.split(".")[0] == "attnbench"]
        kinds = [kind for module in ours for kind in vars(module).values() if isinstance(kind, type)]
        kinds = [kind for kind in kinds if kind.__module__.split(".")[0] == "attnbench"]
        torchs = (torch, torch.Tensor, torch.nn.functional, torch.linalg)
        self._known: list[tuple[Any, dict[str, tuple[Any, Any]]]] = [
            (owner, {name: (value, _code(value)) for name, value in vars(owner).items() if callable(value)})
            for owner in (*torchs, time, *others, *ours, *kinds)
        ]
        self._constants = [(module, _constants(module)) for module in ours]
        self._kernels = {name: _kernels(name) for name in _OPERATORS.split()}

    def replaced(self) -> str | None:
        """What is wrong where one is another by now. What was added disturbs nobody, nor what torch itself does."""
        for owner, known in self._known:
            now = vars(owner)
            for name, (value, was) in known.items():
                code = _code(now.get(name))
                same = now.get(name) is value and code is was
                if not same and not (code and code.co_filename.startswith(_TORCH)):
                    return f"replaces {owner.__name__}.{name}"
        for module, before in self._constants:
            for name, told in _constants(module).items():
                if before.get(name, told) != told:
                    return f"changes {module.__name__}.{name}"
        for name, lines in self._kernels.items():
            if any(_TORCH not in line and "(inactive)" not in line for line in _kernels(name) - lines):
                return f"replaces aten::{name.partition('.')[0]}"
        return None


def _code(function: Any) -> Any:
    return getattr(function, "__code__", None)


def _constants(module: Any) -> dict[str, str]:
    """Numbers, words and tables of a module, by their names in capitals."""
    return {
        name: repr(value)
        for name, value in vars(module).items()
        if name.isupper() and isinstance(value, (int, float, str, tuple, dict))
    }


def _kernels(operator: str) -> set[str]:
    """A line for each kernel of one of torch's operators, which says where it was registered."""
    return set(torch._C._dispatch_dump(f"aten::{operator}").splitlines())


def storage(tensor: Tensor) -> int:
    """Where its memory begins."""
    return int(tensor.untyped_storage().data_ptr())
