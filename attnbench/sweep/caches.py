"""`attnbench cache`: whether a model still works with a KV cache that keeps less, and what the cache takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from attnbench.errors import AttnbenchError
from attnbench.models.known import find as find_model
from attnbench.registry import CACHES, Found, find, select
from attnbench.registry import Request as Named
from attnbench.stats.clusters import Mean, clustered_mean
from attnbench.sweep.scored import COLUMNS, ENDS, Room, mean, needles, scores, times
from attnbench.workers.about_caches import CacheDescribed, CacheInstance, CacheJudged, DescribeCache, JudgeCache
from attnbench.workers.about_models import AskModel, ModelFacts, WindowScore
from attnbench.workers.ask import ask_machine, ask_once
from attnbench.workers.messages import Failure
from attnbench.workers.server import Forkserver

REFERENCE, BASELINE = "exact", "bf16"
ALL = (
    "bf16,fp8,fp8:format=e5m2,int8,int4,int4:rotate=true,int4:smooth=true,int4:keys=false,int4:values=false,"
    "kivi,kivi:bits=2,turboquant,turboquant:bits=3,turboquant:bits=2,window,h2o"
)
"""What "all" stands for, beside other caches that are installed: each format, and what disputed claims are about."""
_MEMORY_SHARE = 0.8  # of what is free
_ALIKE = {"float32": 1e-4, "bfloat16": 5e-2}  # KL in nats up to which two ways of one computation may differ
_DEPTHS = (0.0, 0.5, 1.0)  # of needles
_DESCRIBE_SECONDS, _LOAD_SECONDS = 60.0, 600.0  # the latter: unpacking a model, at the first time


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What `attnbench cache` is asked for. texts: paths; none for the shipped text. chunk: see `models.caching`.

    windows: so many at most. rounds: of timed steps.
    """

    model: str
    caches: str
    seq: int
    texts: Sequence[str] = ()
    chunk: int = 32
    dtype: str = "float32"
    threads: int = 1
    isa: str = "auto"
    budget: float = 600.0
    timeout: float = 600.0
    windows: int = 64
    rounds: int = 40


@dataclass
class Judged:
    """What came of one cache: a status and a reason, and scores where it is "ok"."""

    instance: CacheInstance
    family: str
    status: str = "ok"
    reason: str = ""
    answer: CacheJudged | None = None

    @property
    def windows(self) -> list[WindowScore]:
        return self.answer.windows if self.answer else []


@dataclass(frozen=True)
class Judgement:
    """What came of them so far. rows: see `row`. claims: see `answers`."""

    machine: dict[str, Any]
    model: ModelFacts
    rows: list[dict[str, Any]] = field(default_factory=list)
    claims: list[dict[str, Any]] = field(default_factory=list)


def judge(asked: Asked, say: Callable[[str], None], keep: Callable[[Judgement], None]) -> Judgement:
    """Judges each cache in a process of its own, the exact one first.

    say: told a line where one ends, and where something takes long. keep: given what there is after each row.

    Raises:
        AttnbenchError: a cache or the model is unknown, the model is not installed, keeps no cache or is too short, or
            the text is.
    """
    began = monotonic()
    known = find(kind=CACHES)
    requests = select(f"{REFERENCE},{_spelled_out(asked.caches, known)}", known, CACHES)
    find_model(asked.model).paths()
    with Forkserver(asked.threads, asked.isa) as server:
        machine = ask_machine(server)
        caches = _described(server, requests)
        (baseline,) = _described(server, select(BASELINE, known, CACHES))
        say(f"{asked.model}: loading; at the first time its weights are unpacked, which takes up to a minute")
        facts = ask_once(server, AskModel(asked.model, list(asked.texts), [asked.seq]), _LOAD_SECONDS)
        if isinstance(facts, Failure):
            raise AttnbenchError(facts.reason)
        _check(facts, asked.seq)
        found, memory = Judgement(machine.machine, facts), int(_MEMORY_SHARE * machine.devices["cpu"].free_bytes)
        room = Room(asked.budget, began, len(caches), asked.windows)
        for number, cache in enumerate(caches):
            if cache.status == "ok":
                _judge_one(server, asked, room, cache, baseline.instance, memory)
            if number == 0 and cache.answer:
                check_exact(asked, cache)
            found.rows.append(row(cache, asked, facts))
            found.claims[:] = answers(caches)
            keep(found)
            say(f"[{number + 1}/{len(caches)}] {_line(cache)}")
    return found


