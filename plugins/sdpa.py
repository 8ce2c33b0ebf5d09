"""torch.nn.functional.scaled_dot_product_attention, with the kernel that torch really runs on record.

Causal attention with more keys than queries: torch's `is_causal` is aligned top-left, the workload's mask
bottom-right. The cheapest right way differs by backend (float32, 8 heads, 4096 queries on 8192 keys, on a CPU):

- CPU flash: full attention to the first `kv_seq - seq` keys and causal attention to the others, merged by
  log-sum-exp (`_PastAndPresent`). It computes what is visible and nothing else, and holds one more output (8 MiB).
  A mask would compute everything, causal or not, and hold 64 to 192 MiB; queries padded in front to kv_seq rows
  would compute kv_seq^2 / 2 pairs. Like `is_causal` itself it skips blocks above the diagonal. In phase train torch's
  backward operator runs on either part.
- CUDA flash, efficient: `causal_lower_right`, which both kernels know how to align; no mask is made.
- math, cudnn: a mask (seq, kv_seq) made in `build`, additive and in the dtype that the kernel adds it in, so that
  no call converts it. `causal_lower_right` would make it anew in every call.

A window is such a mask on every backend that takes one: torch has no other way, and computes what it hides. So is a
tree of drafts, and a bias, (heads, seq, kv_seq): of 8 heads and 16384 tokens 8 GiB in float32.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from attnbench.plugin import Attention, Call, Option, Plugin, expand_kv
from attnbench.workload import Workload

from .autograd import dense_rows, differentiable
from .pieces import hidden, is_cut, whole_bias

BACKENDS = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}

# What scaled_dot_product_attention comes down to; math is no operator of its own, but products and a softmax.
_OPERATORS = {
    "flash": ("_scaled_dot_product_flash_attention", "_flash_attention_forward"),
    "efficient": ("_scaled_dot_product_efficient_attention", "_efficient_attention_forward"),
    "cudnn": ("_scaled_dot_product_cudnn_attention", "_cudnn_attention_forward"),
    "math": ("_scaled_dot_product_attention_math", "bmm", "mm", "baddbmm"),
}


class Sdpa(Plugin):
    """torch's fused attention: FlashAttention-2 (Dao 2023), memory-efficient (xformers' CUTLASS), cuDNN or math.

    A named backend is asked for by `torch.nn.attention.sdpa_kernel` inside each call, which adds up to a tenth of a
    millisecond, but where torch would take it by itself: then, and for "auto", torch is called as it is.
    """

    options: ClassVar[Mapping[str, Option]] = {
        "backend": Option("auto", "which of torch's kernels; auto leaves the choice to torch", ("auto", *BACKENDS))
    }
    backend: str
    honours = ("scale", "window", "tree", "alibi-bias", "relative-bias")

    def supports(self, workload: Workload) -> str | None:
        return None if self.backend == "auto" else _refusal(workload, self.backend)

    def workspace_bytes(self, workload: Workload) -> int | None:
        """What the chosen kernel holds beside inputs and output; see `_flash_bytes` and `_math_bytes`."""
        w = workload
        if w.phase == "train":
            return None
        kernel = self._kernel(w)
        if _has_matrix(w):
            return _matrix_bytes(w) + _flash_bytes(w) if kernel == "flash" and w.on_host else None
        if kernel == "math":
            return _math_bytes(w)
        if kernel == "flash":
            return _flash_bytes(w)
        if kernel == "efficient":  # expands grouped keys and values; no log-sum-exp unless gradients are asked for
            return w.batch * w.heads * w.kv_seq * (w.head_dim + w.value_dim) * w.itemsize if w.group > 1 else 0
        return None

    def build(self, workload: Workload) -> Call | Attention:
        w = workload
        kernel = self._kernel(w)
        call, how = _call(w, kernel)
        if self.backend != "auto" and _dispatched(w, call) != self.backend:
            call = sdpa_kernel(BACKENDS[self.backend])(call)  # as a decorator: it is chosen in each call
        return Attention(call, f"torch sdpa: {_dispatched(w, call)}{how}")

    def _kernel(self, workload: Workload) -> str:
        return _automatic(workload) if self.backend == "auto" else self.backend


def _is_shifted(w: Workload) -> bool:
    """Causal, but not as torch's `is_causal` means it. A single query sees every key: that needs no mask at all."""
    return w.is_causal and w.offset > 0 and w.seq > 1 and not _has_matrix(w)


def _has_matrix(w: Workload) -> bool:
    """Whether only a matrix in memory tells any backend what is asked of the scores."""
    return is_cut(w) or bool(w.bias)


def _needs_mask(w: Workload, backend: str) -> bool:
    """Whether only a mask in memory tells this backend what is seen."""
    return _has_matrix(w) or (_is_shifted(w) and backend in ("math", "cudnn"))


