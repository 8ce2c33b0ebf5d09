"""A KV cache of `attnbench.cache` in a transformers model: what a decoder with this cache would have computed.

A text goes through in chunks. In each layer a chunk's keys and values join what is kept, then its queries read all of
it through the cache, their own chunk too, masked as if they had come one by one; then the cache lets go of what it does
not keep. With chunks of one token this is decoding token by token. With longer ones it is the same for every cache that
keeps a token as it arrives (floats, integers, TurboQuant) and for a window. Where tokens wait in full and go in groups
(KIVI; smoothed keys at first), queries of the chunk that completes a group see it quantized; H2O drops tokens at a
chunk's end only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache as once
from typing import Any

import torch
from torch import Tensor

from attnbench.cache import Kept, KVCache, State, kept_bytes
from attnbench.errors import AttnbenchError
from attnbench.hf import asked_in_vain

IMPLEMENTATION = "attnbench-cache"


class Reading:
    """A model that takes text in, a chunk at a time, with a cache of its own for each layer."""

    def __init__(self, model: Any, cache: KVCache, chunk: int) -> None:
        from transformers import Cache
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _attend)
        self._model, self._chunk = model, chunk
        layers = model.config.get_text_config().num_hidden_layers
        self.layers: list[_Layer] = [_layer_type()(cache) for _ in range(layers)]
        self._cache = Cache(layers=self.layers)

    def take(self, ids: Tensor) -> Tensor:
        """The next tokens, int64 (batch, n) -> what goes into the model's head for them: (batch, n, width)."""
        with _attending(self._model, self.layers):
            parts = [
                self._model.get_decoder()(input_ids=part, use_cache=True, **{_name(): self._cache}).last_hidden_state
                for part in ids.split(self._chunk, 1)  # type: ignore[no-untyped-call]
            ]
        return torch.cat(parts, 1)

    @property
    def bytes(self) -> int:
        """What is kept now, in all layers."""
        return sum(kept_bytes(layer.state) for layer in self.layers)

    @property
    def numbers(self) -> int:
        """Of keys and values that came so far, in all layers."""
        return sum(layer.numbers for layer in self.layers)


class _Layer:
    """What transformers asks a layer of its caches for; see `_layer_type`."""

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache
        self.state: State = None
        self.kept: Kept | None = None
        self.seen = 0
        self.numbers = 0

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """key (batch, kv_heads, new, head_dim), value (.., value_dim) join; what is read back, in their dtype."""
        if self.state is None:
            self.state = self.cache.start(key[:, :, :0], value[:, :, :0])
        self.state = self.cache.append(self.state, key, value)
        self.seen += key.shape[2]
        self.numbers += key.numel() + value.numel()
        self.kept = self.cache.read(self.state)
        return self.kept.key.to(key.dtype), self.kept.value.to(value.dtype)

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1  # no maximum


_RUNNING: ContextVar[list[_Layer]] = ContextVar("_RUNNING")


@contextmanager
def _attending(model: Any, layers: list[_Layer]) -> Iterator[None]:
    before, token = model.config._attn_implementation, _RUNNING.set(layers)
    model.set_attn_implementation(IMPLEMENTATION)
    try:
        yield
    finally:
        _RUNNING.reset(token)
        model.set_attn_implementation(before)


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: query (batch, heads, n, head_dim), key (batch, kv_heads, kept, head_dim),
    value (.., kept, value_dim) -> (batch, n, heads, value_dim). Softmax in float32, as its "eager" does it."""
    layer = _RUNNING.get()[module.layer_idx]
    if problem := "a mask of its own" if attention_mask is not None else asked_in_vain(module, dropout, kwargs):
        raise AttnbenchError(f"layer {module.layer_idx} ({type(module).__name__}) asks for {problem}")
    assert layer.kept is not None
    cache, positions, n = layer.cache, layer.kept.positions, query.shape[2]
    rows = torch.arange(layer.seen - n, layer.seen, device=query.device)[:, None]  # (n, 1)
    columns = torch.arange(layer.seen, device=query.device) if positions is None else positions[..., None, :]
    visible = columns <= rows  # (n, kept), or (batch, kv_heads, n, kept)
    if sliding_window:
        visible = visible & (columns > rows - sliding_window)
    if (more := cache.sees(rows, columns)) is not None:
        visible = visible & more
    shape = (*key.shape[:2], -1, n, key.shape[2])  # batch, kv_heads, group, n, kept
    scores = query.reshape(*key.shape[:2], -1, query.shape[-1]) @ key.mT  # (batch, kv_heads, group * n, kept)
    scores = scores.float().view(shape) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    hidden = ~visible if visible.ndim == 2 else ~visible[:, :, None]
    scores = scores.masked_fill(hidden, -torch.inf)
    if s_aux is not None:  # a logit of each head that takes part in the sum, and has no value
        sinks = s_aux.float().view(key.shape[1], -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, sinks), -1)
    weights = scores.softmax(-1)[..., : key.shape[2]]  # (batch, kv_heads, group, n, kept)
    layer.state = cache.settle(layer.state, weights.sum((2, 3)) if cache.weighs else None)
    layer.kept = None
    out = weights.to(value.dtype).flatten(2, 3) @ value  # (batch, kv_heads, group * n, value_dim)
    return out.view(query.shape[0], query.shape[1], n, -1).transpose(1, 2).contiguous(), None


@once
def _layer_type() -> type[_Layer]:
    """`_Layer` as transformers knows its layers; made late, as a class of a library that may be missing."""
    from transformers.cache_utils import CacheLayerMixin

    class Layer(_Layer, CacheLayerMixin):  # type: ignore[misc]
        def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
            """Nothing: `update` begins a layer."""

    return Layer


@once
def _name() -> str:
    """What a model's forward calls its cache: this was renamed."""
    import inspect

    from transformers import LlamaModel

    return "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"
