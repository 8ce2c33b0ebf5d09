"""The contract that every attention variant fulfils, the built-in ones and anyone's.

A variant is a subclass of `Plugin` and an entry point in the group `attnbench.plugins`. Only `build` must be
written; everything else has a default that fits an exact variant which can do whatever it is asked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from attnbench.definition import Definition as Definition
from attnbench.definition import FeatureMap as FeatureMap
from attnbench.definition import Formula as Formula
from attnbench.definition import Maps as Maps
from attnbench.definition import Recurrence as Recurrence
from attnbench.definition import Softmax as Softmax
from attnbench.errors import AttnbenchError
from attnbench.past import Cache as Cache
from attnbench.past import ragged as ragged_past
from attnbench.workload import Workload

if TYPE_CHECKING:
    from torch import Tensor

API_VERSION = "1.1"
"""Of this contract, major.minor: a minor version adds to it, a major one takes something away."""

FAMILIES = ("exact", "sparse", "quantized", "kernel", "recurrent")

Value: TypeAlias = str | int | float | bool

Call: TypeAlias = "Callable[..., Tensor]"
"""query (batch, heads, seq, head_dim), key (batch, kv_heads, kv_seq, head_dim),
value (batch, kv_heads, kv_seq, value_dim), a tensor (batch, kv_heads, kv_seq, n) for each n of `Plugin.gates`, and of a
workload with sinks their logits (heads,)
-> output (batch, heads, seq, value_dim), same dtype and device. In phase train torch can differentiate it."""


@dataclass(frozen=True)
class Option:
    """One thing that varies inside a variant, written `name:key=value`.

    default: used when the option is not given; its type is the option's type.
    help: one line for `attnbench plugins`.
    choices: the values allowed, all of which `name:*` expands to; empty where any value of the type will do.
    """

    default: Value
    help: str
    choices: tuple[Value, ...] = ()

    def parse(self, text: str, name: str) -> Value:
        """The value that `text` spells.

        Raises:
            AttnbenchError: it is not of the option's type, or not among its choices.
        """
        kind = type(self.default)
        try:
            if kind is bool:
                value: Value = {"true": True, "false": False}[text.lower()]
            else:
                value = kind(text)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError
        except (KeyError, ValueError):
            raise AttnbenchError(f"option {name}={text!r}: expected {kind.__name__}, such as {self.default}") from None
        if self.choices and value not in self.choices:
            raise AttnbenchError(f"option {name}={text!r}: expected one of {', '.join(map(str, self.choices))}")
        return value


@dataclass(frozen=True)
class Attention:
    """What `Plugin.build` may return where a bare function says too little.

    implementation: what will really run, such as "torch flash" or "plain torch, chunks of 512 x 1024".
    density: the share of (query, key) pairs computed, of all seq * kv_seq; None where it is not sparse. Where it hangs
        on values, a function that tells it of the call before.
    """

    call: Call
    implementation: str
    density: float | Callable[[], float | None] | None = None

    def __call__(self, *tensors: Tensor) -> Tensor:
        return self.call(*tensors)


@dataclass(frozen=True)
class Decoding:
    """A variant that adds tokens to a past; what it keeps of the past is its state: tensors, in tuples, lists or dicts.

    start: (key, value, *gates, capacity) -> state: of `Workload.past` tokens, key (batch, kv_heads, past, head_dim) and
        so on. capacity: how many tokens the state will have to hold at most.
    step: (state, query, key, value, *gates) -> (out, state): of the new tokens, query (batch, heads, seq, head_dim) and
        key (batch, kv_heads, new, head_dim) and so on, which join the past; for a full mask there are none.
        The state that came in may share memory with the one that goes out, but a step from it once more answers
        the same: the harness repeats the step that it times.
    """

    start: Callable[..., Any]
    step: Callable[..., tuple[Tensor, Any]]
    implementation: str
    density: float | Callable[[], float | None] | None = None


class Configured:
    """What an entry point offers with options, which become attributes.

    Raises:
        AttnbenchError: an option is given that it doesn't have.
    """

    options: ClassVar[Mapping[str, Option]] = {}

    def __init__(self, **values: Value) -> None:
        for name in values:
            if name not in self.options:
                known = ", ".join(self.options) or "none"
                raise AttnbenchError(f"no option {name!r}; options are: {known}")
        for name, option in self.options.items():
            setattr(self, name, values.get(name, option.default))


class Plugin(Configured):
    """One attention variant. Its name is that of its entry point; its options become attributes.

    A variant never times, never prints, and never keeps anything of one call's inputs for the next.
    """

    api: ClassVar[str] = ""
    """The `API_VERSION` that it is written for, such as "1.0"; "": it doesn't say. What is for another major version,
    or for a later minor one, is left out."""

    family: ClassVar[str] = "exact"
    """"exact", "sparse", "quantized", "kernel" or "recurrent": which tolerance the harness holds it to."""

    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")

    phases: ClassVar[tuple[str, ...]] = ("forward", "decode", "train")
    """Without "train" it has no backward pass; without "decode" it cannot add tokens to a past. The first is what it is
    made for: a run of other phases takes a variant for decoding in where it is named, and not with all others."""

    study: ClassVar[bool] = False
    """Whether it is written to be read and to compare errors and operations, and not to be fast: a run takes it in
    where it is named, and not with all others."""

    honours: ClassVar[tuple[str, ...]] = ()
    """What it does where a workload asks for it: of "scale", "window", "tree", "softcap", "sinks", "alibi-bias" and
    "relative-bias" (see `Workload.beyond`).
    A workload that asks for anything else is refused before the variant hears of it."""

    def supports(self, workload: Workload) -> str | None:
        """None, or in a few words why this workload can't be computed here."""
        return None

    def workspace_bytes(self, workload: Workload) -> int | None:
        """Bytes a call will hold at its peak beside inputs and output; None if unknown."""
        return None

    def flops(self, workload: Workload) -> int | None:
        """Floating-point (or integer) operations of one call as this variant does it; None: as exact attention."""
        return None

    def emulated(self, workload: Workload) -> bool:
        """Whether what computes it stands in for what the variant is about: integers multiplied as floats, another
        library's operator in plain torch. Its answers count, its time says nothing of the real thing, so that a sweep
        spends little on it."""
        return False

    def ragged(self, workload: Workload) -> bool:
        """Whether it takes this batch of entries with lengths of their own, `Workload.lengths`, all in one call.

        The call of `build`, or start and step of `decoding`, then get tensors that are padded to the longest entry, and
        put out 0 behind each entry's end; `Workload.entries` says what each is: its queries, its past and new tokens
        are the first ones. Where not, the harness calls it entry by entry.
        """
        return False

    def gates(self, workload: Workload) -> tuple[int, ...]:
        """Further inputs that a block projects from each token beside key and value: numbers for each kv head.

        They come as the block's projection makes them, of about unit variance: what maps them to a decay or a rate is
        a part of the variant.
        """
        return ()

    def definition(self, workload: Workload) -> Definition:
        """The function computed, for the implementation error."""
        return Softmax()

    def build(self, workload: Workload) -> Call | Attention:
        """The callable for this workload. Sees no tensor: what depends on values belongs into the call.

        What depends on shapes alone (masks, compiled code) is made here; its time is recorded apart.
        """
        raise NotImplementedError(f"{type(self).__name__} has no build")

    def decoding(self, workload: Workload) -> Decoding:
        """How this workload's new tokens join its past: `build`'s call over a KV cache, unless a variant knows better.

        The call then gets the cache as views that are not contiguous; of a ragged batch all of it.
        """
        made = built(self, workload)
        if workload.lengths:
            start, ragged_step = ragged_past(workload, made.call)
            return Decoding(start, ragged_step, made.implementation, made.density)

        def step(state: Cache, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Cache]:
            state = state.append(key, value)
            return made.call(query, state.keys, state.values), state

        return Decoding(Cache.of, step, made.implementation, made.density)


