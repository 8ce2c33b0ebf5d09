"""Shapes of published models, each with where it was published. Loads no torch."""

from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from typing import Any

from attnbench.errors import AttnbenchError
from attnbench.sizes import STANDARD


@dataclass(frozen=True)
class Shape:
    """The attention of one layer.

    source: the paper, section or table that gives it.
    """

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    source: str


@dataclass(frozen=True)
class Model(Shape):
    """A dense transformer around it.

    layers: of the encoder, or of the decoder where there is no encoder. decoder_layers: beside an encoder's.
    width: d_m. d_ff: of the FFN, which has three matrices where `gated`, else two.
    vocabulary, positions, types: rows of the embeddings; `tied` where the output shares the vocabulary's.
    biases: of linear layers. norm: vectors of a norm, 2 for LayerNorm and 1 for RMSNorm. norms: those outside layers.
    qk_norm: RMSNorms of query and key heads. buckets: of relative positions, for each head of each stack.
    pooler: one more width x width layer.
    """

    layers: int
    width: int
    d_ff: int
    vocabulary: int
    decoder_layers: int = 0
    positions: int = 0
    types: int = 0
    gated: bool = False
    tied: bool = True
    biases: bool = True
    norm: int = 2
    norms: int = 1
    qk_norm: bool = False
    buckets: int = 0
    pooler: bool = False

    def parameters(self) -> int:
        """Every weight, bias, norm and embedding."""
        bias = int(self.biases)
        wide = (self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.value_dim)
        attention = sum(self._linear(self.width, outer) for outer in wide)
        attention += self._linear(self.heads * self.value_dim, self.width) + 2 * self.head_dim * self.qk_norm
        ffn = (1 + self.gated) * self._linear(self.width, self.d_ff) + self._linear(self.d_ff, self.width)
        norm = self.norm * self.width
        layer, cross = attention + ffn + 2 * norm, attention + norm
        stacks = self.layers * layer + self.decoder_layers * (layer + cross)
        rows = self.vocabulary * (1 if self.tied else 2) + self.positions + self.types
        relative = self.buckets * self.heads * (2 if self.decoder_layers else 1)
        pooler = self.pooler * (self.width + bias) * self.width
        return stacks + rows * self.width + self.norms * norm + relative + pooler

    def _linear(self, inner: int, outer: int) -> int:
        return inner * outer + self.biases * outer

    @property
    def depth(self) -> int:
        """Layers of both stacks."""
        return self.layers + self.decoder_layers


def _model(layers: int, width: int, heads: int, source: str, kv_heads: int | None = None, **others: Any) -> Model:
    """Heads that share the width out, and an FFN four times as wide where nothing else is said."""
    dim = width // heads
    return Model(
        heads, kv_heads or heads, dim, dim, source, layers=layers, width=width, **({"d_ff": 4 * width} | others)
    )


_gpt2 = partial(_model, source="Radford 2019, table 2; the released weights", vocabulary=50257, positions=1024)
_bert = partial(_model, vocabulary=30522, positions=512, types=2, pooler=True)
_devlin = partial(_bert, source="Devlin 2019, section 3; the released weights")
_vaswani = partial(_model, 6, source="Vaswani 2017, table 3", decoder_layers=6, vocabulary=37000, norms=0)
_raffel = "Raffel 2020, section 3.1.1 and appendix E"
_t5 = partial(_model, source=_raffel, vocabulary=32128, biases=False, norm=1, norms=2, buckets=32)
_llama = partial(_model, kv_heads=8, gated=True, tied=False, biases=False, norm=1)
_qwen = partial(_llama, source="Qwen team 2025, table 1; its config")

PRESETS: dict[str, Shape] = {
    "transformer-base": _vaswani(512, 8),
    "transformer-big": _vaswani(1024, 16),
    "bert-base": _devlin(12, 768, 12),
    "bert-large": _devlin(24, 1024, 16),
    "minilm-l6": _bert(6, 384, 12, "Wang 2020 (MiniLM); all-MiniLM-L6-v2's config"),
    "gpt2-small": _gpt2(12, 768, 12),
    "gpt2-medium": _gpt2(24, 1024, 16),
    "gpt2-large": _gpt2(36, 1280, 20),
    "gpt2-xl-1.5b": _gpt2(48, 1600, 25),
    "t5-small": _t5(6, 512, 8, decoder_layers=6),
    "t5-base": _t5(12, 768, 12, decoder_layers=12),
    "llama-3-8b": _llama(32, 4096, 32, "Llama team 2024, table 3", d_ff=14336, vocabulary=128256),
    "llama-3-70b": _llama(80, 8192, 64, "Llama team 2024, table 3", d_ff=28672, vocabulary=128256),
    "mistral-7b": _llama(32, 4096, 32, "Jiang 2023, table 1", d_ff=14336, vocabulary=32000),
    "qwen3-8b": _llama(
        36, 4096, 32, "Qwen team 2025, table 1; its config", d_ff=12288, vocabulary=151936, qk_norm=True
    ),
    "smollm2-135m": _llama(30, 576, 9, "Allal 2025; its config", kv_heads=3, d_ff=1536, vocabulary=49152, tied=True),
    # Multi-head latent attention: as trained, and as decoded, where each head reads the one latent.
    "mla": Shape(128, 128, 192, 128, "DeepSeek-AI 2024 (V2), section 3.1.2"),
    "mla-decode": Shape(128, 1, 576, 512, "DeepSeek-AI 2024 (V2), section 2.1.2, W_UK and W_UV absorbed"),
}


def preset(name: str) -> Shape:
    """The shape of this name. Raises: AttnbenchError: there is none; the message names the nearest."""
    if name not in PRESETS:
        near = get_close_matches(name, [*PRESETS, STANDARD], n=3, cutoff=0.4) or sorted(PRESETS)
        raise AttnbenchError(f"no preset {name!r}; there is: {', '.join(near)}")
    return PRESETS[name]
