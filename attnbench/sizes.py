"""The grammar of sizes that a command line and a notebook share, and the `Sweep` of workloads that they ask for."""

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from random import Random
from typing import Any, Self, TypeAlias

from attnbench.activations import named
from attnbench.errors import AttnbenchError
from attnbench.style import STYLES
from attnbench.workload import INPUTS, PHASES, SCOPES, Mask, Workload, flag

STANDARD = "standard"
STANDARD_VERSION = 1
STANDARD_SWEEP: dict[str, tuple[int | str, ...] | str | float | None] = {
    "seq": (512, 1024, 2048, 4096, 8192), "kv_seq": None, "batch": (1,), "tokens": None, "heads": (8,),
    "kv_heads": None, "head_dim": (64,), "value_dim": None, "dtype": ("bfloat16",), "mask": ("full", "causal"),
    "softmax_scale": 0.0, "softcap": 0.0, "bias": "",
    "phase": ("forward",), "scope": None, "block": None, "norm": "pre", "style": "", "layers": (1,), "lengths": "",
    "inputs": "normal", "seed": 0,
}  # fmt: skip
"""The one sweep by which two machines are compared. Whoever changes it counts STANDARD_VERSION up."""
DEFAULT_SEQ = (512, 1024, 2048, 4096, 8192, 16384)
# Without an explicit scope the block is measured up to here: beyond it attention alone tells the story.
DEFAULT_BLOCK_LIMIT = 4096
_AXES = ("phase", "batch", "heads", "head_dim", "dtype", "mask", "seq", "kv_seq", "kv_heads", "value_dim", "lengths")
_RANGE = re.compile(r"(\d+)\.\.(\d+)(?:\+(\d+))?")
_MAX_VALUES = 10_000


def parse_sizes(text: str, name: str = "seq") -> tuple[int, ...]:
    """Sizes in the command line's grammar, in the order given, each once.

    "512..16384" doubles, "512..4096+512" steps, "512,1000,4096" lists; parts joined by commas combine.

    Raises:
        AttnbenchError: the text is malformed, or a range does not hit its end.
    """
    values: list[int] = []
    for part in text.split(","):
        part = part.strip()
        if part.isascii() and part.isdigit():
            values.append(_positive(part, name))
            continue
        match = _RANGE.fullmatch(part) if part.isascii() else None
        if not match:
            raise AttnbenchError(
                f"{flag(name)} {text!r}: {part!r} is no size; write 512, 512..4096 (doubling), "
                "512..4096+512 (steps) or a list with commas"
            )
        start, end = _positive(match[1], name), _positive(match[2], name)
        values.extend(_expand(start, end, _positive(match[3], name) if match[3] else None, name))
    return tuple(dict.fromkeys(values))


Sizes: TypeAlias = str | int | Sequence[int]
"""One size, several, or a text in the command line's grammar."""

Names: TypeAlias = str | Sequence[str]
"""Names, or a text that lists them with commas."""


def as_sizes(given: Sizes | None, name: str) -> tuple[int, ...] | None:
    """Raises: AttnbenchError: see `parse_sizes`."""
    if given is None or isinstance(given, str):
        return None if given is None else parse_sizes(given, name)
    return parse_sizes(",".join(map(str, [given] if isinstance(given, int) else given)), name)


def as_masks(given: Names | None) -> tuple[str, ...] | None:
    """Each once, in the order given. Raises: AttnbenchError: one is no mask."""
    masks = given if given is None or not isinstance(given, str) else re.split(r",(?!\s*\d)", given)  # not in a tree
    masks = None if masks is None else tuple(dict.fromkeys(part.strip() for part in masks))
    for each in masks or ():
        Mask.parse(each)
    return masks


def as_names(given: Names | None, name: str, known: Sequence[str]) -> tuple[str, ...] | None:
    """Each once, in the order given. Raises: AttnbenchError: a name is not among those known."""
    if given is None:
        return None
    names = tuple(dict.fromkeys(part.strip() for part in (given.split(",") if isinstance(given, str) else given)))
    for each in names:
        if each not in known:
            raise AttnbenchError(f"{flag(name)} {','.join(names)!r}: {each!r} is none of {', '.join(known)}")
    return names