def _call(w: Workload, kernel: str) -> tuple[Call, str]:
    """The call that is right for `kernel`, and what there is to say about it."""
    gqa = w.group > 1
    how = ", keys and values expanded for each query head" if gqa and kernel in ("math", "efficient") else ""
    attention = partial(scaled_dot_product_attention, scale=w.scale, enable_gqa=gqa)
    if _has_matrix(w):
        what = " and ".join(["bias"] * bool(w.bias) + ["mask"] * w.is_causal)
        return partial(attention, attn_mask=_mask(w, kernel)), f"{how}, {what} made in build"
    if not _is_shifted(w):
        return partial(attention, is_causal=w.is_causal and w.seq > 1), how
    if kernel == "flash" and w.device == "cpu":
        both = _PastAndPresent(w.offset, w.scale)
        call = differentiable(both.forward, both.backward) if w.phase == "train" else both
        return call, ", past keys and causal part merged by log-sum-exp"
    if kernel in ("flash", "efficient"):
        from torch.nn.attention.bias import causal_lower_right  # loads torch's compiler, which takes a second

        aligned = causal_lower_right(w.seq, w.kv_seq)

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            if kernel == "efficient":  # the operator behind causal_lower_right does not expand them itself
                key, value = expand_kv(key, w.heads), expand_kv(value, w.heads)
            return attention(query, key, value, attn_mask=aligned)

        return attend, how + ", causal_lower_right"
    return partial(attention, attn_mask=_mask(w, kernel)), how + ", mask made in build"


def _mask(w: Workload, kernel: str) -> Tensor:
    """0 where the query sees the key and -inf elsewhere: (seq, kv_seq); math adds it in float32.

    Where there is a bias, that instead of 0: (1, heads, seq, kv_seq).
    """
    dtype = torch.float32 if kernel == "math" else getattr(torch, w.dtype)
    if (bias := whole_bias(w, dtype)) is not None:
        return (bias.masked_fill_(hidden(w), -torch.inf) if w.is_causal else bias)[None]
    return torch.zeros(w.seq, w.kv_seq, dtype=dtype, device=w.device).masked_fill_(hidden(w), -torch.inf)


