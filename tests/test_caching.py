"""KV caches in transformers models: scoring a text in chunks says what decoding with the cache would have said."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from attnbench.cache import KVCache
from attnbench.registry import create_cache

transformers = pytest.importorskip("transformers", reason="could not import 'transformers'")

from attnbench.models.caching import IMPLEMENTATION, Reading, _name  # noqa: E402

SIZES = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "initializer_range": 0.3,
}  # fmt: skip
MODELS = {
    "llama": ("Llama", {}),
    "window": ("Mistral", {"sliding_window": 12}),
    "softcap, mixed": ("Gemma2", {"sliding_window": 12, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 9}),
    "sinks": (
        "GptOss",
        {
            "sliding_window": 12,
            "layer_types": ["sliding_attention", "full_attention"],
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
        },
    ),
    "mixed": ("Gemma3", {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"]}),
}
LENGTH = 40


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def tiny(name: str = "llama") -> Any:
    family, more = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}TextConfig" if family == "Gemma3" else f"{family}Config")
    model = getattr(transformers, f"{family}ForCausalLM")(config(**SIZES, **more))
    model.set_attn_implementation("eager")
    return model.eval()


def text() -> Tensor:
    return torch.randint(0, SIZES["vocab_size"], (2, LENGTH), generator=torch.Generator().manual_seed(1))


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("chunk", [1, 7, LENGTH])
def test_an_exact_cache_changes_nothing(name: str, chunk: int) -> None:
    model, ids = tiny(name), text()
    reading = Reading(model, create_cache("exact"), chunk)
    assert apart(reading.take(ids), model.get_decoder()(input_ids=ids).last_hidden_state) < 1e-5
    assert model.config._attn_implementation == "eager" != IMPLEMENTATION
    numbers = 2 * SIZES["num_hidden_layers"] * 2 * SIZES["num_key_value_heads"] * LENGTH * SIZES["head_dim"]
    assert (reading.numbers, reading.bytes) == (numbers, 4 * numbers)


class _Step(transformers.DynamicCache):  # type: ignore[misc]
    """Decoding token by token, written down once more: each step makes the cache anew from all exact tokens so far."""

    def __init__(self, cache: KVCache) -> None:
        super().__init__()
        self._judged, self._all = cache, {}  # type: ignore[var-annotated]

    def update(self, key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        before = self._all.get(layer, (key[:, :, :0], value[:, :, :0]))
        whole = self._all[layer] = tuple(torch.cat(pair, 2) for pair in zip(before, (key, value), strict=True))
        state = self._judged.start(key[:, :, :0], value[:, :, :0])
        for i in range(whole[0].shape[2]):
            state = self._judged.settle(self._judged.append(state, *(x[:, :, i : i + 1] for x in whole)), None)
        kept = self._judged.read(state)
        return kept.key.to(key.dtype), kept.value.to(value.dtype)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._all[layer_idx][0].shape[2] if layer_idx in self._all else 0

    def get_mask_sizes(self, length: int, layer_idx: int) -> tuple[int, int]:
        return self.get_seq_length(layer_idx) + length, 0


def step_by_step(model: Any, cache: KVCache, ids: Tensor) -> Tensor:
    """One query sees all that is kept, so that no mask is needed: sdpa gets none."""
    model.set_attn_implementation("sdpa")
    past, decoder = {_name(): _Step(cache)}, model.get_decoder()
    steps = (decoder(input_ids=ids[:, i : i + 1], use_cache=True, **past) for i in range(ids.shape[1]))
    return torch.cat([step.last_hidden_state for step in steps], 1)


ALIKE = ("bf16", "fp8", "int8", "int4:group=8:rotate=true", "turboquant:bits=3", "window:size=10:sinks=2")


@pytest.mark.parametrize("spec", [*ALIKE, "kivi:bits=2:group=4:residual=8", "int8:smooth=true"])
def test_chunks_of_one_are_decoding_token_by_token(spec: str) -> None:
    model, ids = tiny(), text()
    reading = Reading(model, create_cache(spec), 1)
    found = reading.take(ids)
    assert apart(found, step_by_step(model, create_cache(spec), ids)) < 1e-5
    exact = model.get_decoder()(input_ids=ids).last_hidden_state
    assert apart(found, exact) > 1e-4  # or the cache would be no part of it


@pytest.mark.parametrize("spec", ALIKE)
@pytest.mark.parametrize("chunk", [7, LENGTH])
def test_longer_chunks_say_the_same(spec: str, chunk: int) -> None:
    """In caches that keep a token as it arrives, and in a window, whatever the chunk."""
    model, ids = tiny(), text()
    found, alone = (Reading(model, create_cache(spec), n).take(ids) for n in (chunk, 1))
    assert apart(found, alone) < 1e-5


def test_h2o_keeps_what_the_model_attends_to() -> None:
    """Weights that come from the model's own attention: with room for all but one token, the least attended goes."""
    model, ids = tiny(), text()[:1]
    reading = Reading(model, create_cache(f"h2o:size={LENGTH - 1}:recent=4"), LENGTH)
    reading.take(ids)
    weights = model(input_ids=ids, output_attentions=True).attentions
    for layer, seen in zip(reading.layers, weights, strict=True):
        total = seen.sum(2).unflatten(1, (SIZES["num_key_value_heads"], -1)).sum(2)[0, :, :-4]  # (kv_heads, older)
        kept = layer.cache.read(layer.state).positions
        assert kept is not None
        for head in range(SIZES["num_key_value_heads"]):
            assert {*range(LENGTH)} - {*kept[0, head].tolist()} == {int(total[head].argmin())}