def _positive(digits: str, name: str) -> int:
    if len(digits) > 12 or not (value := int(digits)):
        raise AttnbenchError(f"{flag(name)} must be between 1 and 999999999999, not {digits[:24]}")
    return value


def _expand(start: int, end: int, step: int | None, name: str) -> list[int]:
    if end < start:
        raise AttnbenchError(f"{flag(name)} {start}..{end} runs backwards; write {end}..{start}")
    if step is None:
        values = [start]
        while values[-1] < end:
            values.append(values[-1] * 2)
        how, before = "doubling", values[-1] // 2
    else:
        if (end - start) // step >= _MAX_VALUES:
            raise AttnbenchError(f"{flag(name)} {start}..{end}+{step} has over {_MAX_VALUES} values")
        values = list(range(start, end + step, step))
        how, before = f"steps of {step}", values[-1] - step
    if values[-1] != end:
        raise AttnbenchError(
            f"{flag(name)} {start}..{end}: {how} from {start} does not hit {end}; nearest are {before} and {values[-1]}"
        )
    return values


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12} | {
    f"{prefix}I": 1024 ** (power + 1) for power, prefix in enumerate("KMGT")
}


def parse_bytes(text: str, name: str = "memory") -> int:
    """A number of bytes from "16GiB", "16GB", "512M" or "1000000".

    Raises:
        AttnbenchError: the text is no size in bytes.
    """
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,6})?)\s*([KMGT]?I?)B?\s*", text.upper(), re.ASCII)
    if not match or match[2] not in _UNITS or not (value := int(float(match[1]) * _UNITS[match[2]])):
        raise AttnbenchError(f"{flag(name)} {text!r} is no amount of memory; write 16GiB, 16GB or 512M")
    return value


def precision_or_auto(text: str) -> float | None:
    """As `parse_precision`; None for "auto". Raises: AttnbenchError: it is neither."""
    return None if text.strip() == "auto" else parse_precision(text)


def parse_rate(text: str, name: str, example: str) -> float:
    """Bytes or operations a second from "450GB/s", "989TFLOP/s" or "989T"; of which kind, the example says.

    Raises:
        AttnbenchError: the text is no such rate.
    """
    unit = "FLOPS?" if "FLOP" in example else "B"
    match = re.fullmatch(rf"\s*([\d.]+\s*[KMGT]?I?)({unit})?(/S)?\s*", text.upper(), re.ASCII)
    try:
        return float(parse_bytes(match[1] if match else "", name))
    except AttnbenchError:
        raise AttnbenchError(f"{flag(name)} {text!r} is no rate; write {example}") from None


