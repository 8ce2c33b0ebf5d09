"""What judging a model by its variants and by its caches has in common: shares of a budget, and columns of scores."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from attnbench.stats.clusters import Mean, clustered_mean
from attnbench.stats.intervals import median_interval
from attnbench.workers.about_models import NeedleScore, WindowScore

_EXACT_SHARE, _SLOWER = 0.7, 1.5  # of a judgement's share of the budget; times as long as the exact one
ENDS = ("", "_low", "_high")
COLUMNS = (
    *(f"{name}{end}" for name in ("perplexity", "perplexity_ratio", "kl_mean") for end in ENDS), "exact_perplexity",
    "kl_p99", "top1_agreement", "needle", "needles", "windows", "documents", "tokens",
)  # fmt: skip
"""Of a decoder; `scores` and `needles` give them."""


@dataclass
class Room:
    """How much of a budget each judgement may take, so that all are judged on as many windows as the exact one is.

    budget: seconds, from `began` on. left: judgements to come. windows: at most; of a problem, such as a model at a
    length, those of its exact one. took: the seconds of that.
    """

    budget: float
    began: float
    left: int
    most: int
    windows: dict[Hashable, int] = field(default_factory=dict)
    took: dict[Hashable, float] = field(default_factory=dict)

    @property
    def over(self) -> float:
        """Seconds that are left of the budget."""
        return max(0.0, self.budget - (monotonic() - self.began))

    def seconds(self, problem: Hashable) -> float | None:
        """For the next one; None where it doesn't fit. The exact one takes a part of its share, others may be slow."""
        share, took = self.over / max(1, self.left), self.took.get(problem)
        self.left -= 1
        if took is None:
            return _EXACT_SHARE * share
        return None if self.over < took else min(self.over, _SLOWER * took)

    def why_not(self, problem: Hashable, exact: str) -> str:
        """Why there was no room. exact: what the exact one is called."""
        return f"{exact} took {self.took[problem]:.0f} s, {self.over:.0f} s are left: a higher --budget"

    def learn(self, problem: Hashable, began: float, windows: int) -> None:
        """What the problem's exact one took from `began` on; the first one counts."""
        self.windows.setdefault(problem, windows)
        self.took.setdefault(problem, monotonic() - began)


def mean(windows: Sequence[WindowScore], nats: Callable[[WindowScore], float]) -> Mean:
    """Of a token, with its interval over documents; `nats` are those of a window together."""
    return clustered_mean([nats(w) for w in windows], [w.tokens for w in windows], [w.document for w in windows])


def scores(windows: Sequence[WindowScore], kl_p99: float | None) -> dict[str, Any]:
    """Columns of what a decoder made of the windows, beside what it made of them with nothing lost."""
    tokens = sum(w.tokens for w in windows)
    found: dict[str, Any] = {
        "windows": len(windows),
        "documents": len({w.document for w in windows}),
        "tokens": tokens,
        "exact_perplexity": mean(windows, lambda w: w.exact_nll).exp().mean,
        "kl_p99": kl_p99,
        "top1_agreement": sum(w.agreed for w in windows) / tokens,
    }
    return (
        found
        | _ends("kl_mean", mean(windows, lambda w: w.kl))
        | _ends("perplexity", mean(windows, lambda w: w.nll).exp())
        | _ends("perplexity_ratio", mean(windows, lambda w: w.nll - w.exact_nll).exp())
    )


def needles(asked: Sequence[NeedleScore]) -> dict[str, Any]:
    """Columns of what was found of the facts that lie in a text; none where none was asked for."""
    if not asked:
        return {}
    each = [{"depth": n.depth, "found": n.found, "nll": n.nll} for n in asked]
    return {"needle": sum(n.found for n in asked) / len(asked), "needles": each}


def times(name: str, own: Sequence[float], other: str, others: Sequence[float]) -> dict[str, Any]:
    """Columns of seconds and of the speedup, paired: `{name}_s`, `{other}_{name}_s`, `{name}_speedup`; none of none."""
    if not own:
        return {}
    ratio = median_interval([b / o for b, o in zip(others, own, strict=False)])
    seconds = {f"{name}_s": median_interval(own).median, f"{other}_{name}_s": median_interval(others).median}
    return seconds | _ends(f"{name}_speedup", Mean(ratio.median, ratio.low, ratio.high))


def _ends(name: str, found: Mean) -> dict[str, Any]:
    return dict(zip((f"{name}{end}" for end in ENDS), (found.mean, found.low, found.high), strict=True))
