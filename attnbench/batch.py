"""Batches as a server has them, in vLLM's grammar: prompts, chunks of them and decoding steps beside each other.

    q2k          a prompt of 2048 tokens
    q512s2k      512 more tokens of a prompt, which make it one of 2048
    8q1s1k       8 requests that add a token each, which make them 1024 tokens long
    q2k_8q1s1k   all of that in one batch; a comma joins as well

Each entry is (count)q(queries)(k)s(keys)(k): vLLM, benchmarks/attention_benchmarks/batch_spec.py, some versions of
which write kv for s. k is 1024. Keys are all of a sequence, those of its queries with them, which are its last ones.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any

from attnbench.errors import AttnbenchError

Sizes = tuple[int, int]
"""Queries and keys of one entry."""

_ENTRY = re.compile(r"(\d{0,6})q(\d{1,9})(k?)(?:(?:s|kv)(\d{1,9})(k?))?", re.ASCII)
_MOST = 4096  # entries
_K = 1024


@lru_cache
def parse(spec: str) -> tuple[Sizes, ...]:
    """Of each entry of the batch, in the order written.

    Raises:
        AttnbenchError: an entry is malformed, empty or has fewer keys than queries, or there are thousands.
    """
    found: list[Sizes] = []
    for part in (each.strip() for each in re.split("[_,]", spec)):
        match = _ENTRY.fullmatch(part)
        if not match:
            raise AttnbenchError(
                f"--batch-spec {spec!r}: {part!r} is no entry; write q2k (a prompt), q512s2k (tokens of a longer one) "
                "or 8q1s1k (8 decoding steps), joined by _ or ,"
            )
        count, queries = int(match[1] or 1), int(match[2]) * (_K if match[3] else 1)
        keys = int(match[4]) * (_K if match[5] else 1) if match[4] else queries
        if not (count and queries and queries <= keys):
            why = f"{keys} keys can't have {queries} queries among them" if count and queries else "it is empty"
            raise AttnbenchError(f"--batch-spec {spec!r}: {part!r}: {why}")
        if len(found) + count > _MOST:
            raise AttnbenchError(f"--batch-spec {spec!r} has over {_MOST} entries")
        found += [(queries, keys)] * count
    return tuple(found)


def written(entries: Sequence[Sizes]) -> str:
    """The shortest spec of these entries, in their order."""

    def size(n: int) -> str:
        return str(n) if n % _K else f"{n // _K}k"

    runs = ((sizes, len(list(run))) for sizes, run in groupby(entries))
    parts = ((count, queries, keys) for (queries, keys), count in runs)
    return "_".join(
        (str(n) if n > 1 else "") + f"q{size(queries)}" + ("" if queries == keys else f"s{size(keys)}")
        for n, queries, keys in parts
    )


def fields(spec: str) -> dict[str, Any]:
    """What a workload of it has: batch, the most queries as seq and keys as kv_seq, and lengths.

    Raises:
        AttnbenchError: see `parse`.
    """
    entries = parse(spec)
    queries, keys = (max(each) for each in zip(*entries, strict=True))
    return {"batch": len(entries), "seq": queries, "kv_seq": keys, "lengths": written(entries)}


def is_spec(lengths: str) -> bool:
    """Whether lengths are a batch in this grammar, and not a list of numbers."""
    return "q" in lengths
