"""4-bit floats (E2M1) in blocks that share a scale of 8 bits: NVFP4 and MXFP4, emulated in torch.

NVFP4 (NVIDIA 2025, "Pretraining Large Language Models with NVFP4", arXiv 2509.25149, appendix on quantization): blocks
of 16, a scale in E4M3, and a float32 for all of a tensor, which puts its largest block at E4M3's end. MXFP4 (OCP
Microscaling Formats 1.0, section 6): blocks of 32, a power of two. torch stores numbers of 4 bits, and rounds to none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

LARGEST = 6.0  # of E2M1
E4M3 = torch.finfo(torch.float8_e4m3fn).max
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
SIGN = 8  # the bit of a code


def round_e2m1(x: Tensor) -> Tensor:
    """The nearest numbers of E2M1, of two the one whose last bit is 0; what is larger than 6 becomes 6."""
    size = x.abs().clamp(max=LARGEST)
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))  # as x
    return torch.copysign((size / step).round() * step, x)


@dataclass(frozen=True)
class Format:
    """block: numbers that share a scale. scale: what is kept of the scale that a block asks for, and in which dtype.

    top: of a tensor's largest number, where it is put first by a float32 for all of it; 0: there is none.
    """

    name: str
    block: int
    scale: Callable[[Tensor], Tensor]
    top: float = 0.0

    def narrow(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x, float32 (.., dim), as numbers of E2M1 (.., dim), and scales in 8 bits (.., blocks)."""
        blocks = _blocks(x, self.block)  # (.., blocks, block)
        scale = self.scale(blocks.abs().amax(-1))  # (.., blocks)
        wide = scale.float()[..., None]  # (.., blocks, 1)
        numbers = torch.where(wide > 0, blocks / wide, 0.0)  # so small that their scale is 0: E4M3 ends at 2^-9
        return round_e2m1(numbers).flatten(-2)[..., : x.shape[-1]], scale

    def widen(self, numbers: Tensor, scale: Tensor) -> Tensor:
        """What `narrow` made, as float32 (.., dim)."""
        wide = _blocks(numbers, self.block) * scale.float()[..., None]  # (.., blocks, block)
        return wide.flatten(-2)[..., : numbers.shape[-1]]

    def rounded(self, x: Tensor, *dims: int) -> Tensor:
        """What is left of x, float32 (.., dim), with blocks along the last dimension.

        dims: over which the float32 scale is shared, where the format has one.
        """
        if not self.top:
            return self.widen(*self.narrow(x))
        whole = (x.abs().amax(dims, keepdim=True) / self.top).clamp(min=torch.finfo(torch.float32).tiny)
        return self.widen(*self.narrow(x / whole)) * whole


def _blocks(x: Tensor, block: int) -> Tensor:
    """(.., dim) -> (.., blocks, block), the last of them padded with zeros."""
    return pad(x, (0, -x.shape[-1] % block)).unflatten(-1, (-1, block))


def _e4m3(peak: Tensor) -> Tensor:
    return (peak / LARGEST).clamp(max=E4M3).to(torch.float8_e4m3fn)


def _e8m0(peak: Tensor) -> Tensor:
    """2 to the peak's exponent less E2M1's largest, 2: a peak between 6 and 8 times it is cut off."""
    exponent = torch.frexp(peak).exponent - 3  # floor(log2(peak)) is one less than frexp's
    return torch.ldexp(torch.ones_like(peak), exponent.clamp(min=-126)).to(torch.float8_e8m0fnu)


FORMATS = {
    "nvfp4": Format("nvfp4", 16, _e4m3, LARGEST * E4M3),
    "mxfp4": Format("mxfp4", 32, _e8m0),
}


def encode(numbers: Tensor) -> Tensor:
    """Numbers of E2M1 as their 4 bits, in a byte each: sign, two of exponent, one of mantissa."""
    levels = torch.tensor(MAGNITUDES, device=numbers.device)
    return (torch.bucketize(numbers.abs(), levels) + SIGN * numbers.signbit()).to(torch.uint8)


def decode(codes: Tensor) -> Tensor:
    """What `encode` made, as float32."""
    levels = torch.tensor((*MAGNITUDES, *(-x for x in MAGNITUDES)), device=codes.device)
    return levels[codes.int()]