def _spelled_out(caches: str, known: Mapping[str, Found]) -> str:
    named = {spec.split(":")[0] for spec in ALL.split(",")} | {REFERENCE}
    every = ",".join([ALL, *(name for name in known if name not in named)])
    return ",".join(every if part.strip() == "all" else part for part in caches.split(","))


def offered(isa: str = "auto") -> list[tuple[Found, CacheDescribed | Failure]]:
    """All caches that are installed, and what each says of itself."""
    with Forkserver(1, isa) as server:
        return [(each, _described_one(server, Named(each))) for each in find(kind=CACHES).values()]


def _described_one(server: Forkserver, request: Named) -> CacheDescribed | Failure:
    offer = request.found
    if offer.problem:
        return Failure("error", offer.problem)
    question = DescribeCache(offer.name, offer.target, dict(request.options), request.every)
    return ask_once(server, question, _DESCRIBE_SECONDS)


def _described(server: Forkserver, requests: Sequence[Named]) -> list[Judged]:
    """The caches that requests stand for, each once."""
    found: dict[str, Judged] = {}
    for request in requests:
        offer, answer = request.found, _described_one(server, request)
        if isinstance(answer, Failure):
            if answer.status == "usage":
                raise AttnbenchError(f"{CACHES.flag} {offer.name}: {answer.reason}")
            nameless = CacheInstance(offer.name, offer.target, {})
            found.setdefault(offer.name, Judged(nameless, "", answer.status, answer.reason))
        else:
            for each in answer.instances:
                found.setdefault(each.cache, Judged(each, answer.family))
    return list(found.values())


def _check(facts: ModelFacts, seq: int) -> None:
    if facts.encoder:
        raise AttnbenchError(f"{facts.name} is an encoder: it sees all tokens at once and keeps no cache")
    if seq > facts.longest:
        raise AttnbenchError(f"{facts.name} was made for {facts.longest} tokens at most; a shorter --seq")
    if facts.windows[seq] < 2:
        raise AttnbenchError(f"the text has no two windows of {seq} tokens: a longer --text, or a shorter --seq")


def check_exact(asked: Asked, exact: Judged) -> None:
    """Raises: AttnbenchError: with nothing lost the model says something else than without a cache."""
    off = mean(exact.windows, lambda w: w.kl).mean
    if not off <= _ALIKE[asked.dtype]:
        raise AttnbenchError(
            f"{asked.model} can't be judged: with an exact cache its next tokens diverge by {off:.1e} nats from those "
            "without; its attention has something that attnbench doesn't know"
        )


def _judge_one(
    server: Forkserver, asked: Asked, room: Room, cache: Judged, baseline: CacheInstance, memory: int
) -> None:
    """memory: bytes that it may allocate."""
    seconds, began = room.seconds(asked.model), monotonic()
    if seconds is None:
        cache.status, cache.reason = "skipped", room.why_not(asked.model, "the exact one")
        return
    windows = room.windows.get(asked.model, room.most)
    question = JudgeCache(
        asked.model, list(asked.texts), asked.seq, asked.chunk, asked.dtype, asked.threads, cache.instance,
        baseline, windows, seconds, list(_DEPTHS), asked.rounds,
    )  # fmt: skip
    answer = ask_once(server, question, asked.timeout, memory)
    if isinstance(answer, Failure):
        cache.status, cache.reason = answer.status, answer.reason
        return
    cache.answer = answer
    room.learn(asked.model, began, len(answer.windows))


_NUMBERS = (
    "bits_per_value", "bytes", *COLUMNS, "step_s", "baseline_step_s", *(f"step_speedup{end}" for end in ENDS),
    "implementation", "no_step",
)  # fmt: skip


