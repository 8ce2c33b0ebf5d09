"""Messages about KV caches: see `workers.caches`."""

from __future__ import annotations

import msgspec

from attnbench.plugin import Value
from attnbench.workers.about_models import NeedleScore, WindowScore
from attnbench.workers.kinds import Answer, Choice, Request


class CacheInstance(msgspec.Struct, frozen=True):
    """A cache with its options set. cache: its spec, with those options that are not their defaults."""

    cache: str
    target: str
    options: dict[str, Value]


class CacheDescribed(Answer, frozen=True):
    """What a cache says of itself, `what` in a line, and its instances asked for."""

    family: str
    what: str
    options: dict[str, Choice]
    instances: list[CacheInstance]


class CacheJudged(Answer, frozen=True):
    """A model with a cache beside itself without one: see `workers.caches.judge`.

    kept_bytes: of `numbers` keys and values in all layers, at a window's end. step_s: seconds of all layers' attention
    for one token, by turns with baseline_step_s. unread: why there are none.
    """

    windows: list[WindowScore]
    kl_p99: float | None
    needles: list[NeedleScore]
    kept_bytes: int
    numbers: int
    implementation: str
    unread: str
    step_s: list[float]
    baseline_step_s: list[float]
    took_s: float


class DescribeCache(Request[CacheDescribed], frozen=True):
    """Which caches are these? See `registry.Request`."""

    name: str
    target: str
    options: dict[str, str]
    every: bool


class JudgeCache(Request[CacheJudged], frozen=True):
    """Does a model work with a cache? seq: of a window. chunk: tokens that go in together, see `models.caching`.

    windows: so many at most; fewer, but two, where they would take more than `seconds`. depths: of needles.
    baseline: whose steps are timed by turns. rounds: of them.
    """

    model: str
    texts: list[str]
    seq: int
    chunk: int
    dtype: str
    threads: int
    cache: CacheInstance
    baseline: CacheInstance
    windows: int
    seconds: float
    depths: list[float]
    rounds: int
