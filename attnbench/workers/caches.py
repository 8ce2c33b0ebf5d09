"""A published model that decodes with a KV cache, beside itself with nothing lost: does it still work?

Both run in one process, window by window: exact attention over the window at once, then the cache, chunk by chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from torch import Tensor

from attnbench.cache import KVCache
from attnbench.devices import device
from attnbench.errors import AttnbenchError
from attnbench.models import text
from attnbench.models.caching import Reading
from attnbench.models.loading import Loaded, load
from attnbench.models.needles import Needle, needles
from attnbench.registry import canonical, instances, load_cache
from attnbench.workers.about_caches import CacheDescribed, CacheInstance, CacheJudged, DescribeCache, JudgeCache
from attnbench.workers.about_models import NeedleScore, WindowScore
from attnbench.workers.kinds import Choice
from attnbench.workers.messages import printable
from attnbench.workers.scored import finite, needle_score, window_score
from attnbench.workload import Workload

_LEAST_WINDOWS = 2  # for an interval
_WARM = 3  # rounds of steps


def describe(request: DescribeCache) -> CacheDescribed:
    """The caches that a spec stands for. Runs the cache's code.

    Raises:
        AttnbenchError: an option is unknown, or its value is not allowed.
    """
    kind, found = load_cache(request.target), []
    for values in instances(kind, request.options, request.every):
        kind(**values)  # it may refuse values that fit their options, but not each other
        changed = {name: value for name, value in values.items() if value != kind.options[name].default}
        found.append(CacheInstance(canonical(request.name, changed), request.target, values))
    options = {name: Choice(o.default, o.help, o.choices) for name, o in kind.options.items()}
    what = (kind.__doc__ or "").strip().partition("\n\n")[0]
    return CacheDescribed(kind.family, printable(" ".join(what.split())), options, found)


def judge(request: JudgeCache) -> CacheJudged:
    """Runs the model with the cache on windows of text and on needles, and times what decodes from it.

    Raises:
        AttnbenchError: the model keeps no cache.
        Failed: "wrong", what came out is not finite.
    """
    began = monotonic()
    torch.set_num_threads(request.threads)
    torch.set_grad_enabled(False)
    cache = _made(request.cache)
    loaded = load(request.model, getattr(torch, request.dtype))
    if loaded.encoder:
        raise AttnbenchError(f"{loaded.known.name} is an encoder: it sees all tokens at once and keeps no cache")
    texts = text.documents([Path(path) for path in request.texts])
    judged = _Judge(loaded, cache, request.chunk)
    found_needles = judged.needles(needles(loaded.tokenizer, texts, request.seq, request.depths))
    for number, window in enumerate(text.windows(loaded.tokenizer, texts, request.seq)[: request.windows]):
        first = monotonic()
        judged.window(window)
        if number + 1 >= _LEAST_WINDOWS and 2 * monotonic() - first - began > request.seconds:
            break
    implementation, own, baseline = _steps(request, loaded)
    return CacheJudged(
        windows=judged.windows,
        kl_p99=float(torch.cat(judged.kl).quantile(0.99)),
        needles=found_needles,
        kept_bytes=judged.kept_bytes,
        numbers=judged.numbers,
        implementation=printable(implementation) if own else "",
        unread="" if own else printable(implementation),
        step_s=own,
        baseline_step_s=baseline,
        took_s=monotonic() - began,
    )


def _made(instance: CacheInstance) -> KVCache:
    return load_cache(instance.target)(**instance.options)


class _Judge:
    """What has been found so far."""

    def __init__(self, loaded: Loaded, cache: KVCache, chunk: int) -> None:
        self._model, self._cache, self._chunk = loaded.model, cache, chunk
        self.windows: list[WindowScore] = []
        self.kl: list[Tensor] = []
        self.kept_bytes = self.numbers = 0

    def head(self, hidden: Tensor) -> Tensor:
        """(n, width) -> logits (n, vocabulary)."""
        logits: Tensor = self._model.get_output_embeddings()(hidden)
        return logits

    def window(self, window: text.Window) -> None:
        """One window both ways."""
        exact = self._model.get_decoder()(input_ids=window.ids, use_cache=False).last_hidden_state[0]  # (seq, width)
        reading = Reading(self._model, self._cache, self._chunk)
        hidden = finite(reading.take(window.ids)[0])  # (seq, width)
        self.kept_bytes, self.numbers = reading.bytes, reading.numbers
        score, kl = window_score(window, hidden, exact, self.head)
        self.windows.append(score)
        self.kl.append(kl)

    def needles(self, needles: Sequence[Needle]) -> list[NeedleScore]:
        """Of each, whether the answer that it ends with is what the model would say token by token."""
        if not needles:
            return []
        ids = torch.cat([each.ids for each in needles])  # (needles, seq)
        hidden = finite(Reading(self._model, self._cache, self._chunk).take(ids[:, :-1]))  # (needles, seq - 1, width)
        return [needle_score(each, states, self.head) for each, states in zip(needles, hidden, strict=True)]


def _steps(request: JudgeCache, loaded: Loaded) -> tuple[str, list[float], list[float]]:
    """What decodes from the cache, and seconds of a token's attention in all layers, by turns with the baseline's.

    Or why nothing does, and no seconds.
    """
    w = Workload(
        seq=1, kv_seq=request.seq, heads=loaded.heads, kv_heads=loaded.kv_heads, head_dim=loaded.head_dim,
        value_dim=loaded.head_dim, dtype=request.dtype, mask="causal", phase="decode", threads=request.threads,
    )  # fmt: skip
    ways, on = [], device.of("cpu")
    for instance in (request.cache, request.baseline):
        step = _made(instance).step(w)
        if isinstance(step, str):
            return step if instance is request.cache else f"nothing to time it beside: {step}", [], []
        ways.append(_token(step.plugin, step.workload, loaded.layers))
    seconds: tuple[list[float], list[float]] = ([], [])
    for number in range(_WARM + request.rounds):
        for i in (0, 1) if number % 2 else (1, 0):
            took, _ = on.once(ways[i][1], [])
            if number >= _WARM:
                seconds[i].append(took)
    return ways[0][0], *seconds


def _token(plugin: Any, workload: Workload, layers: int) -> tuple[str, Callable[[], None]]:
    """What runs, and a call that attends for one token in each layer; every layer has a past of its own in memory."""
    w, decoding = workload, plugin.decoding(workload)
    drawn = torch.Generator().manual_seed(0)
    dtype = getattr(torch, w.dtype)

    def tensor(heads: int, length: int, dim: int) -> Tensor:
        return torch.randn(1, heads, length, dim, generator=drawn).to(dtype)

    pasts = [
        decoding.start(tensor(w.kv_heads, w.past, w.head_dim), tensor(w.kv_heads, w.past, w.value_dim), w.kv_seq)
        for _ in range(layers)
    ]
    new = tensor(w.heads, 1, w.head_dim), tensor(w.kv_heads, 1, w.head_dim), tensor(w.kv_heads, 1, w.value_dim)

    def call() -> None:
        for past in pasts:
            decoding.step(past, *new)

    return decoding.implementation, call
