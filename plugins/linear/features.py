"""The feature maps of linear attention: elu(x) + 1, and FAVOR+ positive random features.

Sources: Katharopoulos et al. 2020, "Transformers are RNNs" (equation 7); Choromanski et al. 2021, "Rethinking Attention
with Performers" (FAVOR+, lemma 1 and section 2.4).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

LOG2_E = 1 / math.log(2)

Phi: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor | None]]
"""x (..., length, head_dim) -> features (..., length, n) and log2 (..., length, 1) of the factor taken out of each row
to keep it within float32's range; None where no factor was."""


def elu(x: Tensor) -> tuple[Tensor, None]:
    """elu(x) + 1 (Katharopoulos, equation 7) = exp(min(x, 0)) + max(x, 0): positive, and no digit is lost near -1."""
    return x.clamp(max=0).mul_(LOG2_E).exp2_().add_(x.relu()), None


def elu_kept(x: Tensor) -> tuple[Tensor, None]:
    """`elu` with the power left in memory: its derivative is made of it."""
    return x.clamp(max=0).mul(LOG2_E).exp2() + x.relu(), None


def favor(x: Tensor, projection: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """exp(w . x' - |x'|^2 / 2) for each row w of projection (count, head_dim), with x' = sqrt(scale) x.

    Each row is made 2^-top, so that its largest feature is 1.
    """
    exponents = _favor_exponents(x, projection, scale)  # (..., length, count)
    top = exponents.detach().amax(-1, keepdim=True)  # (..., length, 1); a factor that cancels has no derivative
    return exponents.sub_(top).exp2_(), top


def favor_unscaled(x: Tensor, projection: Tensor, scale: float) -> Tensor:
    return _favor_exponents(x, projection.to(x.device, x.dtype), scale).exp2_()


def _favor_exponents(x: Tensor, projection: Tensor, scale: float) -> Tensor:
    """log2 of exp(w . x' - |x'|^2 / 2): (..., length, count).

    Its mean over Gaussian w of phi(q) phi(k) is exp(scale q . k) (Performers, lemma 1). The factor
    1 / sqrt(count) is left out: it cancels in the normalised sum.
    """
    x = x * math.sqrt(scale)  # (..., length, head_dim)
    exponents: Tensor = x @ projection.mT  # (..., length, count)
    return exponents.sub_(x.square().sum(-1, keepdim=True).mul_(0.5)).mul_(LOG2_E)


def orthogonal(count: int, dim: int, seed: int) -> Tensor:
    """Random features' directions (count, dim) in float64, orthogonal in blocks of `dim` (Performers, section 2.4).

    Each row is distributed as a standard normal vector: a direction from the QR decomposition of a Gaussian matrix,
    times the length of another Gaussian vector.
    """
    generator = torch.Generator().manual_seed(seed)
    blocks = []
    for _ in range(math.ceil(count / dim)):
        q, r = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64, generator=generator))  # (dim, dim) each
        blocks.append(q * r.diagonal().sign())  # without the signs the directions would not be uniform
    lengths = torch.randn(count, dim, dtype=torch.float64, generator=generator).norm(dim=-1, keepdim=True)  # (count, 1)
    return torch.cat([block.mT for block in blocks])[:count] * lengths
