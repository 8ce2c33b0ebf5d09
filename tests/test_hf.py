"""Variants as attention of transformers models: small random ones, against transformers' own eager attention."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from attnbench import AttnbenchError, Plugin
from attnbench.hf import register
from attnbench.registry import create

transformers = pytest.importorskip("transformers", reason="could not import 'transformers'")

SMALL = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128,
}  # fmt: skip
BERT = {name: SMALL[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
MIXED = ["sliding_attention", "full_attention"]
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", SMALL),
    "mistral": ("MistralConfig", "MistralForCausalLM", SMALL | {"sliding_window": 8}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", SMALL | {
        "sliding_window": 8, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 9,
    }),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", SMALL | {
        "sliding_window": 8, "layer_types": MIXED, "query_pre_attn_scalar": 30,
    }),
    "gpt-oss": ("GptOssConfig", "GptOssForCausalLM", SMALL | {
        "sliding_window": 8, "layer_types": MIXED, "num_local_experts": 2, "num_experts_per_tok": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }),
    "bert": ("BertConfig", "BertModel", BERT | {"num_attention_heads": 4}),
}  # fmt: skip
HONOURED = {
    "naive": ("llama", "mistral", "gemma2", "gemma3", "gpt-oss", "bert"),
    "tiled": ("llama", "mistral", "gemma2", "gemma3", "gpt-oss", "bert"),
    "sdpa": ("llama", "mistral", "gemma3", "bert"),
    "sdpa:backend=flash": ("llama",),
    "xformers": ("llama", "mistral", "bert"),
}
CASES = [(spec, name) for spec, names in HONOURED.items() for name in names]
LENGTH = 21


@cache
def model(name: str) -> Any:
    """Of random weights, sinks among them, in float32."""
    torch.manual_seed(0)
    config, kind, values = MODELS[name]
    made = getattr(transformers, kind)(getattr(transformers, config)(**values)).eval()
    for tensor_name, parameter in made.named_parameters():
        if tensor_name.endswith("sinks"):
            torch.nn.init.normal_(parameter)
    return made


def tokens(batch: int = 3) -> Tensor:
    return torch.randint(3, 99, (batch, LENGTH), generator=torch.Generator().manual_seed(1))


def padded(side: str) -> Tensor:
    """A mask of 1 where there is a token, for entries of 21, 14 and 4 tokens."""
    mask = torch.ones(3, LENGTH, dtype=torch.long)
    mask[1, 14:], mask[2, 4:] = 0, 0
    return mask.flip(1) if side == "left" else mask


def output(name: str, attention: str, **given: Any) -> Tensor:
    made = model(name)
    made.set_attn_implementation(attention)
    with torch.no_grad():
        found = made(tokens(), **given)
    out: Tensor = found.logits if "logits" in found else found.last_hidden_state
    return out


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize(("spec", "name"), CASES)
def test_the_output_is_that_of_eager_attention(spec: str, name: str, side: str) -> None:
    mask = None if side == "none" else padded(side)
    real = torch.ones(3, LENGTH, dtype=torch.bool) if mask is None else mask.bool()
    wanted, found = (output(name, kind, attention_mask=mask) for kind in ("eager", register(spec)))
    assert (found - wanted)[real].abs().max() < 1e-4
    assert found.isfinite().all()


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize(("spec", "name"), [case for case in CASES if case[1] != "bert"])
def test_it_generates_the_same_tokens_with_transformers_own_cache(spec: str, name: str, kind: str) -> None:
    made, found = model(name), []
    for attention in ("eager", register(spec)):
        made.set_attn_implementation(attention)
        given = {"attention_mask": padded("left"), "cache_implementation": kind, "disable_compile": True}
        found.append(made.generate(tokens(), do_sample=False, max_new_tokens=12, pad_token_id=0, **given))
    assert torch.equal(*found)


def test_a_chunk_of_a_prompt_continues_a_cache() -> None:
    made = model("llama")
    made.set_attn_implementation(register("tiled"))
    with torch.no_grad():
        past = made(tokens()[:, :13]).past_key_values
        found = made(tokens()[:, 13:], past_key_values=past).logits
    assert (found - output("llama", "eager")[:, 13:]).abs().max() < 1e-4


@pytest.mark.parametrize("spec", ["naive", "tiled"])
def test_it_trains_like_eager_attention(spec: str) -> None:
    made, found = model("mistral"), []
    for attention in ("eager", register(spec)):
        made.set_attn_implementation(attention)
        made.zero_grad()
        made(tokens(), labels=tokens()).loss.backward()
        found.append([parameter.grad for parameter in made.parameters()])
    made.zero_grad()
    assert all((a - b).abs().max() < 1e-4 for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("spec", "name", "given", "said"),
    [
        ("linear", "mistral", {}, "linear in layer 0 (MistralAttention): it has no window (attention 3x4/2x21x16"),
        ("linear", "gemma3", {}, "linear in layer 0 (Gemma3Attention): it has no scale and no window"),
        ("sdpa", "gemma2", {}, "sdpa in layer 0 (Gemma2Attention): it has no softcap"),
        ("int8", "gpt-oss", {}, "int8 in layer 0 (GptOssAttention): it has no sinks"),
        ("retention", "bert", {}, "retention in layer 0 (BertSelfAttention): "),
        ("ssd", "llama", {}, "ssd in layer 0 (LlamaAttention): it has gates"),
        ("naive", "llama", {"output_attentions": True}, "attention weights as output, which no variant gives"),
        ("naive", "llama", {"attention_mask": torch.ones(3, 1, LENGTH, LENGTH)}, "a mask that the model made"),
        ("naive", "llama", {"attention_mask": (torch.arange(LENGTH) % 5 > 0).expand(3, -1)}, "padding in the middle"),
        (
            "naive",
            "llama",
            {"position_ids": (torch.arange(LENGTH) % 7)[None], "use_cache": False},
            "neither full nor causal",
        ),
        ("naive", "llama", {"cu_seq_lens_q": torch.tensor([0, 5])}, "packs several sequences into one entry"),
    ],
)
def test_what_it_can_not_honour_is_a_line(spec: str, name: str, given: dict[str, Any], said: str) -> None:
    with pytest.raises(AttnbenchError) as caught:
        output(name, register(spec), **given)
    assert said in str(caught.value)
    assert str(caught.value).startswith(f"{spec} in layer 0 (")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "dropout", "said"),
    [("naive", 0.5, "dropout of 0.5 on the weights"), ("int8", 0.0, "it has no backward pass; call the model under")],
)
def test_what_training_can_not_have_is_a_line(spec: str, dropout: float, said: str) -> None:
    made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, attention_dropout=dropout)).train()
    made.set_attn_implementation(register(spec))
    with pytest.raises(AttnbenchError, match=said):
        made(tokens())


def test_the_example_of_the_page_runs(tmp_path: Path) -> None:
    page = Path(__file__).parents[1] / "docs/models.md"
    found_there = re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.M | re.S)
    (example,) = (block for block in found_there if "hf.register" in block)
    wanted = output("llama", "eager")
    model("llama").save_pretrained(tmp_path)
    found: dict[str, Any] = {}
    assert "path/to/model" in example
    exec(example.replace("path/to/model", str(tmp_path)), found)
    with torch.no_grad():
        assert (found["model"](tokens()).logits - wanted).abs().max() < 1e-4
    assert found["model"].config._attn_implementation == "attnbench-tiled"


def test_names() -> None:
    class Naive(Plugin):
        pass

    assert register("naive") == register("naive") == "attnbench-naive"
    # transformers takes a name with one of these words in it for its own attention, and has checks for it.
    name = register("sdpa:backend=flash")
    assert not any(word in name for word in ("flash", "flex", "sdpa", "eager"))
    one, other = register(create("int8:rows=32")), register(Naive())
    assert one == "attnbench-int8:rows=32:impl=auto"
    assert other == "attnbench-naive-2"
    with pytest.raises(AttnbenchError, match="no plugin is called 'nsive'"):
        register("nsive")
