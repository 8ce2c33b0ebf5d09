"""The shared transformer block: the same weights and layers around every attention variant.

    encoder        x -> self-attention -> FFN                                     (BERT)
    decoder        x -> causal self-attention -> cross-attention over memory -> FFN   (Vaswani 2017, T5)
    decoder-only   x -> causal self-attention -> FFN                              (GPT, LLaMA)

Each arrow is a sub-layer with its residual and norm, before it (pre-norm) or after it (post-norm). A stack is
several blocks, each on the output of the one before. What else models differ in is a block's `Style`.

Decoding, a block gets the new tokens alone: its attention callables know the past. The memory of a decoder's
cross-attention is such a past, so that no token of it is new.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnbench.errors import AttnbenchError
from attnbench.plugin import Call
from attnbench.style import STYLES, Style
from attnbench.theory.costs import attentions
from attnbench.workload import Workload

__all__ = ["Block", "FeedForward", "MultiHead", "Stack", "Sublayer", "attentions", "draw_weights", "rotated"]
_BIAS_STD = 0.02
_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}


def rotated(x: Tensor, base: float, start: int = 0) -> Tensor:
    """Rotary position embedding (Su 2021, equation 34): x (batch, heads, length, head_dim), the first at place `start`.

    Dimension i of the first half and of the second turn together by place * base^(-2i / head_dim), as LLaMA pairs them.
    """
    *_, length, dim = x.shape
    # In float64, where a place of thousands leaves digits for the angle.
    places = torch.arange(start, start + length, dtype=torch.float64, device=x.device)
    pace = base ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=x.device) / dim)
    angles = torch.outer(places, pace).repeat(1, 2)  # (length, head_dim)
    first, second = x.chunk(2, -1)  # (batch, heads, length, head_dim / 2) each
    turned = torch.cat([-second, first], -1)  # (batch, heads, length, head_dim)
    # x stands first, so that what comes out lies in memory as x does.
    return x * angles.cos().to(x.dtype) + turned * angles.sin().to(x.dtype)


class MultiHead(nn.Module):
    """Multi-head attention (Vaswani 2017, section 3.2.2) around any attention callable.

    With kv_heads < heads, W_K and W_V are narrower and each of their heads serves a group of query heads (grouped-query
    attention, Ainslie 2023). The callable gets views that are not contiguous, as a transformer hands them on. The gates
    that a variant has, as `Plugin.gates` says, are projected from each token like keys.

    style: as `Block`; only self-attention turns queries and keys by their places, of which decoding the past has some.
    """

    def __init__(
        self, workload: Workload, attend: Call, gates: Sequence[int] = (), style: Style = STYLES["classic"]
    ) -> None:
        super().__init__()
        w, biases = workload, style.biases
        self.heads, self.kv_heads = w.heads, w.kv_heads
        self.rope, self.start = style.rope, w.past
        self.attend = partial(attend)  # an nn.Module would add its own parameters to the block's
        self.W_Q = nn.Linear(w.width, w.heads * w.head_dim, biases)
        self.W_K = nn.Linear(w.width, w.kv_heads * w.head_dim, biases)
        self.W_V = nn.Linear(w.width, w.kv_heads * w.value_dim, biases)
        self.W_O = nn.Linear(w.heads * w.value_dim, w.width, biases)
        self.W_G = nn.ModuleList(nn.Linear(w.width, w.kv_heads * n) for n in gates)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        """x (batch, seq, width), memory (batch, kv_seq, width) or None for self-attention -> (batch, seq, width)."""
        query = self.W_Q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (batch, heads, seq, head_dim)
        key, *others = self.tokens(x if memory is None else memory)
        if self.rope and memory is None:
            query, key = (rotated(each, self.rope, self.start) for each in (query, key))
        mixed = self.attend(query, key, *others)  # (batch, heads, seq, value_dim)
        out: Tensor = self.W_O(mixed.transpose(1, 2).flatten(-2))  # (batch, seq, width)
        return out

    def tokens(self, source: Tensor) -> list[Tensor]:
        """source (batch, kv_seq, width) -> key, value and gates, each (batch, kv_heads, kv_seq, n)."""
        projections = (self.W_K, self.W_V, *self.W_G)
        return [W(source).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2) for W in projections]


class FeedForward(nn.Module):
    """f(x W_1 + b_1) W_2 + b_2 (Vaswani 2017, equation 2); gated (f(x W_1) * x W_3) W_2. The style says the rest."""

    def __init__(self, width: int, style: Style = STYLES["classic"]) -> None:
        super().__init__()
        hidden, biases = style.hidden(width), style.biases
        self.activation = _ACTIVATIONS[style.activation]
        self.W_1 = nn.Linear(width, hidden, biases)
        self.W_2 = nn.Linear(hidden, width, biases)
        self.W_3 = nn.Linear(width, hidden, biases) if style.gated else None

    def forward(self, x: Tensor) -> Tensor:
        inner = self.activation(self.W_1(x))  # (batch, seq, d_ff)
        if self.W_3 is not None:
            inner = inner * self.W_3(x)
        out: Tensor = self.W_2(inner)  # (batch, seq, width)
        return out


class Sublayer(nn.Module):
    """A layer with its residual connection and norm.

    "post": norm(x + layer(x)) (Vaswani 2017, section 5.4). "pre": x + layer(norm(x)) (Xiong 2020), what GPT-2 does.
    """

    def __init__(self, width: int, norm: str, layer: nn.Module, style: Style = STYLES["classic"]) -> None:
        super().__init__()
        self.pre = norm == "pre"
        self.norm = norm_of(width, style)
        self.layer = layer

    def forward(self, x: Tensor, *memory: Tensor, rows: Tensor | None = None) -> Tensor:
        """x (batch, seq, width) -> (batch, seq, width).

        rows: int64 (n,), the positions at which `layer` answers where it answers at those only, as the reference does.
        """
        kept = x if rows is None else x[:, rows]  # (batch, n, width)
        if self.pre:
            out: Tensor = kept + self.layer(self.norm(x), *memory)
        else:
            out = self.norm(kept + self.layer(x, *memory))
        return out


def norm_of(width: int, style: Style) -> nn.Module:
    """Over the last dimension of (batch, seq, width)."""
    return (nn.RMSNorm if style.rms else nn.LayerNorm)(width, eps=style.eps)


class Block(nn.Module):
    """One transformer block, with d_m = heads * head_dim = `workload.width`.

    Args:
        workload: of scope "block".
        attention: the callable for each problem of `attentions(workload)`: "self", and for a decoder "cross".
        weights: a block's `state_dict` to use, in any dtype and on any device; None: `draw_weights`, in the workload's.
        gates: for each problem what `Plugin.gates` says; nothing for those left out.
        style: what its layers are, whose weights have the same names in all; None: the workload's.

    Raises:
        AttnbenchError: the workload is of scope attention, or `attention` has other names than `attentions(workload)`.
    """

    def __init__(
        self,
        workload: Workload,
        attention: Mapping[str, Call],
        weights: Mapping[str, Tensor] | None = None,
        gates: Mapping[str, Sequence[int]] = MappingProxyType({}),
        style: Style | None = None,
    ) -> None:
        super().__init__()
        if workload.scope != "block":
            raise AttnbenchError(f"a block needs a workload of scope block, not {workload.scope}")
        inside = attentions(workload)
        if attention.keys() != inside.keys():
            raise AttnbenchError(
                f"attention is needed for {', '.join(inside)}, not for {', '.join(attention) or 'none'}"
            )
        width, norm = workload.width, workload.norm
        self.gates, self.style, self.decodes = gates, style or workload.styled, workload.decodes
        style = self.style
        with torch.device("meta"):  # shapes alone: neither memory nor torch's random state is touched
            layers = {
                name: MultiHead(part, attention[name], gates.get(name, ()), style) for name, part in inside.items()
            }
            self.self_attention = Sublayer(width, norm, layers["self"], style)
            self.cross_attention = Sublayer(width, norm, layers["cross"], style) if "cross" in inside else None
            self.ffn = Sublayer(width, norm, FeedForward(width, style), style)
        self.load_state_dict(weights if weights is not None else draw_weights(self, workload), assign=True)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        """x (batch, seq, width), and for a decoder memory (batch, kv_seq, width) -> (batch, seq, width).

        Decoding, a decoder takes no memory: it has it.

        Raises:
            AttnbenchError: memory is missing, or given to a block that has no cross-attention.
        """
        if self.decodes and self.cross_attention is not None and memory is None:
            memory = x[:, :0]
        if (memory is None) != (self.cross_attention is None):
            raise AttnbenchError("a decoder block takes x and memory, the others take x alone")
        x = self.self_attention(x)
        if self.cross_attention is not None:
            x = self.cross_attention(x, memory)
        out: Tensor = self.ffn(x)
        return out


class Stack(nn.Module):
    """`workload.layers` blocks, each with weights of its own and its own attention callables.

    attention, weights: for each layer what `Block` takes. gates, style: of all.
    """

    def __init__(
        self,
        workload: Workload,
        attention: Sequence[Mapping[str, Call]],
        gates: Mapping[str, Sequence[int]] = MappingProxyType({}),
        weights: Sequence[Mapping[str, Tensor]] | None = None,
        style: Style | None = None,
    ) -> None:
        super().__init__()
        seeded = (workload.replace(layers=1, seed=workload.seed + layer) for layer in range(workload.layers))
        drawn: list[Mapping[str, Tensor] | None] = [None] * workload.layers
        each = zip(seeded, attention, weights or drawn, strict=True)
        self.blocks = nn.ModuleList(Block(w, calls, given, gates, style) for w, calls, given in each)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        """As `Block.forward`; every layer of a decoder attends to the same memory."""
        for block in self.blocks:
            x = block(x, memory)
        return x


def draw_weights(block: Block, workload: Workload) -> dict[str, Tensor]:
    """Weights for every parameter of `block`, from `workload.seed` alone: every plugin measures the same block.

    Drawn in float32 on the CPU, then cast to the workload's dtype and moved to its device. A matrix is
    N(0, 1 / fan_in), so that normalised activations become queries and keys of unit variance, as in scope attention.
    Biases are N(0, 0.02^2) rather than 0, so that a lost one shows. LayerNorms are 1 and 0. Those of gates, which not
    every variant has, come last, so that they change no other.
    """
    generator = torch.Generator().manual_seed(workload.seed)
    weights: dict[str, Tensor] = {}
    for name, parameter in sorted(block.named_parameters(), key=lambda named: ".W_G." in named[0]):
        if ".norm." in name:
            values = torch.full(parameter.shape, 1.0 if name.endswith("weight") else 0.0)
        else:
            std = parameter.shape[1] ** -0.5 if parameter.ndim == 2 else _BIAS_STD  # a matrix is (fan_out, fan_in)
            values = torch.randn(parameter.shape, generator=generator).mul_(std)
        weights[name] = values.to(workload.device, getattr(torch, workload.dtype))
    return weights
