"""Attention as a soft lookup table: `python docs/lecture/lookup.py`.

A lookup table compares a query with every key and returns the value of the best one, v[argmax(q k^T)]. Attention
returns softmax(t * scale * q k^T) v, here in float64 by attnbench's reference. t = 1 is attention; the larger t is, the
harder the lookup.

Look for: how much of the weight is on the best key, and how far the answer is from the best key's value (relative L2).
"random": queries, keys and values are random tokens. Attention then mixes many values, and becomes a lookup only as t
grows: the last to settle are queries whose two best keys are nearly as good as each other. "dictionary": keys are
random and long vectors, so nearly orthogonal, and each query is one of them. Attention then returns the value stored
under it, at t = 1 already.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from attnbench.judge.reference import exact
from attnbench.task import inputs
from attnbench.workload import Workload


def soft(w: Workload, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention at every row, float64 (1, 1, seq, dim of value)."""
    return exact(w, query, key, value, torch.arange(w.seq))


def compare(w: Workload, tensors: list[Tensor], t: float) -> tuple[float, float, float]:
    """(mean weight on the best key, relative L2 to the hard lookup, share of queries within 1% of it) at sharpness t.

    Multiplying the query by t multiplies its scores by t.
    """
    query, key, value = tensors
    scores = query.double() @ key.double().transpose(-1, -2)  # (1, 1, seq, kv_seq)
    best = scores.argmax(-1)[0, 0]  # (seq,)
    hard = value.double()[:, :, best]  # (1, 1, seq, value_dim)
    sharpened = query.double() * t
    weights = soft(w, sharpened, key, torch.eye(w.kv_seq)[None, None])  # attention over one-hot values: the weights
    off = soft(w, sharpened, key, value) - hard
    rows = off.norm(dim=-1) / hard.norm(dim=-1)
    on_best = weights[0, 0, torch.arange(w.seq), best].mean()
    return float(on_best), float(off.norm() / hard.norm()), float((rows < 0.01).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512, help="queries, and keys")
    parser.add_argument("--dim", type=int, default=64, help="of queries and keys of the random case, and of values")
    parser.add_argument("--key-dim", type=int, default=256, help="of the dictionary's keys")
    parser.add_argument("--most", type=int, default=1024, help="the largest t; t doubles")
    asked = parser.parse_args()

    n = asked.tokens
    cases: list[tuple[str, Workload, list[Tensor]]] = []
    for name, dim in (("random", asked.dim), ("dictionary", asked.key_dim)):
        w = Workload(seq=n, kv_seq=n, heads=1, kv_heads=1, head_dim=dim, value_dim=asked.dim)
        tensors = inputs.empty(w)  # query, key (1, 1, n, dim), value (1, 1, n, value_dim)
        inputs.fill(tensors, w, 0)
        cases.append((name, w, tensors))
    tensors[0] = tensors[1].flip(2)  # the dictionary is asked for its own keys, in another order
    print(f"{n} queries, {n} keys of {asked.dim} elements (random) or {asked.key_dim} (dictionary), all N(0, 1)")
    print(" " * 6 + "".join(f"{name + ':':>12} weight   distance  within 1%" for name, _, _ in cases))
    t = 1
    while t <= asked.most:
        found = (compare(w, tensors, t) for _, w, tensors in cases)
        print(f"{t:6}" + "".join(f"{on_best:19.4f} {off:10.2e} {near:10.1%}" for on_best, off, near in found))
        t *= 2
    print(
        "t    weight: on the best key. distance: relative L2 to v[argmax]. within 1%: queries whose answer is that near"
    )


if __name__ == "__main__":
    main()