def lacking(workload: Workload, honours: Collection[str], who: str = "it") -> str | None:
    """Why what honours these can't do the workload; None where it asks for nothing beyond them."""
    missing = [name for name in workload.beyond if name not in honours]
    return f"{who} has no {' and no '.join(missing)}" if missing else None


def _nothing(workload: Workload) -> None:
    """What an implementation says that has no answer to give."""


@dataclass(frozen=True)
class Implementation:
    """One way to compute what a variant defines. Each function is asked about a workload.

    name: its word in `impl=name`, where the option offers it.
    build: as `Plugin.build`.
    unsupported: None, or in a few words why it can't, on this machine included.
    passed_over: None, or why `impl=auto` leaves this to others even where it can.
    workspace_bytes, flops: as those of `Plugin`. emulated: as `Plugin.emulated`, whatever the workload.
    decoding: as `Plugin.decoding`; None where that is right, over `build`'s call.
    honours: as `Plugin.honours`, which of a `Choice` says nothing.
    ragged: as `Plugin.ragged`, of the workload that this implementation was made for.
    """

    name: str
    build: Callable[[Workload], Call | Attention]
    unsupported: Callable[[Workload], str | None] = _nothing
    passed_over: Callable[[Workload], str | None] = _nothing
    workspace_bytes: Callable[[Workload], int | None] = _nothing
    flops: Callable[[Workload], int | None] = _nothing
    decoding: Callable[[Workload], Decoding] | None = None
    emulated: bool = False
    honours: tuple[str, ...] = ()
    ragged: bool = False


