"""What judging a model's attention and its KV cache share: a window's scores, and whether a needle is found."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from attnbench.errors import Failed
from attnbench.models import scores, text
from attnbench.models.needles import Needle
from attnbench.workers.about_models import NeedleScore, WindowScore

Head = Callable[[Tensor], Tensor]
"""(n, width) -> logits (n, vocabulary)."""


def finite(hidden: Tensor) -> Tensor:
    """Raises: Failed: "wrong", the hidden states are not finite."""
    if not bool(torch.isfinite(hidden).all()):
        raise Failed("wrong", "the model's hidden states are not finite")
    return hidden


def window_score(window: text.Window, hidden: Tensor, exact: Tensor, head: Head) -> tuple[WindowScore, Tensor]:
    """What the last hidden states of a window, (seq, width), say of it beside exact ones; and the KL of each token."""
    each = scores.compare(hidden[:-1], exact[:-1], head, window.ids[0, 1:])
    nll, exact_nll, kl = (float(x.double().sum()) for x in (each.nll, each.exact_nll, each.kl))
    return WindowScore(window.document, len(each.nll), nll, exact_nll, kl, int(each.agrees.sum())), each.kl


def needle_score(needle: Needle, hidden: Tensor, head: Head) -> NeedleScore:
    """Whether the answer that it ends with is what the model would say token by token.

    hidden: (.., width), the last states of all its tokens but the last one.
    """
    logits, expected = head(hidden[-needle.answer :]), needle.ids[0, -needle.answer :]
    found = bool((logits.argmax(-1) == expected).all())
    return NeedleScore(needle.depth, found, float(scores.nll(logits, expected).mean()))
