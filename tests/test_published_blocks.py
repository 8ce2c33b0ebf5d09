"""The shared block with published models' weights against transformers' own layers: Llama's and BERT's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnbench import AttnbenchError

pytest.importorskip("transformers", reason="could not import 'transformers': pip install 'attnbench[models]'")

from transformers import BertConfig, BertModel, GPT2Config, GPT2Model, LlamaConfig, LlamaForCausalLM

from attnbench.models import blocks


def llama(**changes: Any) -> LlamaForCausalLM:
    sizes: dict[str, Any] = {
        "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 6,
        "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 128,
    }  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(sizes | changes))).eval()


def bert(**changes: Any) -> BertModel:
    sizes: dict[str, Any] = {
        "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 64,
        "max_position_embeddings": 128,
    }  # fmt: skip
    torch.manual_seed(0)
    return BertModel(BertConfig(**(sizes | changes)), add_pooling_layer=False).eval()


def shaken(model: Any) -> Any:
    """With noise on all weights: norms of 1 and biases of 0 would hide one that is left out or swapped."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def off(model: Any, ids: Tensor) -> float:
    """Relative L2 of the last hidden states."""
    with torch.no_grad():
        theirs = model.base_model(ids).last_hidden_state
    return float((blocks.last_hidden_state(model, ids) - theirs).norm() / theirs.norm())


@pytest.mark.parametrize(
    "model",
    [
        llama(),
        llama(num_key_value_heads=6),
        llama(rms_norm_eps=0.1, hidden_act="gelu"),
        llama(attention_bias=True, mlp_bias=True),
        llama(rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
        bert(),
        bert(hidden_act="relu", layer_norm_eps=0.1),
    ],
    ids=["llama", "llama-mha", "llama-eps", "llama-biases", "llama-theta", "bert", "bert-eps"],
)
def test_a_tiny_model_says_the_same(model: Any) -> None:
    assert off(shaken(model), torch.randint(64, (2, 100))) <= 1e-5


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (GPT2Model(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=8)), "llama or bert, not gpt2"),
        (llama(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}), "not by linear"),
        (llama(mlp_bias=True), "in all of its linear layers, or in none"),
        (llama(head_dim=16), "6 heads of 16 are not the model's width of 48"),
        (bert(hidden_act="gelu_new"), "not gelu_new"),
    ],
)
def test_what_the_block_lacks_is_refused(model: Any, says: str) -> None:
    with pytest.raises(AttnbenchError, match=says):
        blocks.blocks(model, 8)


@pytest.mark.parametrize("name", ["minilm", pytest.param("smollm2", marks=pytest.mark.slow)])
def test_a_published_model_says_the_same(name: str) -> None:
    """MiniLM's 6 encoder layers and SmolLM2's 30 decoder layers, in float32."""
    from attnbench.models import known, loading

    if command := known.find(name).missing:
        pytest.skip(f"could not import the model {name}: {command}")
    loaded = loading.load(name)
    ids = loaded.tokenizer("It was the best of times, it was the worst of times. " * 20, return_tensors="pt").input_ids
    assert ids.shape[1] > 200
    assert off(loaded.model, ids) <= 1e-4
    if not loaded.encoder:
        with torch.no_grad():
            theirs = loaded.model(ids).logits
            ours = loaded.model.lm_head(blocks.last_hidden_state(loaded.model, ids))
        assert float((ours - theirs).norm() / theirs.norm()) <= 1e-4
