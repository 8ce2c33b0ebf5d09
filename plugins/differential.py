"""Differential attention (Ye 2024, "Differential Transformer", arXiv 2410.05258, equation 1).

(softmax(Q1 K1^T / sqrt(d)) - lambda softmax(Q2 K2^T / sqrt(d))) V

Two maps are made of the two halves of each query and key, d numbers each, and what both of them give to a key by
accident is taken away. A head of a workload, head_dim = value_dim = 2 d, is a head of the paper, of which a layer has
half as many as a layer of softmax heads with head dim d has.

Within: the equation, with lambda a number that is the same for all heads, `lambda_init`, as it is before training
(equation 2 without its learnt vectors). Left to the layer around it: those vectors, the norm of each head's output, and
the factor 1 - lambda_init behind that (equation 3). It is another function than softmax attention, which a model is
trained with; its distance from that is told as its approximation error and is no fault of its.

Either map is exact attention, so kernels for that compute it:

- `impl=halves` calls one twice, on the first halves and on the second, with values twice as wide as keys.
- `impl=padded` calls one once, with each query head as two, (q1, 0) and (0, q2), on the same keys: their products are
  those of the halves. That multiplies zeros, a quarter of all, and reads V once: for kernels that want values as wide
  as keys, and for decoding, where reading is what costs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnbench.plugin import Attention, Choice, Definition, Implementation, Maps, Option, built
from attnbench.workload import Workload

from .tiled import Tiled, exact_here


class Differential(Choice):
    """The difference of two softmax maps, by exact attention: `tiled` on a CPU, `sdpa` elsewhere.

    `impl=auto` is halves on a CPU for which a kernel is compiled, but in decoding; else padded.
    """

    family = "kernel"
    study: ClassVar[bool] = True
    options: ClassVar[Mapping[str, Option]] = {
        "lambda_init": Option(0.8, "lambda, what the second map is multiplied with"),
        "impl": Option("auto", "how exact attention is called", ("auto", "halves", "padded")),
    }
    lambda_init: float

    def supports(self, workload: Workload) -> str | None:
        if workload.head_dim % 2:
            return f"a head has two halves: head_dim must be even, not {workload.head_dim}"
        return super().supports(workload)

    def definition(self, workload: Workload) -> Definition:
        half = workload.head_dim // 2
        factor = (_scale(workload) / workload.scale) ** 0.5  # of a query and of a key
        return Maps(((lambda x: x[..., :half] * factor, 1.0), (lambda x: x[..., half:] * factor, -self.lambda_init)))

    def implementations(self, workload: Workload) -> Sequence[Implementation]:
        def dear(w: Workload) -> str | None:
            if w.decodes:
                return "halves reads V twice"
            if w.device != "cpu":
                return "torch's flash kernels take values as wide as keys alone"
            return Tiled(impl="native").supports(_half(w))

        halves = Implementation(
            "halves",
            self._halves,
            lambda w: exact_here(w).supports(_half(w)),
            dear,
            lambda w: _held(w, _half(w), 1, 0),
            lambda w: _products(w, w.head_dim // 2),
            honours=("scale", "window"),
        )
        padded = Implementation(
            "padded",
            self._padded,
            lambda w: exact_here(w).supports(_twice(w)),
            workspace_bytes=lambda w: _held(w, _twice(w), 2, 2),
            flops=lambda w: _products(w, w.head_dim),
            honours=("scale", "window"),
        )
        return halves, padded

    def _halves(self, workload: Workload) -> Attention:
        exact, by = built(exact_here(workload), _half(workload)), self.lambda_init

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            (q1, q2), (k1, k2) = query.chunk(2, -1), key.chunk(2, -1)  # (batch, heads, seq, head_dim / 2) each, ..
            first, second = exact.call(q1, k1, value), exact.call(q2, k2, value)  # (batch, heads, seq, value_dim)
            return torch.sub(first, second, alpha=by)

        return Attention(attend, f"halves; {exact.implementation}")

    def _padded(self, workload: Workload) -> Attention:
        exact, by = built(exact_here(workload), _twice(workload)), self.lambda_init
        half = workload.head_dim // 2

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            q1, q2 = query.chunk(2, -1)  # (batch, heads, seq, head_dim / 2) each
            both = torch.stack([pad(q1, (0, half)), pad(q2, (half, 0))], 2)  # (batch, heads, 2, seq, head_dim)
            out = exact.call(both.flatten(1, 2), key, value).unflatten(1, (-1, 2))  # (.., heads, 2, seq, value_dim)
            return torch.sub(out[:, :, 0], out[:, :, 1], alpha=by)  # (batch, heads, seq, value_dim)

        return Attention(attend, f"padded; {exact.implementation}")


def _scale(workload: Workload) -> float:
    """What a map's scores are multiplied with: 1 / sqrt(d), or what the workload asks for."""
    w = workload
    return w.scale if "scale" in w.beyond else float((w.head_dim / 2) ** -0.5)


def _half(workload: Workload) -> Workload:
    """One map as a problem of exact attention."""
    return workload.replace(head_dim=workload.head_dim // 2, softmax_scale=_scale(workload))


def _twice(workload: Workload) -> Workload:
    """Both maps as one problem of exact attention."""
    return workload.replace(heads=2 * workload.heads, softmax_scale=_scale(workload))


def _products(workload: Workload, dim: int) -> int:
    w = workload
    return 2 * 2 * w.batch * w.heads * w.masked.pairs(w.seq, w.kv_seq) * (dim + w.value_dim)


def _held(workload: Workload, exact: Workload, outs: int, queries: int) -> int | None:
    """So many outputs and queries beside what exact attention holds."""
    w, own = workload, exact_here(workload).workspace_bytes(exact)
    if w.trains or w.decodes or own is None:
        return None
    return own + w.batch * w.heads * w.seq * (outs * w.value_dim + queries * w.head_dim) * w.itemsize
