"""Linear attention: the softmax replaced by a feature map, phi(q) . sum_j phi(k_j) v_j / phi(q) . sum_j phi(k_j).

The sums are taken first and over keys alone, so time is O(l) and no l x l matrix exists.
Sources: Katharopoulos et al. 2020, "Transformers are RNNs" (equations 4 to 7); Choromanski et al. 2021, "Rethinking
Attention with Performers" (FAVOR+, lemma 1 and section 2.4); the chunked form of the causal sum as in Hua et al. 2022,
"Transformer Quality in Linear Time", section 3.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from types import ModuleType
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnbench.plugin import Attention, Choice, Decoding, FeatureMap, Implementation, Option
from attnbench.workload import Workload

from .native import attention as kernels
from .native import compiler

LOG2_E = 1 / math.log(2)
STEP = 1024  # tokens at a time where nothing but memory asks for chunks
MAX_DIM = 256  # what the GPU kernels' tiles hold

_State: TypeAlias = tuple[Tensor, Tensor]  # of `_Sums`

Phi: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor | None]]
"""x (..., length, head_dim) -> features (..., length, n) and log2 (..., length, 1) of the factor taken out of each row
to keep it within float32's range; None where no factor was."""


class Linear(Choice):
    """Linear attention in float32, whatever the dtype of the inputs.

    `impl=avx512` is a C++ kernel for elu features on a CPU, `impl=triton` kernels for them on CUDA, `impl=torch` plain
    torch; `impl=auto` is a kernel where one can run. On a CPU training takes plain torch, which keeps each chunk's
    scores and features for the backward pass; the GPU kernels have their own. They sum in float32, too, but multiply
    bfloat16 in bfloat16.
    """

    family: ClassVar[str] = "kernel"
    options: ClassVar[Mapping[str, Option]] = {
        "features": Option("elu", "phi: elu(x) + 1, or FAVOR+ positive random features", ("elu", "favor")),
        "count": Option(256, "favor: number of random features"),
        "chunk": Option(0, "torch, causal: tokens at a time, chunk^2 scores each; 0: 64 on a CPU, 512 on CUDA"),
        "impl": Option("auto", "what computes it", ("auto", "torch", "avx512", "triton")),
    }
    features: str
    count: int
    chunk: int

    def supports(self, workload: Workload) -> str | None:
        if self.count < 1 or self.chunk < 0:
            return "count must be at least 1, chunk at least 0"
        return super().supports(workload)

    def definition(self, workload: Workload) -> FeatureMap:
        if self.features == "elu":
            return FeatureMap(query=lambda x: _elu_kept(x)[0], key=lambda x: _elu_kept(x)[0])
        projection = _orthogonal(self.count, workload.head_dim, workload.seed)
        phi = partial(_favor_unscaled, projection=projection, scale=workload.scale)
        return FeatureMap(query=phi, key=phi)

    def implementations(self, workload: Workload) -> Sequence[Implementation]:
        def no_tensor_cores(w: Workload) -> str | None:
            return "in float32 the Triton kernels do without tensor cores" if w.dtype == "float32" else None

        gpu = Implementation(
            "triton", self._triton, self._no_triton, no_tensor_cores, _triton_bytes, lambda w: _gpu_kernels().flops(w)
        )
        cpu = Implementation("avx512", self._avx512, self._no_kernel, workspace_bytes=_cpu_bytes, flops=self._products)
        plain = Implementation("torch", self._torch, workspace_bytes=self._torch_bytes, flops=self._products)
        return (gpu, plain, cpu) if workload.device == "cuda" else (cpu, plain, gpu)

    def _products(self, workload: Workload) -> int:
        """Multiplications and additions: features, the sums, reading them, and the causal chunks' own scores."""
        w = workload
        n, d = self._size(w), w.value_dim + 1  # the normaliser is one more value
        rows, keys = w.batch * w.heads * w.seq, w.batch * w.kv_heads * (w.kv_seq - w.past)
        total = 2 * n * d * (rows + keys)
        if self.features == "favor":
            total += 2 * n * w.head_dim * (rows + keys)
        if w.is_causal:
            total += 2 * rows * self._scan(w).step * (n + d)
        return total

    def _torch_bytes(self, workload: Workload) -> int | None:
        """The sums, and what one chunk of queries and of keys holds in float32; nothing of it grows with l."""
        return None if workload.phase == "train" else 4 * self._scan(workload).floats()

    def _torch(self, workload: Workload) -> Attention:
        scan, asked = self._scan(workload), " (as asked)" if self.impl == "torch" else ""
        return Attention(scan, f"plain torch, {self._what()}, chunks of {scan.step}{asked}")

    def _avx512(self, workload: Workload) -> Attention:
        w, kernel = workload, getattr(compiler.load("linear.cpp"), f"linear_{workload.dtype}")
        call = kernels.caller(kernel, w, kernels.dense(w, w.seq), kernels.KEYS)
        return Attention(call, f"C++ AVX-512 in float32, {self._what()}, chunks of {kernels.KEYS}")

    def _triton(self, workload: Workload) -> Attention:
        gpu, w = _gpu_kernels(), workload
        return Attention(partial(gpu.attention, is_causal=w.is_causal), f"triton, {self._what()}, {gpu.described(w)}")

    def decoding(self, workload: Workload) -> Decoding:
        """The state is the running sum, which does not grow: a token adds to it, and its query reads it."""
        scan = self._scan(workload)

        def start(key: Tensor, value: Tensor, capacity: int) -> _State:
            sums = _Sums.empty(key, workload, scan.n)
            for part in _parts(key.shape[2], STEP):
                sums.add(*scan.keys(key[:, :, part], value[:, :, part]))
            return sums.total, sums.scale

        def step(state: _State, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, _State]:
            sums = _Sums(state[0].clone(), state[1])
            out = scan.after(sums, query, key, value)
            return out, (sums.total, sums.scale)

        return Decoding(start, step, f"plain torch, {self._what()}, a sum as state")

    def _what(self) -> str:
        return "elu(x) + 1" if self.features == "elu" else f"FAVOR+ with {self.count} features"

    def _no_kernel(self, workload: Workload) -> str | None:
        if workload.device != "cpu":
            return "the AVX-512 kernel is for a CPU"
        if workload.phase == "decode":
            return "the AVX-512 kernel goes through all keys"
        if workload.phase == "train":
            return "the AVX-512 kernel has no backward pass"
        if self.features != "elu" or self.chunk:
            return "the AVX-512 kernel is for elu features and its own chunk"
        if workload.dtype == "float16":
            return "the AVX-512 kernel is for float32 and bfloat16"
        return compiler.unsupported("linear.cpp")

    def _no_triton(self, workload: Workload) -> str | None:
        if workload.device != "cuda":
            return "the Triton kernels are for CUDA"
        if workload.phase == "decode":
            return "the Triton kernels go through all keys"
        if self.features != "elu" or self.chunk:
            return "the Triton kernels are for elu features and their own chunk"
        if max(workload.head_dim, workload.value_dim) > MAX_DIM:
            return f"the Triton kernels hold head and value dims up to {MAX_DIM}"
        return None if find_spec("triton") else "the Triton kernels need triton"

    def _size(self, workload: Workload) -> int:
        return workload.head_dim if self.features == "elu" else self.count

    def _scan(self, workload: Workload) -> _Scan:
        # On a GPU a chunk costs a dozen kernel launches, on a CPU its scores.
        chunk = self.chunk or (64 if workload.device == "cpu" else 512)
        return _Scan(workload, self._phi(workload), self._size(workload), chunk)

    def _phi(self, workload: Workload) -> Phi:
        if self.features == "elu":
            return _elu_kept if workload.phase == "train" else _elu
        projection = _orthogonal(self.count, workload.head_dim, workload.seed).to(workload.device, torch.float32)
        return partial(_favor, projection=projection, scale=workload.scale)