class Choice(Plugin):
    """A variant that is one definition and several implementations, with an option `impl` to choose among them.

    `impl=auto` takes the first that can, and says why not those before it; `impl=name` takes that one or none. What a
    variant says of a workload is said by what computes it; what holds for all of them it may say itself, as `flops`.
    """

    impl: str

    def implementations(self, workload: Workload) -> Sequence[Implementation]:
        """The better ones first, for this workload on this machine; the last should do whatever the variant can."""
        raise NotImplementedError(f"{type(self).__name__} has no implementations")

    def chosen(self, workload: Workload) -> tuple[Implementation | None, str]:
        """What computes this workload, and why not what is better; or None, and why nothing does."""
        reasons: dict[str, None] = {}  # in order, each once
        possible = [each for each in self.implementations(workload) if self.impl in ("auto", each.name)]
        if possible and (none_has := lacking(workload, {name for each in possible for name in each.honours})):
            return None, none_has
        for each in possible:
            passed_over = self.impl == "auto" and each.passed_over(workload)
            reason = passed_over or lacking(workload, each.honours, each.name) or each.unsupported(workload)
            if not reason:
                return each, "; ".join(reasons)
            reasons[reason] = None
        return None, "; ".join(reasons) or f"impl={self.impl} is not for {workload.device}"

    def supports(self, workload: Workload) -> str | None:
        chosen, reason = self.chosen(workload)
        return None if chosen else reason

    def workspace_bytes(self, workload: Workload) -> int | None:
        return self._certain(workload)[0].workspace_bytes(workload)

    def flops(self, workload: Workload) -> int | None:
        return self._certain(workload)[0].flops(workload)

    def emulated(self, workload: Workload) -> bool:
        return self._certain(workload)[0].emulated

    def ragged(self, workload: Workload) -> bool:
        return self._certain(workload)[0].ragged

    def build(self, workload: Workload) -> Attention:
        chosen, reason = self._certain(workload)
        made = chosen.build(workload)
        if not isinstance(made, Attention):
            made = Attention(made, chosen.name)
        return replace(made, implementation=made.implementation + reason)

    def decoding(self, workload: Workload) -> Decoding:
        chosen, reason = self._certain(workload)
        if chosen.decoding is None:
            return super().decoding(workload)
        made = chosen.decoding(workload)
        return replace(made, implementation=made.implementation + reason)

    def _certain(self, workload: Workload) -> tuple[Implementation, str]:
        """`chosen`, with the reason as it stands behind an implementation.

        Raises:
            AttnbenchError: nothing can.
        """
        chosen, reason = self.chosen(workload)
        if chosen is None:
            raise AttnbenchError(reason)
        return chosen, f" ({reason})" if reason else ""


def built(plugin: Plugin, workload: Workload) -> Attention:
    """What the plugin builds, also where it returns a bare function."""
    made = plugin.build(workload)
    return made if isinstance(made, Attention) else Attention(made, type(plugin).__name__)


def of_function(call: Call) -> type[Plugin]:
    """A plugin of a bare function (query, key, value) -> out, taken for exact softmax attention."""
    name = getattr(call, "__name__", type(call).__name__)
    return type(name, (Plugin,), {"build": lambda self, workload: call})


def expand_kv(x: Tensor, heads: int) -> Tensor:
    """Key or value (batch, kv_heads, length, dim) with each head repeated for its group: (batch, heads, length, dim).

    A view where kv_heads is heads already; a copy otherwise.
    """
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def visible(workload: Workload, rows: Tensor, keys: Tensor) -> Tensor:
    """The workload's mask: True where the query at `rows` sees the key at `keys` (broadcastable int64 indices).

    Causal is bottom-right aligned: query i sees key j where j <= i + kv_seq - seq, so that the last query
    sees the last key, as a decoder with a cache needs.
    """
    seen: Tensor = workload.masked.visible(rows, keys, workload.offset)
    return seen
