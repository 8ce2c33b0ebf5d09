"""What is computed: one `Workload`, and the `Sweep` of them that a command line asks for.

Nothing here loads torch: a sweep is parsed, checked and planned in milliseconds.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from math import prod
from random import Random
from typing import Any

from attnbench.errors import AttnbenchError

DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes an element
DEVICES = ("cpu", "cuda")
MASKS = ("full", "causal")
PHASES = ("forward", "decode", "train")
SCOPES = ("attention", "block")
BLOCKS = ("encoder", "decoder", "decoder-only")
NORMS = ("pre", "post")
INPUTS = ("normal", "outlier")

DEFAULT_SEQ = (512, 1024, 2048, 4096, 8192, 16384)

# Without an explicit scope the block is measured up to here: beyond it attention alone tells the story.
DEFAULT_BLOCK_LIMIT = 4096


def usable_cores() -> int:
    """Cores that this process may run on (its affinity, not what the machine has)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One attention problem. With a plugin's canonical name it is the key of every result.

    Tensors are laid out as in `torch.nn.functional.scaled_dot_product_attention`:
    query (batch, heads, seq, head_dim), key (batch, kv_heads, kv_seq, head_dim),
    value (batch, kv_heads, kv_seq, value_dim), output (batch, heads, seq, value_dim).

    A causal mask is aligned bottom-right: the last query sees the last key (see `offset`).

    Phases: "forward" is one pass over all tokens. "train" is that pass and its backward one. "decode" adds tokens to a
    past that was seen before: with a causal mask the `seq` queries bring the last `seq` of the kv_seq keys with them,
    with a full one all keys are of the past, as in cross-attention over an encoder's output.

    layers: blocks stacked on each other; 1 for attention alone.
    lengths: of a ragged batch, the keys of each entry, such as "512,300"; tensors are padded behind them to kv_seq.
        Where seq and kv_seq are the same, an entry has as many queries; what is put out behind them is 0.

    Raises:
        AttnbenchError: a size is not positive, heads are no multiple of kv_heads, a name is unknown,
            a causal mask would leave a query without any key, an encoder is asked to decode, or lengths do not fit.
    """

    seq: int
    kv_seq: int
    batch: int = 1
    heads: int = 8
    kv_heads: int = 8
    head_dim: int = 64
    value_dim: int = 64
    dtype: str = "float32"
    device: str = "cpu"
    mask: str = "full"
    phase: str = "forward"
    scope: str = "attention"
    block: str = ""
    norm: str = ""
    layers: int = 1
    lengths: str = ""
    inputs: str = "normal"
    seed: int = 0
    threads: int = 1

    def __post_init__(self) -> None:
        for name in ("batch", "heads", "kv_heads", "seq", "kv_seq", "head_dim", "value_dim", "layers", "threads"):
            if getattr(self, name) < 1:
                raise AttnbenchError(f"{_flag(name)} must be at least 1, not {getattr(self, name)}")
        for name, known in (
            ("dtype", tuple(DTYPES)),
            ("device", DEVICES),
            ("mask", MASKS),
            ("phase", PHASES),
            ("scope", SCOPES),
            ("inputs", INPUTS),
            ("block", BLOCKS if self.scope == "block" else ("",)),
            ("norm", NORMS if self.scope == "block" else ("",)),
        ):
            if getattr(self, name) not in known:
                raise AttnbenchError(f"{_flag(name)} must be one of {', '.join(known)}, not {getattr(self, name)!r}")
        if self.heads % self.kv_heads:
            raise AttnbenchError(
                f"--heads must be a multiple of --kv-heads: {self.heads} heads cannot share {self.kv_heads} kv heads"
            )
        own_keys = self.block != "decoder" or self.phase == "decode"
        if self.mask == "causal" and self.kv_seq < self.seq and own_keys:
            raise AttnbenchError(
                f"a causal mask needs --kv-seq >= --seq: with {self.kv_seq} keys the first of {self.seq} queries "
                "would see none"
            )
        if self.layers > 1 and self.scope != "block":
            raise AttnbenchError("--layers is for --scope block")
        if self.phase == "decode" and self.block == "encoder":
            raise AttnbenchError(
                "--block encoder sees all tokens at once and decodes none; use decoder-only or decoder"
            )
        if self.scope == "block" and self._is_self_attention and self.kv_seq != self.seq:
            raise AttnbenchError(
                f"--block {self.block} is self-attention: --kv-seq must equal --seq ({self.kv_seq} is not {self.seq})"
            )

        if self.lengths:
            self._check_lengths()

    def _check_lengths(self) -> None:
        given = [int(n) if n.isascii() and n.isdigit() else 0 for n in self.lengths.split(",")]
        least = 1 if self._is_square or not self.is_causal else self.seq
        if len(given) != self.batch or not all(least <= n <= self.kv_seq for n in given):
            raise AttnbenchError(
                f"--lengths {self.lengths!r}: a batch of {self.batch} needs as many, from {least} to {self.kv_seq}"
            )
        if self.block == "decoder":
            raise AttnbenchError(
                "--lengths is for self-attention or cross-attention, not for --block decoder with both"
            )

    @property
    def _is_square(self) -> bool:
        return self.seq == self.kv_seq and self.phase != "decode"

    def entries(self) -> list[Workload]:
        """Each batch entry of a ragged batch as a problem of its own; otherwise the whole as it is."""
        if not self.lengths:
            return [self]
        each = [int(n) for n in self.lengths.split(",")]
        return [self.replace(batch=1, lengths="", kv_seq=n, seq=n if self._is_square else self.seq) for n in each]

    @property
    def shapes(self) -> tuple[tuple[int, int, int, int], ...]:
        """Of query, key and value."""
        kv = (self.batch, self.kv_heads, self.kv_seq)
        return (self.batch, self.heads, self.seq, self.head_dim), (*kv, self.head_dim), (*kv, self.value_dim)

    @property
    def offset(self) -> int:
        """Causal: query i sees key j where j <= i + offset."""
        return self.kv_seq - self.seq

    @property
    def is_causal(self) -> bool:
        return self.mask == "causal"

    @property
    def past(self) -> int:
        """Tokens whose keys and values were there before: of a decoding step those that its queries don't bring."""
        if self.phase != "decode":
            return 0
        return self.offset if self.is_causal or self.scope == "block" else self.kv_seq

    @property
    def _is_self_attention(self) -> bool:
        return self.block != "decoder" and self.phase != "decode"

    @property
    def group(self) -> int:
        """Query heads that share one key/value head; more than 1 is grouped-query attention."""
        return self.heads // self.kv_heads

    @property
    def scale(self) -> float:
        """What the scores are multiplied with: 1 / sqrt(head_dim) (Vaswani 2017, equation 1)."""
        return float(self.head_dim**-0.5)

    @property
    def width(self) -> int:
        """The block's model dimension, d_m = heads * head_dim."""
        return self.heads * self.head_dim

    @property
    def itemsize(self) -> int:
        """Bytes an element."""
        return DTYPES[self.dtype]

    def replace(self, **changes: Any) -> Workload:
        return replace(self, **changes)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Workload:
        """The inverse of `as_dict`; keys that are no field of a workload are left out."""
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})

    def label(self) -> str:
        """A short name for people, such as "attention 1x8x4096x64 float32 causal"."""
        what = self.scope if self.scope == "attention" else f"{self.block} block ({self.norm}-norm)"
        what += f" x {self.layers}" if self.layers > 1 else ""
        what = what if self.phase == "forward" else f"{self.phase} {what}"
        heads = str(self.heads) if self.group == 1 else f"{self.heads}/{self.kv_heads}"
        seq = str(self.seq) if self.kv_seq == self.seq else f"{self.seq}->{self.kv_seq}"
        dim = str(self.head_dim) if self.value_dim == self.head_dim else f"{self.head_dim}/{self.value_dim}"
        tail = "" if self.inputs == "normal" else f" {self.inputs} inputs"
        tail += f" lengths {self.lengths}" if self.lengths else ""
        return f"{what} {self.batch}x{heads}x{seq}x{dim} {self.dtype} {self.mask}{tail}"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


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
                f"{_flag(name)} {text!r}: {part!r} is no size; write 512, 512..4096 (doubling), "
                "512..4096+512 (steps) or a list with commas"
            )
        start, end = _positive(match[1], name), _positive(match[2], name)
        values.extend(_expand(start, end, _positive(match[3], name) if match[3] else None, name))
    return tuple(dict.fromkeys(values))


