"""What is computed: one `Workload`, and the `Sweep` of them that a command line asks for.

Nothing here loads torch: a sweep is parsed, checked and planned in milliseconds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from attnbench import batch as batches
from attnbench.activations import Activations, named
from attnbench.bias import BIASES, Bias
from attnbench.errors import AttnbenchError
from attnbench.mask import MASKS as MASKS
from attnbench.mask import Mask as Mask
from attnbench.style import STYLES, Style


@dataclass(frozen=True)
class DeviceKind:
    """What a device is to whoever predicts and judges; `devices` has a file of the same name that measures on it.

    host: it computes with the host's threads. tf32: what is asked for in float32 may be multiplied in TF32.
    """

    host: bool = False
    tf32: bool = False


@dataclass(frozen=True)
class Phase:
    """What sort of pass over the tokens a call is.

    past: its tokens join others that were seen before and are kept in a state. backward: the output's gradient comes
    in, and gradients of all inputs go out; each product then needs two more, one for the gradient of each factor.
    without: what is said of a variant that can't. products: whose products `attnbench theory` lists, in a few words.
    """

    past: bool = False
    backward: bool = False
    without: str = ""
    products: str = ""


DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes an element
DEVICES: Mapping[str, DeviceKind] = {"cpu": DeviceKind(host=True), "cuda": DeviceKind(tf32=True)}
PHASES: Mapping[str, Phase] = {
    "forward": Phase(),
    "decode": Phase(
        past=True,
        without="it cannot add tokens to a past",
        products="decoding: keys and values of the past are there",
    ),
    "train": Phase(
        backward=True,
        without="it has no backward pass",
        products="the forward pass; the backward one has two more products for each, for the gradients of its factors",
    ),
}
SCOPES = ("attention", "block")
BLOCKS = ("encoder", "decoder", "decoder-only")
NORMS = ("pre", "post")
INPUTS = ("normal", "outlier")


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

    mask: "full", "causal", "window:512" for causal with no more than 512 keys a query, or in phase decode "tree:2x3" of
        drafts, each of which sees the past and its ancestors; `masked` is it as an object.
    softmax_scale: what scores are multiplied with; 0 for 1 / sqrt(head_dim). `scale` has the number.
    softcap: scores s become softcap * tanh(s / softcap) before the mask (Gemma 2, arXiv 2408.00118); 0 for as they are.
    bias: added to scores by distance, behind the softcap: "alibi" or "relative"; see `biased`. Not in cross-attention.
    sinks: softmax sums over one more logit for each head, which has no value, so that a query may attend to nothing
        (gpt-oss; Xiao 2023, arXiv 2309.17453). The logits come as a last input, (heads,). Forward attention alone.
    style: of the block, of `STYLES`; "" for classic. `styled` is it as an object.
    layers: blocks stacked on each other; 1 for attention alone.
    lengths: of a ragged batch, the keys of each entry, such as "512,300"; tensors are padded behind them to kv_seq.
        Where seq and kv_seq are the same, an entry has as many queries; what is put out behind them is 0.
        Or a server's batch, such as "q2k_8q1s1k", whose entries have queries and keys of their own: see `of_batch`.
    inputs: "normal", "outlier", or a layer of a model whose activations they are: see `activations`.

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
    softmax_scale: float = 0.0
    softcap: float = 0.0
    bias: str = ""
    sinks: bool = False
    phase: str = "forward"
    scope: str = "attention"
    block: str = ""
    norm: str = ""
    style: str = ""
    layers: int = 1
    lengths: str = ""
    inputs: str = "normal"
    seed: int = 0
    threads: int = 1

    def __post_init__(self) -> None:
        for name in ("batch", "heads", "kv_heads", "seq", "kv_seq", "head_dim", "value_dim", "layers", "threads"):
            if getattr(self, name) < 1:
                raise AttnbenchError(f"{flag(name)} must be at least 1, not {getattr(self, name)}")
        for name, known in (
            ("dtype", tuple(DTYPES)),
            ("device", DEVICES),
            ("phase", PHASES),
            ("scope", SCOPES),
            ("block", BLOCKS if self.scope == "block" else ("",)),
            ("norm", NORMS if self.scope == "block" else ("",)),
            ("bias", ("", *BIASES)),
            ("style", ("", *STYLES) if self.scope == "block" else ("",)),
        ):
            if getattr(self, name) not in known:
                raise AttnbenchError(f"{flag(name)} must be one of {', '.join(known)}, not {getattr(self, name)!r}")
        if self.activations and self.scope != "attention":
            raise AttnbenchError(f"--inputs {self.inputs} go into attention, not into a block: use --scope attention")
        mask = Mask.parse(self.mask)
        self._check_scores()
        self._check_tree(mask)
        if self.heads % self.kv_heads:
            raise AttnbenchError(
                f"--heads must be a multiple of --kv-heads: {self.heads} heads cannot share {self.kv_heads} kv heads"
            )
        if self.scope == "block" and self._is_self_attention and self.kv_seq != self.seq:
            raise AttnbenchError(
                f"--block {self.block} is self-attention: --kv-seq must equal --seq ({self.kv_seq} is not {self.seq})"
            )
        own_keys = self.block != "decoder" or self.decodes
        if mask.causal and self.kv_seq < self.seq and own_keys:
            raise AttnbenchError(
                f"a causal mask needs --kv-seq >= --seq: with {self.kv_seq} keys the first of {self.seq} queries "
                "would see none"
            )
        if self.layers > 1 and self.scope != "block":
            raise AttnbenchError("--layers is for --scope block")
        if self.decodes and self.block == "encoder":
            raise AttnbenchError(
                "--block encoder sees all tokens at once and decodes none; use decoder-only or decoder"
            )
        if batches.is_spec(self.lengths):
            self._check_batch()
        elif self.lengths:
            self._check_lengths()

    def _check_scores(self) -> None:
        for name, value in (("scale", self.softmax_scale), ("softcap", self.softcap)):
            if not (math.isfinite(value) and value >= 0):
                raise AttnbenchError(f"--{name} must be above 0, not {value}; 0 is for none of its own")
        if self.sinks and (self.scope != "attention" or self.phase != "forward" or self.lengths):
            raise AttnbenchError("sinks are for attention alone, phase forward, in batches that are not ragged")
        if self.masked.window and self.block == "decoder":
            raise AttnbenchError("--block decoder has masks of its own; --mask window:N is for the other blocks")

    def _check_tree(self, mask: Mask) -> None:
        if mask.tree and self.bias:
            raise AttnbenchError(
                "--bias goes by how far tokens lie from each other, which a tree's order does not tell"
            )
        if mask.tree and (not self.decodes or self.scope != "attention" or self.seq != mask.nodes):
            raise AttnbenchError(
                f"--mask {self.mask} is of a decoding step of its {mask.nodes} nodes, attention alone: --phase decode "
                f"--seq {mask.nodes} --kv-seq KEYS"
            )

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

    def _check_batch(self) -> None:
        own = batches.fields(self.lengths)
        if wrong := [name for name in ("batch", "seq", "kv_seq") if getattr(self, name) != own[name]]:
            raise AttnbenchError(f"--batch-spec {self.lengths!r} has {flag(wrong[0])} {own[wrong[0]]}")
        if self.scope == "block" or self.trains:
            raise AttnbenchError("--batch-spec is for attention alone, in the phases decode and forward")
        if not self.is_causal or self.masked.tree:
            raise AttnbenchError("--batch-spec is of tokens in their order: --mask causal or window:N")

    @classmethod
    def of_batch(cls, spec: str, **values: Any) -> Workload:
        """A server's batch, such as "q2k_8q1s1k": prompts, chunks of them and decoding steps beside each other.

        Tensors are padded to the most queries and keys of an entry. In phase decode, which it is in unless `values` say
        otherwise, each entry's queries bring the last of its keys with them; forward, all keys come with the call.

        Raises:
            AttnbenchError: the spec is malformed (see `batch`), or no workload has these values.
        """
        return cls(**({"phase": "decode", "mask": "causal"} | values | batches.fields(spec)))

    @property
    def _is_square(self) -> bool:
        return self.seq == self.kv_seq and not self.decodes

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Queries and keys of each entry of a ragged batch; empty where all are alike."""
        if batches.is_spec(self.lengths):
            return batches.parse(self.lengths)
        each = [int(n) for n in self.lengths.split(",")] if self.lengths else []
        return tuple((n if self._is_square else self.seq, n) for n in each)

    def entries(self) -> list[Workload]:
        """Each batch entry of a ragged batch as a problem of its own; otherwise the whole as it is."""
        if not self.lengths:
            return [self]
        made = {own: self.replace(batch=1, lengths="", seq=own[0], kv_seq=own[1]) for own in set(self.sizes)}
        return [made[own] for own in self.sizes]

    @property
    def styled(self) -> Style:
        return STYLES[self.style or "classic"]

    @property
    def activations(self) -> Activations | None:
        """Of which model's layer the inputs are; None where they are drawn. Raises: AttnbenchError: of neither."""
        return None if self.inputs in INPUTS else named(self.inputs, INPUTS)

    @property
    def window(self) -> int:
        """Tokens of the windows of text that a model's activations are of; 0 where inputs are drawn."""
        found = self.activations
        return found.window(max(self.seq, self.kv_seq), self.decodes) if found else 0

    @property
    def is_tiled(self) -> bool:
        """Whether inputs go on longer than their model does, and so are its longest windows over and over."""
        found = self.activations
        return found is not None and max(self.seq, self.kv_seq) > found.source.longest

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
    def masked(self) -> Mask:
        return Mask.parse(self.mask)

    @property
    def biased(self) -> Bias | None:
        return Bias(self.bias, self.heads, self.is_causal, self.seed) if self.bias else None

    @property
    def is_causal(self) -> bool:
        """Whether a query sees keys up to its own position alone; with a window not all of those."""
        return self.mask != "full"

    @property
    def beyond(self) -> tuple[str, ...]:
        """What it asks for beyond plain attention, in the words of `Plugin.honours`.

        A window that hides nothing, a tree that is a chain, and a scale that is the usual one, ask for nothing.
        """
        asked = {
            "scale": self.softmax_scale not in (0.0, self.head_dim**-0.5),
            "window": 0 < self.masked.window < self.kv_seq,
            "tree": self.masked.branches,
            "softcap": self.softcap > 0,
            "sinks": self.sinks,
            f"{self.bias}-bias": self.bias != "",
        }
        return tuple(name for name, is_asked in asked.items() if is_asked)

    @property
    def is_plain(self) -> bool:
        """Whether it is one pass of attention alone."""
        return self.scope == "attention" and not (self.decodes or self.trains)

    @property
    def decodes(self) -> bool:
        return PHASES[self.phase].past

    @property
    def trains(self) -> bool:
        return PHASES[self.phase].backward

    @property
    def on_host(self) -> bool:
        return DEVICES[self.device].host

    @property
    def past(self) -> int:
        """Tokens whose keys and values were there before: of a decoding step those that its queries don't bring.

        Of a ragged batch, those of the entry that has most.
        """
        if not self.decodes:
            return 0
        if batches.is_spec(self.lengths):
            return max(keys - queries for queries, keys in self.sizes)
        return self.offset if self.is_causal or self.scope == "block" else self.kv_seq

    @property
    def new(self) -> int:
        """Tokens whose keys and values a call brings; of a ragged batch, those of the entry that brings most."""
        return self.seq if self.decodes and batches.is_spec(self.lengths) else self.kv_seq - self.past

    @property
    def _is_self_attention(self) -> bool:
        return self.block != "decoder" and not self.decodes

    @property
    def group(self) -> int:
        """Query heads that share one key/value head; more than 1 is grouped-query attention."""
        return self.heads // self.kv_heads

    @property
    def scale(self) -> float:
        """What the scores are multiplied with: 1 / sqrt(head_dim) (Vaswani 2017, equation 1), or `softmax_scale`."""
        return self.softmax_scale or float(self.head_dim**-0.5)

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
        """The inverse of `as_dict`; keys that are no field of a workload are left out, and what is None."""
        return cls(**{f.name: values[f.name] for f in fields(cls) if values.get(f.name) is not None})

    def label(self) -> str:
        """A short name for people, such as "attention 1x8x4096x64 float32 causal"."""
        block = f"{self.style} {self.block}".strip()
        what = self.scope if self.scope == "attention" else f"{block} block ({self.norm}-norm)"
        what += f" x {self.layers}" if self.layers > 1 else ""
        what = what if self.phase == "forward" else f"{self.phase} {what}"
        heads = str(self.heads) if self.group == 1 else f"{self.heads}/{self.kv_heads}"
        seq = str(self.seq) if self.kv_seq == self.seq else f"{self.seq}->{self.kv_seq}"
        mixed = batches.is_spec(self.lengths)
        size = f"{self.lengths} {heads}" if mixed else f"{self.batch}x{heads}x{seq}"
        dim = str(self.head_dim) if self.value_dim == self.head_dim else f"{self.head_dim}/{self.value_dim}"
        tail = "" if self.inputs == "normal" else f" {self.inputs} inputs{' (tiled)' if self.is_tiled else ''}"
        tail += f" lengths {self.lengths}" if self.lengths and not mixed else ""
        tail += f" scale {self.softmax_scale:g}" if self.softmax_scale else ""
        tail += f" softcap {self.softcap:g}" if self.softcap else ""
        tail += f" {self.bias} bias" if self.bias else ""
        tail += " sinks" if self.sinks else ""
        return f"{what} {size}x{dim} {self.dtype} {self.mask}{tail}"


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")
