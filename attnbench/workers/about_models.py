"""Messages about whole models: see `workers.model`."""

from __future__ import annotations

import msgspec

from attnbench.plugin import Value
from attnbench.workers.kinds import Answer, Request
from attnbench.workload import Workload


class ModelFacts(Answer, frozen=True):
    """A model: its attention, and how much text there is for it.

    longest: tokens it was made for. sliding: the window that some layers see, None where none does.
    windows: of each length asked for, how many the text gives. note: what to say beside a number of it.
    """

    name: str
    what: str
    licence: str
    note: str
    encoder: bool
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    longest: int
    sliding: int | None
    parameters: int
    windows: dict[int, int]


class WindowScore(msgspec.Struct, frozen=True):
    """Sums over a window's tokens that were scored, in nats; agreed: of how many the likeliest is exact's.

    cosine: of an encoder's embedding to the exact one.
    """

    document: int
    tokens: int
    nll: float = 0.0
    exact_nll: float = 0.0
    kl: float = 0.0
    agreed: int = 0
    cosine: float | None = None


class NeedleScore(msgspec.Struct, frozen=True):
    """depth: see `models.needles.Needle`. nll: a token of the answer, in nats."""

    depth: float
    found: bool
    nll: float


class ModelJudged(Answer, frozen=True):
    """A model with a variant beside itself with exact attention: see `workers.model.judge`.

    layers: in how many the variant computed, the others exactly. prefill_s, token_s: seconds of each, by turns with
    exact_prefill_s and exact_token_s. peak_bytes: of a prefill, beside the weights.
    """

    implementation: str
    layers: int
    note: str
    windows: list[WindowScore]
    kl_p99: float | None
    rank_correlation: float | None
    needles: list[NeedleScore]
    prefill_s: list[float]
    exact_prefill_s: list[float]
    token_s: list[float]
    exact_token_s: list[float]
    peak_bytes: int | None
    took_s: float


class AskModel(Request[ModelFacts], frozen=True):
    """What does this model say of itself? Its weights are made ready where they are not.

    texts: see `text.documents`. lengths: of windows.
    """

    model: str
    texts: list[str]
    lengths: list[int]


class JudgeModel(Request[ModelJudged], frozen=True):
    """Does a model work with a plugin? workload: of its attention in a prefill; dtype and threads are the model's.

    windows: so many at most; fewer, but two, where they would take more than `seconds`. depths: of needles.
    tokens: so many steps of decoding.
    """

    model: str
    texts: list[str]
    workload: Workload
    target: str
    options: dict[str, Value]
    windows: int
    seconds: float
    depths: list[float]
    tokens: int