def _triton_bytes(workload: Workload) -> int | None:
    """The GPU kernels' sums, which grow with l up to as many as keep the GPU busy, and the rows' normalisers."""
    return None if workload.phase == "train" else _gpu_kernels().workspace_bytes(workload)


def _cpu_bytes(workload: Workload) -> int:
    """The C++ kernel's sums and chunk, of each thread."""
    dims, columns = (kernels.round_up(n, kernels.LANES) for n in (workload.head_dim, workload.value_dim))
    chunk = kernels.KEYS * (3 * dims + 2 * columns + kernels.KEYS)
    return 4 * workload.threads * ((dims + 1) * columns + chunk)


def _gpu_kernels() -> ModuleType:
    """Loaded where they are asked for: triton need not be there."""
    from . import linear_triton

    return linear_triton


def _elu(x: Tensor) -> tuple[Tensor, None]:
    """elu(x) + 1 (Katharopoulos, equation 7) = exp(min(x, 0)) + max(x, 0): positive, and no digit is lost near -1."""
    return x.clamp(max=0).mul_(LOG2_E).exp2_().add_(x.relu()), None


def _elu_kept(x: Tensor) -> tuple[Tensor, None]:
    """`_elu` with the power left in memory: its derivative is made of it."""
    return x.clamp(max=0).mul(LOG2_E).exp2() + x.relu(), None