def parse_precision(text: str, option: str = "precision") -> float:
    """A relative half-width from "2%" or "0.02".

    Raises:
        AttnbenchError: the text is no fraction above 0 and below 1.
    """
    match = re.fullmatch(r"\s*(\d{1,9}\.?\d{0,9}|\.\d{1,9})\s*(%?)\s*", text, re.ASCII)
    value = float(match[1]) / (100 if match[2] else 1) if match else 0.0
    if not 0 < value < 1:
        raise AttnbenchError(f"--{option} {text!r} is no share; write 2% or 0.02")
    return value


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Every workload that one run asks for: the product of its axes, each workload once.

    `None` follows another axis: kv_seq follows seq, kv_heads follows heads, value_dim follows head_dim; mask is causal,
    as in a language model, but full for an encoder or where there are fewer keys than queries; block is encoder where
    a mask without a window is asked for, else decoder-only, and so it is in phase decode. Phase decode adds one token,
    or a mask's tree, to a past unless both seq and kv_seq are given: either one alone is the number of keys. seq is
    `DEFAULT_SEQ` otherwise. scope None is attention at every length and the block up to `DEFAULT_BLOCK_LIMIT`.
    tokens: a batch of so many tokens in all at each length, instead of `batch`.
    inputs: one way or several with commas, to each of which every problem is put.
    lengths "drawn" are drawn for each workload from the seed, evenly up to kv_seq, which the first entry has.
    """

    seq: tuple[int, ...] | None = None
    kv_seq: tuple[int, ...] | None = None
    batch: tuple[int, ...] = (1,)
    tokens: int | None = None
    heads: tuple[int, ...] = (8,)
    kv_heads: tuple[int, ...] | None = None
    head_dim: tuple[int, ...] = (64,)
    value_dim: tuple[int, ...] | None = None
    dtype: tuple[str, ...] = ("float32",)
    mask: tuple[str, ...] | None = None
    softmax_scale: float = 0.0
    softcap: float = 0.0
    bias: str = ""
    phase: tuple[str, ...] = ("forward",)
    scope: str | None = None
    block: str | None = None
    norm: str = "pre"
    style: str = ""
    layers: tuple[int, ...] = (1,)
    lengths: str = ""
    inputs: str = "normal"
    device: str = "cpu"
    seed: int = 0
    threads: int = 1

    @classmethod
    def of(cls, w: Workload) -> Self:
        """The sweep of one workload."""
        sizes = (
            "seq",
            "kv_seq",
            "batch",
            "heads",
            "kv_heads",
            "head_dim",
            "value_dim",
            "layers",
            "dtype",
            "mask",
            "phase",
        )
        same = ("scope", "softmax_scale", "softcap", "bias", "lengths", "inputs", "device", "seed", "threads")
        values: dict[str, Any] = {name: (getattr(w, name),) for name in sizes} | {
            name: getattr(w, name) for name in same
        }
        return cls(**values, block=w.block or None, norm=w.norm or "pre", style=w.style)

    @property
    def standard(self) -> int | None:
        """The version of the standard sweep, where this is it."""
        is_standard = all(getattr(self, name) == value for name, value in STANDARD_SWEEP.items())
        return STANDARD_VERSION if is_standard else None

    def workloads(self) -> list[Workload]:
        """The workloads, shortest first, so that costs of short ones foretell those of long ones.

        Raises:
            AttnbenchError: a combination of sizes is no workload (see `Workload`), or the scope is unknown.
        """
        if self.scope not in (None, *SCOPES, "all"):
            raise AttnbenchError(f"--scope must be one of {', '.join(SCOPES)}, all, not {self.scope!r}")
        if self.style not in ("", *STYLES):
            raise AttnbenchError(f"--style must be one of {', '.join(STYLES)}, not {self.style!r}")
        sizes = (self.seq or DEFAULT_SEQ, self.kv_seq, self.batch, self.heads, self.kv_heads)
        axes = (*sizes, self.head_dim, self.value_dim, self.dtype, self.mask, self.phase, self.layers)
        count = prod(len(axis or (0,)) for axis in axes)
        if count > _MAX_VALUES:
            raise AttnbenchError(f"the sizes combine to {count} workloads, over {_MAX_VALUES}; give fewer")
        cells = dict.fromkeys(itertools.chain.from_iterable(self._scoped(w) for w in self._attention()))
        return sorted(cells, key=_size)

    def _attention(self) -> Iterator[Workload]:
        names = ("softmax_scale", "softcap", "bias", "device", "seed", "threads")
        same: dict[str, Any] = {name: getattr(self, name) for name in names}
        outer = (self.phase, self.batch, self.heads, self.head_dim, self.dtype, self.inputs.split(","))
        for phase, batch, heads, head_dim, dtype, inputs in itertools.product(*outer):
            inner = (self._masks(phase), self.kv_heads or (heads,), self.value_dim or (head_dim,))
            for (mask, seq, kv_seq), kv_heads, value_dim in itertools.product(*inner):
                if self.tokens:
                    batch = self._entries(max(seq, kv_seq))
                lengths = self._drawn(batch, seq, kv_seq) if self.lengths == "drawn" else self.lengths
                # A decoder block brings its own masks: causal over itself, full over the encoder's output.
                own_masks = self.scope == "block" and self._block(phase) != "encoder"
                shown = mask if not own_masks or mask not in ("full", "causal") else "full"
                own = (phase, batch, heads, head_dim, dtype, shown, seq, kv_seq, kv_heads, value_dim, lengths)
                values: dict[str, Any] = dict(zip(_AXES, own, strict=True))
                if inputs not in INPUTS:
                    named(inputs, INPUTS).check(heads, kv_heads, head_dim, value_dim)
                yield Workload(**values, **same, inputs=inputs)

    def _masks(self, phase: str) -> list[tuple[str, int, int]]:
        """(mask, seq, kv_seq) for each mask and length."""
        lengths = self._lengths(phase)
        if self.mask:
            nodes = {mask: Mask.parse(mask).nodes if _decodes(phase) and not self._both else 0 for mask in self.mask}
            return [(mask, nodes[mask] or seq, keys) for mask in self.mask for seq, keys in lengths]
        encodes = self.block == "encoder" and not _decodes(phase)
        return [("full" if encodes or keys < queries else "causal", queries, keys) for queries, keys in lengths]

    def _lengths(self, phase: str) -> list[tuple[int, int]]:
        """(seq, kv_seq) for each length."""
        if _decodes(phase) and not self._both:
            return [(1, keys) for keys in self.kv_seq or self.seq or DEFAULT_SEQ]
        return [(seq, keys) for seq in self.seq or DEFAULT_SEQ for keys in self.kv_seq or (seq,)]

    @property
    def _both(self) -> bool:
        """Whether queries and keys are given."""
        return self.seq is not None and self.kv_seq is not None

    def _entries(self, length: int) -> int:
        """The batch that has `tokens` tokens."""
        assert self.tokens is not None
        if self.batch != (1,):
            raise AttnbenchError("--tokens sets the batch for each length; drop --batch")
        if self.tokens % length:
            raise AttnbenchError(f"--tokens {self.tokens} is no multiple of the length {length}")
        return self.tokens // length

    def _drawn(self, batch: int, seq: int, kv_seq: int) -> str:
        random = Random(f"{self.seed} {batch} {kv_seq}")
        least = min(seq, kv_seq) if seq != kv_seq else 1
        return ",".join(str(n) for n in (kv_seq, *(random.randint(least, kv_seq) for _ in range(batch - 1))))

    def _block(self, phase: str) -> str:
        windowed = any(Mask.parse(mask).window for mask in self.mask or ())
        return self.block or ("decoder-only" if _decodes(phase) or windowed or not self.mask else "encoder")

    def _scoped(self, attention: Workload) -> Iterator[Workload]:
        if self.scope != "block":
            yield attention
        block = self._block(attention.phase)
        fits = block == "decoder" or attention.decodes or attention.kv_seq == attention.seq
        short = max(attention.seq, attention.kv_seq) <= DEFAULT_BLOCK_LIMIT
        fits = fits and not attention.masked.tree
        if self.scope in ("block", "all") or (self.scope is None and short and fits):
            mask = attention.mask if block == "encoder" or attention.masked.window else "causal"
            own = {"scope": "block", "block": block, "norm": self.norm, "style": self.style, "mask": mask}
            for layers in self.layers:
                yield attention.replace(**own, layers=layers)


@dataclass(frozen=True, kw_only=True)
class Listed(Sweep):
    """Workloads that are no product of axes, such as drawn ones; they have `device` and `threads` in common."""

    listed: tuple[Workload, ...]

    def workloads(self) -> list[Workload]:
        return sorted(dict.fromkeys(self.listed), key=_size)


def _size(w: Workload) -> tuple[int, ...]:
    return list(PHASES).index(w.phase), w.batch * w.heads * w.seq * w.kv_seq, SCOPES.index(w.scope), w.layers


def _decodes(phase: str) -> bool:
    return phase in PHASES and PHASES[phase].past  # a workload says which phases there are
