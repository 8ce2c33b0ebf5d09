"""What one model's predictions say of a text, and how far they are from another's."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 128
"""Tokens whose logits are held at a time: of 262,144 words in float32 that is 134 MB."""


class Scores(NamedTuple):
    """Of each token that is scored, float32 (n,), in nats.

    nll: -log q(token) (negative log-likelihood); exact_nll: -log p(token) by the reference.
    kl: KL(p || q) = sum p (log p - log q) over the vocabulary, p being the reference's next-token distribution; 0 where
        rounding makes it less.
    agrees: bool, whether both think the same token the likeliest.
    """

    nll: Tensor
    exact_nll: Tensor
    kl: Tensor
    agrees: Tensor


def nll(logits: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(logits)[target]: logits (n, vocabulary), targets (n,) int64 -> float32 (n,)."""
    return F.cross_entropy(logits.float(), targets, reduction="none")


def compare(hidden: Tensor, exact: Tensor, head: Callable[[Tensor], Tensor], targets: Tensor) -> Scores:
    """Scores a model's next-token predictions beside the reference's.

    hidden, exact: what goes into the head, (n, width), of the model and of the reference. head: -> (n, vocabulary).
    targets: the tokens that came, (n,) int64. Logits are made `CHUNK` tokens at a time and never kept.
    """
    parts = [
        compare_logits(head(h), head(e), t)
        for h, e, t in zip(*(torch.split(x, CHUNK) for x in (hidden, exact, targets)), strict=True)
    ]
    return Scores(*(torch.cat(each) for each in zip(*parts, strict=True)))


def compare_logits(logits: Tensor, exact: Tensor, targets: Tensor) -> Scores:
    """The same of logits (n, vocabulary)."""
    log_q, log_p = logits.float().log_softmax(-1), exact.float().log_softmax(-1)
    at = targets[:, None]
    return Scores(
        nll=-log_q.gather(1, at)[:, 0],
        exact_nll=-log_p.gather(1, at)[:, 0],
        kl=F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).clamp(min=0),
        agrees=log_q.argmax(-1) == log_p.argmax(-1),
    )