class _PastAndPresent:
    """Bottom-right causal attention out of two calls of torch's CPU flash operator, each of which is O(l).

    softmax over past and present keys together is the mean of the two softmaxes, weighted by their sums of
    exponentials: o = sigmoid(lse_past - lse_present) o_past + sigmoid(lse_present - lse_past) o_present
    (the merging of blocks in FlashAttention-2, Dao 2023, section 3.1.1).

    The backward operator makes softmax anew from the log-sum-exp, and needs the output only in rowsum(dO * O): given
    those of all keys, it finds what either part adds to the gradients.
    """

    def __init__(self, past: int, scale: float) -> None:
        self.past, self.scale = past, scale

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self._merged(query, key, value)[0]

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        out, past_lse, lse = self._merged(query, key, value)
        return out, torch.logaddexp(past_lse, lse)

    def backward(
        self, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, out_gradient: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = dense_rows(query, key, value)
        n, operator = self.past, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
        flash = partial(operator, scale=self.scale)
        past = flash(out_gradient, query, key[:, :, :n], value[:, :, :n], out, lse, 0.0, False)  # dQ, dK, dV
        present = flash(out_gradient, query, key[:, :, n:], value[:, :, n:], out, lse, 0.0, True)
        dk, dv = (torch.cat(parts, 2) for parts in zip(past[1:], present[1:], strict=True))  # (.., kv_seq, dim)
        return past[0] + present[0], dk, dv

    def _merged(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The output, and the log-sum-exp of each part."""
        # The operator that scaled_dot_product_attention dispatches to; called directly, for its log-sum-exp, it takes
        # rows for dense without a look.
        query, key, value = dense_rows(query, key, value)
        flash = partial(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default, scale=self.scale)
        n = self.past
        past, past_lse = flash(query, key[:, :, :n], value[:, :, :n])  # (batch, heads, seq, dim), (batch, heads, seq)
        out, lse = flash(query, key[:, :, n:], value[:, :, n:], is_causal=True)  # alike
        past.mul_(torch.sigmoid(past_lse - lse)[..., None].to(past.dtype))  # a float32 weight would make a float32 copy
        return out.mul_(torch.sigmoid(lse - past_lse)[..., None].to(out.dtype)).add_(past), past_lse, lse


class _Reached(Exception):
    """A call has come to the kernel of this name."""


class _UpToKernel(TorchDispatchMode):
    """Ends a call at its first attention operator, or matrix product, before that is computed."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # keeping torch's compiler out would load it, and that takes a second

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::")
        for kernel, operators in _OPERATORS.items():
            if name.startswith(operators):
                raise _Reached(kernel)
        return func(*args, **(kwargs or {}))


def _dispatched(w: Workload, call: Call) -> str:
    """The kernel that torch's dispatcher comes to in this very call, on tensors of the workload's shapes."""
    train, dtype = w.phase == "train", getattr(torch, w.dtype)
    tensors = [torch.empty(shape, dtype=dtype, device=w.device, requires_grad=train) for shape in w.shapes]
    try:
        with torch.set_grad_enabled(train), _UpToKernel():
            call(*tensors)
    except _Reached as kernel:
        return str(kernel)
    return "no kernel that is known"


def _dummies(w: Workload) -> list[Tensor]:
    """Tensors of the workload's shapes that share one row each: torch's rules look at shapes, dtypes and devices."""
    dtype = getattr(torch, w.dtype)
    rows = (torch.empty(shape[-1], dtype=dtype, device=w.device).expand(shape) for shape in w.shapes)
    return [row.requires_grad_(w.phase == "train") for row in rows]


def _choice(w: Workload, masked: bool = False) -> str:
    """The backend that torch's dispatcher takes under the flags now set, with a mask in memory or without."""
    # Shifted without a mask is full attention to the dispatcher: it would refuse what causal_lower_right can do.
    causal = w.is_causal and w.seq > 1 and not (_is_shifted(w) or _has_matrix(w))
    query, key, value = _dummies(w)
    shape = (1, w.heads, w.seq, w.kv_seq) if w.bias else (w.seq, w.kv_seq)
    mask = query.new_empty(w.kv_seq).expand(shape) if masked else None
    chosen = torch._fused_sdp_choice(query, key, value, attn_mask=mask, is_causal=causal, enable_gqa=w.group > 1)
    return next((name for name, backend in BACKENDS.items() if backend.value == chosen), f"backend {chosen}")


def _automatic(w: Workload) -> str:
    """What torch chooses by itself; for a shifted causal mask, what `causal_lower_right` would choose on CUDA."""
    if _has_matrix(w):
        return _choice(w, masked=True)
    if not _is_shifted(w) or w.device == "cpu":
        return _choice(w)
    aligned = (name for name in ("flash", "efficient") if _refusal(w, name) is None)
    return next(aligned, None) or _choice(w, masked=True)


def _refusal(w: Workload, backend: str) -> str | None:
    """None, or why torch can't run the workload on `backend`, in torch's own words where it has any."""
    if w.device == "cpu" and backend in ("efficient", "cudnn"):
        return f"torch has no {backend} kernel for the CPU"
    with warnings.catch_warnings(record=True) as said, sdpa_kernel(BACKENDS[backend]):
        warnings.simplefilter("always")
        try:
            _choice(w, masked=_needs_mask(w, backend))
        except RuntimeError as error:
            lines = [_first_line(str(warning.message)) for warning in said]
            reasons = [line for line in lines if "not used because" not in line and "disabled" not in line]
            return " ".join(reasons) or _first_line(str(error))
    return None


def _first_line(text: str) -> str:
    return text.splitlines()[0].split(" (Triggered internally")[0].strip()


def _flash_bytes(w: Workload) -> int:
    """Flash holds the log-sum-exp of each row and, on a CPU, a tile for each thread.

    The tile is a block of at most 256 queries by 512 keys in float32 with its running maximum, sum and output, and
    once more in the workload's dtype where that is narrower (torch, FlashAttentionKernel.cpp).
    """
    rows = w.batch * w.heads * w.seq
    lse = 4 * rows
    if w.device != "cpu":
        return lse
    block = min(w.seq, 256 if w.seq >= 768 else 64 if w.seq >= 192 else 32)
    longest = max(w.offset, w.seq) if _is_shifted(w) else w.kv_seq
    keys = min(longest, 512)
    tile = 4 * block * (keys + 2 + w.value_dim) + (block * keys * w.itemsize if w.itemsize < 4 else 0)
    if not _is_shifted(w):
        return lse + w.threads * tile
    past = rows * w.value_dim * w.itemsize
    return past + 2 * lse + w.threads * tile


def _matrix_bytes(w: Workload) -> int:
    """Of `_mask`, but for math."""
    return (w.heads if w.bias else 1) * w.seq * w.kv_seq * w.itemsize


def _math_bytes(w: Workload) -> int:
    """The math backend computes in float32 whatever the dtype, and holds two score matrices and a bool one.

    At its peak, in `_safe_softmax`: scores, their softmax, which scores are -inf, Q and K each times sqrt(scale),
    float32 copies of narrower inputs, K and V repeated for each query head where they are grouped, and torch's own
    causal mask. The output comes later.
    """
    rows = w.batch * w.heads
    query, key, value = (rows * n for n in (w.seq * w.head_dim, w.kv_seq * w.head_dim, w.kv_seq * w.value_dim))
    total = (4 + 4 + 1) * rows * w.seq * w.kv_seq + 4 * (query + key)
    if w.itemsize < 4:
        total += 4 * (query + (key + value) // w.group)
    if w.group > 1:
        total += 4 * (key + value)
    if w.is_causal and w.seq > 1 and not _is_shifted(w):
        total += 4 * w.seq * w.kv_seq
    return total - rows * w.seq * w.value_dim * w.itemsize