def _favor_exponents(x: Tensor, projection: Tensor, scale: float) -> Tensor:
    """log2 of exp(w . x' - |x'|^2 / 2) for each row w, with x' = sqrt(scale) x: (..., length, count).

    Its mean over Gaussian w of phi(q) phi(k) is exp(scale q . k) (Performers, lemma 1). The factor
    1 / sqrt(count) is left out: it cancels in the normalised sum.
    """
    x = x * math.sqrt(scale)
    exponents: Tensor = x @ projection.mT
    return exponents.sub_(x.square().sum(-1, keepdim=True).mul_(0.5)).mul_(LOG2_E)


def _favor(x: Tensor, projection: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    exponents = _favor_exponents(x, projection, scale)
    top = exponents.detach().amax(-1, keepdim=True)  # (..., length, 1); a factor that cancels has no derivative
    return exponents.sub_(top).exp2_(), top


def _favor_unscaled(x: Tensor, projection: Tensor, scale: float) -> Tensor:
    return _favor_exponents(x, projection.to(x.device, x.dtype), scale).exp2_()


def _orthogonal(count: int, dim: int, seed: int) -> Tensor:
    """Random features' directions (count, dim) in float64, orthogonal in blocks of `dim` (Performers, section 2.4).

    Each row is distributed as a standard normal vector: a direction from the QR decomposition of a Gaussian matrix,
    times the length of another Gaussian vector.
    """
    generator = torch.Generator().manual_seed(seed)
    blocks = []
    for _ in range(math.ceil(count / dim)):
        q, r = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64, generator=generator))
        blocks.append(q * r.diagonal().sign())  # without the signs the directions would not be uniform
    lengths = torch.randn(count, dim, dtype=torch.float64, generator=generator).norm(dim=-1, keepdim=True)
    return torch.cat([block.mT for block in blocks])[:count] * lengths


class _Sums:
    """The running sum over keys of phi(k) (v, 1): (batch, kv_heads, n, value_dim + 1), times 2^-scale.

    The 1 beside the values makes the normaliser the last column of every product.
    """

    def __init__(self, total: Tensor, scale: Tensor, kept: bool = False) -> None:
        self.total, self.scale = total, scale
        self.kept = kept  # as a backward pass needs the sums that queries read; else changed in place

    @classmethod
    def empty(cls, like: Tensor, workload: Workload, n: int) -> _Sums:
        w = workload
        total = like.new_zeros(w.batch, w.kv_heads, n, w.value_dim + 1, dtype=torch.float32)
        scale = like.new_full((w.batch, w.kv_heads, 1, 1), -torch.inf, dtype=torch.float32)  # no key yet
        return cls(total, scale, kept=w.phase == "train")

    def add(self, phi: Tensor, log2: Tensor | None, values: Tensor) -> None:
        """Take in keys: phi (batch, kv_heads, length, n), their factors, and (v, 1) (..., length, value_dim + 1)."""
        if log2 is not None:
            scale = torch.maximum(self.scale, log2.amax(-2, keepdim=True))
            self._change(torch.mul, torch.exp2(self.scale - scale))
            phi, self.scale = phi * torch.exp2(log2 - scale), scale
        self._change(torch.add, phi.mT @ values)

    def _change(self, operation: Callable[..., Tensor], by: Tensor) -> None:
        self.total = operation(self.total, by) if self.kept else operation(self.total, by, out=self.total)