def _positive(digits: str, name: str) -> int:
    if len(digits) > 12 or not (value := int(digits)):
        raise AttnbenchError(f"{_flag(name)} must be between 1 and 999999999999, not {digits[:24]}")
    return value


def _expand(start: int, end: int, step: int | None, name: str) -> list[int]:
    if end < start:
        raise AttnbenchError(f"{_flag(name)} {start}..{end} runs backwards; write {end}..{start}")
    if step is None:
        values = [start]
        while values[-1] < end:
            values.append(values[-1] * 2)
        how, before = "doubling", values[-1] // 2
    else:
        if (end - start) // step >= _MAX_VALUES:
            raise AttnbenchError(f"{_flag(name)} {start}..{end}+{step} has over {_MAX_VALUES} values")
        values = list(range(start, end + step, step))
        how, before = f"steps of {step}", values[-1] - step
    if values[-1] != end:
        raise AttnbenchError(
            f"{_flag(name)} {start}..{end}: {how} from {start} does not hit {end}; "
            f"nearest are {before} and {values[-1]}"
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
        raise AttnbenchError(f"{_flag(name)} {text!r} is no amount of memory; write 16GiB, 16GB or 512M")
    return value


def parse_precision(text: str) -> float:
    """A relative half-width from "2%" or "0.02".

    Raises:
        AttnbenchError: the text is no fraction above 0 and below 1.
    """
    match = re.fullmatch(r"\s*(\d{0,9}\.?\d{0,9})\s*(%?)\s*", text, re.ASCII)
    try:
        value = float(match[1]) / (100 if match[2] else 1) if match else 0.0
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise AttnbenchError(f"--precision {text!r} is no precision; write 2% or 0.02")
    return value


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Every workload that one run asks for: the product of its axes, each workload once.

    `None` follows another axis: kv_seq follows seq, kv_heads follows heads, value_dim follows head_dim; mask is full,
    and causal in phase decode; block is encoder, and decoder-only in phase decode. Phase decode adds one token to a
    past unless both seq and kv_seq are given: either one alone is the number of keys. seq is `DEFAULT_SEQ` otherwise.
    scope None is attention at every length and the block up to `DEFAULT_BLOCK_LIMIT`.
    tokens: a batch of so many tokens in all at each length, instead of `batch`.
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
    phase: tuple[str, ...] = ("forward",)
    scope: str | None = None
    block: str | None = None
    norm: str = "pre"
    layers: tuple[int, ...] = (1,)
    lengths: str = ""
    inputs: str = "normal"
    device: str = "cpu"
    seed: int = 0
    threads: int = 1

    def workloads(self) -> list[Workload]:
        """The workloads, shortest first, so that costs of short ones foretell those of long ones.

        Raises:
            AttnbenchError: a combination of sizes is no workload (see `Workload`), or the scope is unknown.
        """
        if self.scope not in (None, *SCOPES, "all"):
            raise AttnbenchError(f"--scope must be one of {', '.join(SCOPES)}, all, not {self.scope!r}")
        axes = (
            self.seq or DEFAULT_SEQ,
            self.kv_seq,
            self.batch,
            self.heads,
            self.kv_heads,
            self.head_dim,
            self.value_dim,
        )
        count = prod(len(axis or (0,)) for axis in (*axes, self.dtype, self.mask, self.phase, self.layers))
        if count > _MAX_VALUES:
            raise AttnbenchError(f"the sizes combine to {count} workloads, over {_MAX_VALUES}; give fewer")
        cells = dict.fromkeys(itertools.chain.from_iterable(self._scoped(w) for w in self._attention()))
        return sorted(cells, key=_size)

    def _attention(self) -> Iterator[Workload]:
        outer = (self.phase, self.batch, self.heads, self.head_dim, self.dtype)
        for phase, batch, heads, head_dim, dtype in itertools.product(*outer):
            masks = self.mask or ("causal" if phase == "decode" else "full",)
            inner = (masks, self._lengths(phase), self.kv_heads or (heads,), self.value_dim or (head_dim,))
            for mask, (seq, kv_seq), kv_heads, value_dim in itertools.product(*inner):
                if self.tokens:
                    batch = self._entries(max(seq, kv_seq))
                lengths = self._drawn(batch, seq, kv_seq) if self.lengths == "drawn" else self.lengths
                yield Workload(
                    lengths=lengths,
                    batch=batch,
                    heads=heads,
                    kv_heads=kv_heads,
                    seq=seq,
                    kv_seq=kv_seq,
                    head_dim=head_dim,
                    value_dim=value_dim,
                    dtype=dtype,
                    # A decoder block brings its own masks: causal over itself, full over the encoder's output.
                    mask=mask if self.scope != "block" or self._block(phase) == "encoder" else "full",
                    phase=phase,
                    device=self.device,
                    inputs=self.inputs,
                    seed=self.seed,
                    threads=self.threads,
                )

    def _lengths(self, phase: str) -> list[tuple[int, int]]:
        """(seq, kv_seq) for each length."""
        if phase == "decode" and (self.seq is None or self.kv_seq is None):
            return [(1, keys) for keys in self.kv_seq or self.seq or DEFAULT_SEQ]
        return [(seq, keys) for seq in self.seq or DEFAULT_SEQ for keys in self.kv_seq or (seq,)]

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
        return self.block or ("decoder-only" if phase == "decode" else "encoder")

    def _scoped(self, attention: Workload) -> Iterator[Workload]:
        if self.scope != "block":
            yield attention
        block = self._block(attention.phase)
        fits = block == "decoder" or attention.phase == "decode" or attention.kv_seq == attention.seq
        short = max(attention.seq, attention.kv_seq) <= DEFAULT_BLOCK_LIMIT
        if self.scope in ("block", "all") or (self.scope is None and short and fits):
            mask = attention.mask if block == "encoder" else "causal"
            for layers in self.layers:
                yield attention.replace(scope="block", block=block, norm=self.norm, mask=mask, layers=layers)


def _size(w: Workload) -> tuple[int, ...]:
    return PHASES.index(w.phase), w.batch * w.heads * w.seq * w.kv_seq, SCOPES.index(w.scope), w.layers
