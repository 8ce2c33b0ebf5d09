"""A published model with a variant as its attention, beside itself with exact attention: does it still work?

Both run in one process, window by window and in turn, so that times are paired and nothing of exact's is kept: a
window's hidden states are, at 8,192 tokens, 20 MB, and its logits over a vocabulary are made a few tokens at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnbench.devices import device
from attnbench.errors import AttnbenchError
from attnbench.models import text
from attnbench.models.attending import EXACT, Attending
from attnbench.models.loading import Loaded, load
from attnbench.models.needles import Needle, needles
from attnbench.plugin import Plugin, built
from attnbench.workers.about_models import (
    AskModel,
    JudgeModel,
    ModelFacts,
    ModelJudged,
    NeedleScore,
    WindowScore,
)
from attnbench.workers.messages import printable
from attnbench.workers.scored import finite, needle_score, window_score

_LEAST_WINDOWS = {False: 2, True: 8}  # for an interval; of an encoder for similarities of pairs to rank
_LOGITS = 1e-3  # relative to the largest: by how much logits may be off those that the model makes itself


def facts(request: AskModel) -> ModelFacts:
    """What a model is; at the first time its weights are made ready, which takes up to a minute.

    Raises:
        AttnbenchError: it is unknown, not installed or can't be loaded, or the text can't be read.
    """
    loaded = load(request.model)
    texts = text.documents([Path(path) for path in request.texts])
    windows = {}
    for seq in request.lengths:
        try:
            windows[seq] = len(text.windows(loaded.tokenizer, texts, seq))
        except AttnbenchError:
            windows[seq] = 0
    known, sliding = loaded.known, getattr(loaded.config, "sliding_window", None)
    return ModelFacts(
        name=known.name,
        what=known.what,
        licence=known.licence,
        note=known.note,
        encoder=loaded.encoder,
        heads=loaded.heads,
        kv_heads=loaded.kv_heads,
        head_dim=loaded.head_dim,
        layers=loaded.layers,
        longest=loaded.longest,
        sliding=sliding if "sliding_attention" in (getattr(loaded.config, "layer_types", None) or []) else None,
        parameters=sum(p.numel() for p in loaded.model.parameters()),
        windows=windows,
    )


def judge(plugin: Plugin, request: JudgeModel) -> ModelJudged:
    """Runs the model both ways on windows of text, on needles and token by token.

    Raises:
        AttnbenchError: the variant can't do what the model asks for.
        Failed: "wrong", what came out is not finite.
    """
    began, w = monotonic(), request.workload
    torch.set_num_threads(w.threads)
    torch.set_grad_enabled(False)
    loaded = load(request.model, getattr(torch, w.dtype))
    texts = text.documents([Path(path) for path in request.texts])
    windows = text.windows(loaded.tokenizer, texts, w.seq)[: request.windows]
    judged = _Judge(loaded, plugin, w.device)
    peak = judged.first(windows[0])
    found: list[NeedleScore] = []
    if not loaded.encoder:
        hidden = needles(loaded.tokenizer, texts, w.seq, request.depths)
        found = [judged.needle(each) for each in hidden]
    for number, window in enumerate(windows[1:], 1):
        begun = monotonic()
        judged.window(number, window)
        if number + 1 >= _LEAST_WINDOWS[loaded.encoder] and 2 * monotonic() - begun - began > request.seconds:
            break  # the next one would take as long
    if not loaded.encoder:
        judged.steps(windows[0].ids[:, : request.tokens])
    kl = torch.cat(judged.kl) if judged.kl else None
    return ModelJudged(
        implementation=printable(built(plugin, w).implementation),
        layers=judged.attending.layers,
        note=printable("; ".join(judged.notes)),
        windows=judged.windows,
        kl_p99=None if kl is None else float(kl.quantile(0.99)),
        rank_correlation=_rank_correlation(judged.embeddings) if loaded.encoder else None,
        needles=found,
        prefill_s=judged.seconds["variant"],
        exact_prefill_s=judged.seconds["exact"],
        token_s=judged.seconds["variant token"],
        exact_token_s=judged.seconds["exact token"],
        peak_bytes=peak,
        took_s=monotonic() - began,
    )


@dataclass
class _Judge:
    """What has been found so far."""

    loaded: Loaded
    plugin: Plugin
    on: str
    windows: list[WindowScore] = field(default_factory=list)
    kl: list[Tensor] = field(default_factory=list)
    embeddings: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.attending = Attending(self.loaded, self.plugin)
        self.device = device.of(self.on)
        ways = ("variant", "exact", "variant token", "exact token")
        self.seconds: dict[str, list[float]] = {way: [] for way in ways}
        self.pasts: dict[str, Any] = {}

    @property
    def ways(self) -> dict[str, str]:
        """The names of both attentions, by what they are here."""
        return {"exact": EXACT, "variant": self.attending.name}

    def prefill(self, ids: Tensor, past: Any = None) -> Tensor:
        """The model without its head, keys and values going into a cache as they would: (1, seq) -> (seq, width)."""
        if self.loaded.encoder:
            hidden: Tensor = self.loaded.model(ids).last_hidden_state[0]
        else:
            past = self.empty() if past is None else past
            hidden = self.loaded.model.base_model(ids, cache=past, use_cache=True).last_hidden_state[0]
        return hidden

    def empty(self) -> Any:
        """A cache of transformers' own for the model; an encoder has none."""
        from transformers import DynamicCache

        return None if self.loaded.encoder else DynamicCache(config=self.loaded.model.config)

    def head(self, hidden: Tensor) -> Tensor:
        """(n, width) -> logits (n, vocabulary)."""
        logits: Tensor = self.loaded.model.get_output_embeddings()(hidden)
        return logits

    def first(self, window: text.Window) -> int | None:
        """The first window, which warms both up and is not timed. Bytes of the variant's prefill at its peak.

        Layers with a sliding window are left to exact attention where the variant can't do them.
        """
        self.attending.use(EXACT)
        if not self.loaded.encoder:
            self._check_head(window.ids[:, :8])
        past = self.pasts["exact"] = self.empty()
        states = {"exact": self.prefill(window.ids, past)}
        self.device.begin(None)
        try:
            states["variant"], peak = self._peak(window)
        except AttnbenchError as problem:
            self.attending.spare_windows(problem)
            share = f"{self.attending.layers} of {self.loaded.layers} layers"
            self.notes.append(f"in {share}: those with a sliding window, which it can't do, attend exactly")
            states["variant"], peak = self._peak(window)
        self.device.before_timing()
        self._score(window, states)
        return peak

    def _peak(self, window: text.Window) -> tuple[Tensor, int | None]:
        self.attending.use(self.attending.name)
        past = self.pasts["variant"] = self.empty()
        return self.device.peak(lambda: self.prefill(window.ids, past))

    def _check_head(self, ids: Tensor) -> None:
        own = self.loaded.model(ids).logits[0]
        off = (own - self.head(self.prefill(ids))).abs().max()
        if not bool(off <= _LOGITS * own.abs().max()):
            raise AttnbenchError(
                f"{self.loaded.known.name} makes more of its last hidden states than its output layer says; attnbench "
                "scores no such model"
            )

    def window(self, number: int, window: text.Window) -> None:
        """A further window both ways, each in turn the first."""
        states = {}
        for way in list(self.ways)[:: 1 if number % 2 else -1]:
            self.attending.use(self.ways[way])
            past = self.pasts[way] = self.empty()
            took, states[way] = self.device.once(self.prefill, [window.ids, past])  # (seq, width)
            self.seconds[way].append(took)
        self._score(window, states)

    def _score(self, window: text.Window, states: dict[str, Tensor]) -> None:
        """states: the last hidden ones of both ways, (seq, width)."""
        finite(states["variant"])
        if self.loaded.encoder:
            pair = [F.normalize(states[way].float().mean(0), dim=0) for way in ("variant", "exact")]  # (width,)
            self.embeddings.append((pair[0], pair[1]))
            self.windows.append(WindowScore(window.document, 1, cosine=float(pair[0] @ pair[1])))
            return
        score, kl = window_score(window, states["variant"], states["exact"], self.head)
        self.windows.append(score)
        self.kl.append(kl)

    def needle(self, needle: Needle) -> NeedleScore:
        """Whether the model finds it with the variant."""
        self.attending.use(self.attending.name)
        return needle_score(needle, self.prefill(needle.ids[:, :-1]), self.head)

    def steps(self, ids: Tensor) -> None:
        """Further tokens after the last window, one by one: ids (1, n). The model's own cache holds the past."""
        for number in range(ids.shape[1]):
            token = ids[:, number : number + 1]
            for way in list(self.ways)[:: 1 if number % 2 else -1]:
                self.attending.use(self.ways[way])

                def step(way: str = way, token: Tensor = token) -> Tensor:
                    return self.head(self.prefill(token, self.pasts[way]))

                try:
                    took, _ = self.device.once(step, [])
                except AttnbenchError as problem:
                    self.notes.append(f"no time for a token: {problem}")
                    return
                if number:  # the first one warms up
                    self.seconds[f"{way} token"].append(took)


def _rank_correlation(embeddings: list[tuple[Tensor, Tensor]]) -> float | None:
    """Spearman's, of the similarities of all pairs of texts: does the encoder still find the same ones alike?"""
    from scipy.stats import spearmanr

    if len(embeddings) < 3:
        return None
    pairs = torch.triu_indices(len(embeddings), len(embeddings), offset=1)
    similar: Callable[[int], Any] = lambda which: (  # noqa: E731
        (m := torch.stack([e[which] for e in embeddings])) @ m.T
    )[pairs[0], pairs[1]]
    return float(spearmanr(similar(0), similar(1)).statistic)
