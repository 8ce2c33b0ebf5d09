"""Shapes of published models, each with where it was published. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

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
        attention = (
            self._linear(self.width, self.heads * self.head_dim)
            + self._linear(self.width, self.kv_heads * self.head_dim)
            + self._linear(self.width, self.kv_heads * self.value_dim)
            + self._linear(self.heads * self.value_dim, self.width)
            + 2 * self.head_dim * self.qk_norm
        )
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


def _gpt2(layers: int, width: int) -> Model:
    heads = width // 64
    return Model(
        heads, heads, 64, 64, "Radford 2019, table 2; the released weights",
        layers=layers, width=width, d_ff=4 * width, vocabulary=50257, positions=1024,
    )  # fmt: skip


def _bert(layers: int, width: int, heads: int, source: str) -> Model:
    dim = width // heads
    return Model(
        heads, heads, dim, dim, source,
        layers=layers, width=width, d_ff=4 * width, vocabulary=30522, positions=512, types=2, pooler=True,
    )  # fmt: skip


def _vaswani(width: int, heads: int) -> Model:
    return Model(
        heads, heads, 64, 64, "Vaswani 2017, table 3",
        layers=6, decoder_layers=6, width=width, d_ff=4 * width, vocabulary=37000, norms=0,
    )  # fmt: skip


def _t5(layers: int, width: int) -> Model:
    heads = width // 64
    return Model(
        heads, heads, 64, 64, "Raffel 2020, section 3.1.1 and appendix E",
        layers=layers, decoder_layers=layers, width=width, d_ff=4 * width, vocabulary=32128, biases=False, norm=1,
        norms=2, buckets=32,
    )  # fmt: skip


def _llama(
    layers: int, width: int, d_ff: int, vocabulary: int, heads: int, source: str, kv_heads: int = 8, dim: int = 128,
    tied: bool = False, qk_norm: bool = False,
) -> Model:  # fmt: skip
    return Model(
        heads, kv_heads, dim, dim, source,
        layers=layers, width=width, d_ff=d_ff, vocabulary=vocabulary, gated=True, tied=tied, biases=False, norm=1,
        qk_norm=qk_norm,
    )  # fmt: skip


PRESETS: dict[str, Shape] = {
    "transformer-base": _vaswani(512, 8),
    "transformer-big": _vaswani(1024, 16),
    "bert-base": _bert(12, 768, 12, "Devlin 2019, section 3; the released weights"),
    "bert-large": _bert(24, 1024, 16, "Devlin 2019, section 3; the released weights"),
    "minilm-l6": _bert(6, 384, 12, "Wang 2020 (MiniLM); all-MiniLM-L6-v2's config"),
    "gpt2-small": _gpt2(12, 768),
    "gpt2-medium": _gpt2(24, 1024),
    "gpt2-large": _gpt2(36, 1280),
    "gpt2-xl-1.5b": _gpt2(48, 1600),
    "t5-small": _t5(6, 512),
    "t5-base": _t5(12, 768),
    "llama-3-8b": _llama(32, 4096, 14336, 128256, 32, "Llama team 2024, table 3"),
    "llama-3-70b": _llama(80, 8192, 28672, 128256, 64, "Llama team 2024, table 3"),
    "mistral-7b": _llama(32, 4096, 14336, 32000, 32, "Jiang 2023, table 1"),
    "qwen3-8b": _llama(36, 4096, 12288, 151936, 32, "Qwen team 2025, table 1; its config", qk_norm=True),
    "smollm2-135m": _llama(30, 576, 1536, 49152, 9, "Allal 2025; its config", kv_heads=3, dim=64, tied=True),
    # Multi-head latent attention: as trained, and as decoded, where each head reads the one latent.
    "mla": Shape(128, 128, 192, 128, "DeepSeek-AI 2024 (V2), section 3.1.2"),
    "mla-decode": Shape(128, 1, 576, 512, "DeepSeek-AI 2024 (V2), section 2.1.2, W_UK and W_UV absorbed"),
}


def preset(name: str) -> Shape:
    """The shape of this name.

    Raises:
        AttnbenchError: there is none; the message names the nearest.
    """
    if name not in PRESETS:
        near = get_close_matches(name, [*PRESETS, STANDARD], n=3, cutoff=0.4) or sorted(PRESETS)
        raise AttnbenchError(f"no preset {name!r}; there is: {', '.join(near)}")
    return PRESETS[name]