def row(cache: Judged, asked: Asked, facts: ModelFacts) -> dict[str, Any]:
    """A row of `attnbench cache`, its names as docs/models.md lists them; None where there is no number."""
    found: dict[str, Any] = {
        "model": facts.name, "cache": cache.instance.cache, "family": cache.family, "seq": asked.seq,
        "chunk": asked.chunk, "dtype": asked.dtype, "threads": asked.threads, "status": cache.status,
        "reason": cache.reason,
    } | dict.fromkeys(_NUMBERS)  # fmt: skip
    if not (answer := cache.answer):
        return found
    found |= {
        "bits_per_value": 8 * answer.kept_bytes / answer.numbers,
        "bytes": answer.kept_bytes,
        "implementation": answer.implementation,
        "no_step": answer.unread,
    }
    found |= scores(answer.windows, answer.kl_p99) | needles(answer.needles)
    return found | times("step", answer.step_s, "baseline", answer.baseline_step_s)


CLAIMS = (
    ("Does a rotation help 4 bits?", "int4:rotate=true", "int4"),
    ("Does smoothing keys help 4 bits?", "int4:smooth=true", "int4"),
    ("Are keys more fragile than values? Keys alone in 4 bits, against values alone", "int4:values=false",
     "int4:keys=false"),
    ("Is E4M3 closer than E5M2?", "fp8", "fp8:format=e5m2"),
    ("Do random rotation and best levels keep in 3 bits what plain 4 bits lose?", "turboquant:bits=3", "int4"),
    ("Is it better to keep the tokens attended to most than the last ones, as many of both?", "h2o", "window"),
)  # fmt: skip
"""Disputed claims: a question, and two caches, which on the same windows answer it."""


def answers(caches: Sequence[Judged]) -> list[dict[str, Any]]:
    """Of each claim whose caches were judged: "question", "first", "second", "windows", "documents", "sentence", and

    "closer": "first", "second" or None, whose next tokens diverge less from the exact model's, where that can be told;
    "kl_difference": KL(first) - KL(second), a token in nats, and "perplexity_ratio": first over second, both with
    "_low" and "_high".
    """
    found, by_name = [], {cache.instance.cache: cache for cache in caches if cache.answer}
    for question, first, second in CLAIMS:
        if first not in by_name or second not in by_name:
            continue
        pairs = list(zip(by_name[first].windows, by_name[second].windows, strict=False))
        tokens, documents = [one.tokens for one, _ in pairs], [one.document for one, _ in pairs]
        kl = clustered_mean([a.kl - b.kl for a, b in pairs], tokens, documents)
        ratio = clustered_mean([a.nll - b.nll for a, b in pairs], tokens, documents).exp()
        closer = None if kl.low is None or kl.high is None or kl.low <= 0 <= kl.high else kl.mean < 0
        found.append({
            "question": question, "first": first, "second": second, "windows": len(pairs),
            "documents": len(set(documents)), "closer": None if closer is None else "first" if closer else "second",
            "kl_difference": kl.mean, "kl_difference_low": kl.low, "kl_difference_high": kl.high,
            "perplexity_ratio": ratio.mean, "perplexity_ratio_low": ratio.low, "perplexity_ratio_high": ratio.high,
            "sentence": _sentence(first, second, closer, kl, ratio, len(pairs)),
        })  # fmt: skip
    return found


def _sentence(first: str, second: str, closer: bool | None, kl: Mean, ratio: Mean, windows: int) -> str:
    said = "can't be told from" if closer is None else f"is {'closer to' if closer else 'farther from'} exact than"
    between, spread = (
        "" if mean.low is None else f" [{mean.low:{form}}, {mean.high:{form}}]"
        for mean, form in ((kl, "+.2g"), (ratio, ".4g"))
    )
    return (
        f"{first} {said} {second}: KL {kl.mean:+.2g} nats{between}, perplexity {ratio.mean:.4g}x{spread}, "
        f"{windows} windows"
    )


def _line(cache: Judged) -> str:
    if not cache.answer:
        return f"{cache.instance.cache}: {cache.status}: {cache.reason}"
    ratio = mean(cache.windows, lambda w: w.nll - w.exact_nll).exp().mean
    bits = 8 * cache.answer.kept_bytes / cache.answer.numbers
    return f"{cache.instance.cache}: {bits:.3g} bits, {ratio:.4g}x the perplexity, {len(cache.windows)} windows"
