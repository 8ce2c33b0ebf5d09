"""A published model's layers as attnbench's own blocks: the same weights around any attention variant.

What the shared block computes can so be checked against the model's own outputs. For a worker: it loads torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from attnbench.errors import AttnbenchError
from attnbench.plugin import Call
from attnbench.style import Style
from attnbench.task.transformer import Stack
from attnbench.theory.costs import attentions
from attnbench.workload import Workload


class _Kind(NamedTuple):
    """Of a family of models: what its blocks are, and what transformers calls the parts of one layer.

    layer: where layers lie, with their number left out. names: ours and theirs.
    """

    block: str
    norm: str
    mask: str
    layer: str
    names: Mapping[str, str]


_KINDS: Mapping[str, _Kind] = {
    "llama": _Kind(
        "decoder-only",
        "pre",
        "causal",
        "layers.{}",
        {
            "self_attention.layer.W_Q": "self_attn.q_proj",
            "self_attention.layer.W_K": "self_attn.k_proj",
            "self_attention.layer.W_V": "self_attn.v_proj",
            "self_attention.layer.W_O": "self_attn.o_proj",
            "self_attention.norm": "input_layernorm",
            "ffn.layer.W_1": "mlp.gate_proj",
            "ffn.layer.W_2": "mlp.down_proj",
            "ffn.layer.W_3": "mlp.up_proj",
            "ffn.norm": "post_attention_layernorm",
        },
    ),
    "bert": _Kind(
        "encoder",
        "post",
        "full",
        "encoder.layer.{}",
        {
            "self_attention.layer.W_Q": "attention.self.query",
            "self_attention.layer.W_K": "attention.self.key",
            "self_attention.layer.W_V": "attention.self.value",
            "self_attention.layer.W_O": "attention.output.dense",
            "self_attention.norm": "attention.output.LayerNorm",
            "ffn.layer.W_1": "intermediate.dense",
            "ffn.layer.W_2": "output.dense",
            "ffn.norm": "output.LayerNorm",
        },
    ),
}


def exact(workload: Workload) -> Call:
    """torch's own attention, for self-attention over all tokens."""
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=workload.is_causal, enable_gqa=True)


def blocks(model: Any, seq: int, batch: int = 1, attend: Callable[[Workload], Call] = exact) -> Stack:
    """The layers of a transformers model, (batch, seq, width) -> (batch, seq, width), in the model's dtype on the CPU.

    model: LlamaForCausalLM, BertModel, or what such a one is around. attend: the attention of every layer.

    Raises:
        AttnbenchError: the model is of another family, or has what the block lacks.
    """
    kind, style = _kind(model), style_of(model)
    config, weights = model.config, model.base_model.state_dict()
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    if heads * dim != config.hidden_size:
        raise AttnbenchError(f"{heads} heads of {dim} are not the model's width of {config.hidden_size}")
    workload = Workload(
        seq=seq, kv_seq=seq, batch=batch, heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads, head_dim=dim, value_dim=dim,
        dtype=str(model.dtype).removeprefix("torch."), mask=kind.mask, scope="block", block=kind.block, norm=kind.norm,
        layers=layers,
    )  # fmt: skip
    given = [_weights(weights, kind, style, kind.layer.format(i)) for i in range(layers)]
    call = attend(attentions(workload)["self"])
    return Stack(workload, [{"self": call}] * layers, weights=given, style=style)


def last_hidden_state(model: Any, ids: Tensor, attend: Callable[[Workload], Call] = exact) -> Tensor:
    """What the model's layers and its last norm make of tokens, by attnbench's blocks.

    ids: int64 (batch, seq), without padding. Embeddings, and the norm behind LLaMA's layers, are the model's own.

    Returns:
        (batch, seq, width), as `model(ids).last_hidden_state`; of a model for causal language modelling what goes into
        its head.
    """
    base, (batch, seq) = model.base_model, ids.shape
    with torch.no_grad():
        x = base.embed_tokens(ids) if hasattr(base, "embed_tokens") else base.embeddings(ids)
        x = blocks(model, seq, batch, attend)(x)
        out: Tensor = base.norm(x) if hasattr(base, "norm") else x
    return out


def style_of(model: Any) -> Style:
    """The layers' style, from a model's configuration.

    Raises:
        AttnbenchError: it asks for what the block does not do.
    """
    _kind(model)
    config = model.config
    if config.model_type == "bert":
        return Style(
            activation=_activation(config.hidden_act), eps=config.layer_norm_eps, d_ff=config.intermediate_size
        )
    rope = config.rope_parameters
    if rope.get("rope_type", "default") != "default":
        raise AttnbenchError(f"the block turns queries and keys by plain RoPE, not by {rope['rope_type']}")
    if config.attention_bias != config.mlp_bias:
        raise AttnbenchError("the block has biases in all of its linear layers, or in none")
    return Style(
        rope=rope["rope_theta"],
        rms=True,
        eps=config.rms_norm_eps,
        activation=_activation(config.hidden_act),
        gated=True,
        biases=config.attention_bias,
        d_ff=config.intermediate_size,
    )


def _activation(name: str) -> str:
    if name not in ("relu", "gelu", "silu"):
        raise AttnbenchError(f"the block's FFN knows relu, gelu and silu, not {name}")
    return name


def _kind(model: Any) -> _Kind:
    name = model.config.model_type
    if name not in _KINDS:
        raise AttnbenchError(f"the block can be {' or '.join(_KINDS)}, not {name}")
    return _KINDS[name]


def _weights(theirs: Mapping[str, Tensor], kind: _Kind, style: Style, layer: str) -> dict[str, Tensor]:
    """Of one layer, by the names that they have in a `Block`."""

    def kinds(ours: str) -> tuple[str, ...]:
        bare = style.rms if ours.endswith(".norm") else not style.biases
        return ("weight",) if bare else ("weight", "bias")

    return {
        f"{ours}.{each}": theirs[f"{layer}.{name}.{each}"].detach()
        for ours, name in kind.names.items()
        for each in kinds(ours)
    }
