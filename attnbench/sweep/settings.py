"""What a sweep was asked for, and how its session measures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypedDict, Unpack

import msgspec

from attnbench import batch as batches
from attnbench.activations import Source, named
from attnbench.devices.machine import default_threads
from attnbench.environment import ISAS
from attnbench.errors import AttnbenchError
from attnbench.sizes import (
    STANDARD,
    STANDARD_SWEEP,
    Names,
    Sizes,
    Sweep,
    as_masks,
    as_names,
    as_sizes,
    parse_bytes,
    precision_or_auto,
)
from attnbench.theory.models import preset as shape_of
from attnbench.theory.roofline import Ceilings
from attnbench.workload import DTYPES, INPUTS, PHASES, flag

_SIZES = ("seq", "kv_seq", "batch", "heads", "kv_heads", "head_dim", "value_dim", "layers")
_NAMES = {"dtype": tuple(DTYPES), "phase": tuple(PHASES)}
_PLAIN = ("softcap", "bias", "tokens", "scope", "block", "norm", "style", "lengths", "seed")
_SIZED_BY_BATCH = ("seq", "kv_seq", "batch", "tokens", "lengths")
_SHAPE = ("heads", "kv_heads", "head_dim", "value_dim")

BUDGET, TIMEOUT, PRECISION = 280.0, 120.0, "auto"


class Given(TypedDict, total=False):
    """What may be asked of a sweep, each None where nothing is asked: see `attnbench.run` for what it means."""

    plugins: str
    seq: Sizes | None
    kv_seq: Sizes | None
    batch: Sizes | None
    tokens: int | None
    heads: Sizes | None
    kv_heads: Sizes | None
    head_dim: Sizes | None
    value_dim: Sizes | None
    preset: str | None
    dtype: Names | None
    device: str
    mask: Names | None
    scale: float | None
    softcap: float | None
    bias: str | None
    phase: Names | None
    scope: str | None
    block: str | None
    norm: str | None
    style: str | None
    layers: Sizes | None
    lengths: str | None
    batch_spec: str | None
    inputs: Names | None
    baseline: str
    seed: int | None
    threads: int | None
    precision: str | float
    budget: float
    timeout: float
    l2: str | None
    memory: str | int | None
    isa: str


@dataclass(frozen=True, kw_only=True)
class Asked:
    """All that a run was asked for; `run.json` keeps it, so that a resumed run asks the same.

    Until a machine was asked, the sweep's device may be "auto", its dtype empty, and memory and l2 None; precision too
    until the cells are known.
    """

    plugins: str
    baseline: str
    sweep: Sweep
    precision: float | None
    budget: float
    timeout: float
    memory: int | None = None
    l2: str | None = None
    isa: str = "auto"

    @classmethod
    def of(cls, **given: Unpack[Given]) -> Asked:
        """What was asked for in words.

        Raises:
            AttnbenchError: a size, a name or a preset is not to be had, or the standard sweep is asked to be another.
        """
        if (isa := given.get("isa", "auto")) not in ISAS:
            raise AttnbenchError(f"--isa {isa!r} is none of {', '.join(ISAS)}")
        memory, precision = given.get("memory"), str(given.get("precision", PRECISION))
        return cls(
            plugins=given.get("plugins", "all"),
            baseline=given.get("baseline", "sdpa"),
            sweep=_sweep(given),
            precision=precision_or_auto(precision),
            budget=given.get("budget", BUDGET),
            timeout=given.get("timeout", TIMEOUT),
            memory=parse_bytes(str(memory)) if memory is not None else None,
            l2=given.get("l2"),
            isa=isa,
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Asked:
        """The inverse of `as_dict`, from JSON.

        Raises:
            AttnbenchError: something is missing, or of another kind.
        """
        try:
            return msgspec.convert(values, cls)
        except msgspec.ValidationError:
            raise AttnbenchError("run.json does not say what the run was asked for; start a new run") from None


def _sweep(given: Given) -> Sweep:
    """Device and dtype stay open where they depend on the machine."""
    values: dict[str, Any] = dict(given)
    preset = values.get("preset")
    asked: dict[str, Any] = {name: as_sizes(values.get(name), name) for name in _SIZES}
    values["dtype"] = None if values.get("dtype") == "auto" else values.get("dtype")
    asked |= {name: as_names(values.get(name), name, known) for name, known in _NAMES.items()}
    asked |= {name: values.get(name) for name in _PLAIN}
    asked |= {"mask": as_masks(values.get("mask")), "softmax_scale": values.get("scale")}
    asked["style"] = "" if asked["style"] == "classic" else asked["style"]
    asked["inputs"], source = _inputs(values.get("inputs"))
    asked = {name: value for name, value in asked.items() if value is not None}
    if spec := values.get("batch_spec"):
        asked = _batch(spec, asked)
    if preset == STANDARD:
        if spec:
            raise AttnbenchError("--preset standard is one fixed sweep; drop --batch-spec")
        if fixed := sorted(asked.keys() & STANDARD_SWEEP.keys()):
            raise AttnbenchError(f"--preset standard is one fixed sweep; drop {flag(fixed[0])}")
        asked = dict(STANDARD_SWEEP)
    elif preset:
        shape = shape_of(preset)
        asked = {name: (getattr(shape, name),) for name in _SHAPE} | asked
    if source:
        sizes = (source.heads, source.kv_heads, source.head_dim, source.head_dim)
        own = {name: (size,) for name, size in zip(_SHAPE, sizes, strict=True)}
        asked = own | {"scope": "attention"} | ({} if source.causal else {"mask": ("full",)}) | asked
    threads = given.get("threads") or default_threads()
    return Sweep(**({"dtype": ()} | asked), device=given.get("device", "auto"), threads=threads)


def _batch(spec: str, asked: dict[str, Any]) -> dict[str, Any]:
    """What is asked for with a server's batch among it: decoding, and attention alone, unless something else is.

    Raises:
        AttnbenchError: the spec is malformed, or something else says the sizes too.
    """
    if clash := next((name for name in _SIZED_BY_BATCH if name in asked), None):
        raise AttnbenchError(f"--batch-spec says queries and keys of each entry; drop {flag(clash)}")
    if asked.get("scope", "attention") != "attention":
        raise AttnbenchError("--batch-spec is for attention alone: a block would compute what pads it; drop --scope")
    own = {name: value if name == "lengths" else (value,) for name, value in batches.fields(spec).items()}
    return {"phase": ("decode",), "scope": "attention", **asked, **own}


def _inputs(given: Names | None) -> tuple[str | None, Source | None]:
    """Ways of having inputs, joined by commas, and the model that some of them come from.

    Raises:
        AttnbenchError: there is no such way, or they come from two models, which no other sizes would fit.
    """
    if given is None:
        return None, None
    each = [part.strip() for part in (given.split(",") if isinstance(given, str) else given)]
    models = {named(name, INPUTS).source for name in each if name not in INPUTS}
    if len(models) > 1:
        both = " and ".join(sorted(source.model for source in models))
        raise AttnbenchError(f"--inputs {','.join(each)}: {both} have other heads than each other; give each a run")
    return ",".join(dict.fromkeys(each)), next(iter(models), None)


@dataclass(frozen=True)
class Settings:
    """How to measure; what is measured stands in the cells.

    baseline: canonical name of the plugin that speedups refer to; "" for none.
    precision: relative half-width at which an interval counts as converged.
    budget, timeout: seconds for the whole sweep, and for one cell.
    memory: bytes that may be in use at a time.
    ceilings: of this machine, if it was calibrated; what claims to be faster is wrong.
    l2: whether a GPU's L2 cache is "kept" or "flushed" before each call; "" where the device has no such choice.
    isa: what all kernels are held to, of `environment.ISAS`; for the record.
    reuse: one process serves one variant for all its workloads, as on a GPU, where it takes seconds to begin.
    at_once: threads of those asked for that run at the same time; None where the system does not say.
    machine: this one's name, for the record.
    look: rounds of the first look at a cell, where they fit; None for as many as an interval needs.
    later: share of the budget that is kept for further ones.
    part: share of the run's budget that this session has.
    """

    baseline: str
    precision: float
    budget: float
    timeout: float
    memory: int
    seed: int = 0
    ceilings: Ceilings | None = None
    l2: str = ""
    isa: str = "auto"
    reuse: bool = False
    at_once: int | None = None
    machine: str = ""
    look: int | None = None
    later: float = 0.4
    part: float = 1.0