class _Scan:
    """Linear attention chunk by chunk, query (batch, heads, seq, head_dim) and so on as in the contract.

    The query heads that share a key/value head are rows of one matrix: keys and values are never expanded.
    """

    def __init__(self, workload: Workload, phi: Phi, n: int, chunk: int) -> None:
        w = self.workload = workload
        self.phi, self.n = phi, n
        self.scaled = phi not in (_elu, _elu_kept)
        self.step = min(chunk if w.is_causal else STEP, w.seq)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        w = self.workload
        grouped = query.view(w.batch, w.kv_heads, w.group, w.seq, w.head_dim)
        parts = []  # training: torch differentiates nothing that is written with out=
        out = query.new_empty(w.batch, w.kv_heads, w.group, w.seq, w.value_dim)
        sums = _Sums.empty(query, w, self.n)
        for part in _parts(w.offset if w.is_causal else w.kv_seq, STEP):  # keys that every query sees
            sums.add(*self.keys(key[:, :, part], value[:, :, part]))
        for rows in _parts(w.seq, self.step):
            q = grouped[:, :, :, rows].flatten(2, 3)  # (batch, kv_heads, group * rows, head_dim)
            if w.is_causal:
                part = slice(rows.start + w.offset, rows.stop + w.offset)  # keys on the diagonal
                o = self.diagonal(sums, q, key[:, :, part], value[:, :, part])
            else:
                o = self.phi(q.float())[0] @ sums.total  # (batch, kv_heads, group * rows, value_dim + 1)
            o = o.view(w.batch, w.kv_heads, w.group, -1, w.value_dim + 1)
            if w.phase == "train":
                parts.append((o[..., :-1] / o[..., -1:]).to(query.dtype))
            else:
                torch.div(o[..., :-1], o[..., -1:], out=out[:, :, :, rows])
            del o
        return (torch.cat(parts, 3) if parts else out).flatten(1, 2)

    def after(self, sums: _Sums, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """New tokens behind those that the sums hold, which they join: (batch, heads, seq, value_dim)."""
        w = self.workload
        q = query.reshape(w.batch, w.kv_heads, w.group * w.seq, w.head_dim)
        o = self.diagonal(sums, q, key, value) if key.shape[2] else self.phi(q.float())[0] @ sums.total
        out = o[..., :-1] / o[..., -1:]  # (batch, kv_heads, group * seq, value_dim)
        return out.to(query.dtype).view(w.batch, w.heads, w.seq, w.value_dim)

    def keys(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """phi(k) (batch, kv_heads, length, n), its factors, and (v, 1) (batch, kv_heads, length, value_dim + 1)."""
        return *self.phi(key.float()), pad(value.float(), (0, 1), value=1.0)

    def diagonal(self, sums: _Sums, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Queries over all earlier keys and, causally, over the keys of their own chunk, which join the sums.

        With factors 2^log2 taken out of the keys, row i is computed times 2^-top_i, where top_i is the largest factor
        of the keys that it sees: whatever the keys are, its largest term stays in range.
        """
        phi, _ = self.phi(query.float())  # (batch, kv_heads, group * length, n); a query's own factor cancels
        phi_k, log2, values = self.keys(key, value)
        length = phi_k.shape[2]
        scores = phi @ phi_k.mT  # (batch, kv_heads, group * length, length)
        grouped = scores.view(*scores.shape[:2], -1, length, length)
        out = phi @ sums.total  # (batch, kv_heads, group * length, value_dim + 1)
        if log2 is None:
            grouped.tril_()
        else:
            top = torch.maximum(log2.cummax(-2).values, sums.scale)  # (batch, kv_heads, length, 1)
            grouped.mul_(torch.exp2(log2.mT - top).tril_().unsqueeze(2))
            out.view(*grouped.shape[:4], -1).mul_(torch.exp2(sums.scale - top).unsqueeze(2))
        out += scores @ values
        sums.add(phi_k, log2, values)
        return out

    def floats(self) -> int:
        """Float32 numbers held at the peak of a call: the sums, and the larger one of the two loops' chunks."""
        w = self.workload
        n, wide, heads = self.n, w.value_dim + 1, w.batch * w.kv_heads
        copied = w.itemsize < 4  # key.float(), value.float(), query.float()
        # A key: its features twice (being made, or being scaled), or beside its values.
        key = max(2 * n + copied * w.head_dim, n + wide + copied * w.value_dim, self.scaled * (2 * n + wide))
        first = heads * min(w.offset if w.is_causal else w.kv_seq, STEP) * key
        # A query: its features, two products with sums, and where it meets the diagonal a row of scores.
        query = n + wide + (w.group > 1) * w.head_dim
        second = heads * self.step * w.group * max(query, 2 * n + copied * w.head_dim)
        if w.is_causal:
            second = heads * self.step * (w.group * (query + wide + self.step) + n + wide + self.scaled * self.step)
        return 2 * heads * n * wide + max(first, second)


def _parts(length: int, step: int) -> Iterator[slice]:
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))
