"""Linear attention: the softmax replaced by a feature map, phi(q) . sum_j phi(k_j) v_j / phi(q) . sum_j phi(k_j).

The sums are taken first and over keys alone, so time is O(l) and no l x l matrix exists.
Sources: Katharopoulos et al. 2020, "Transformers are RNNs" (equations 4 to 7); the chunked form of the causal sum as in
Hua et al. 2022, "Transformer Quality in Linear Time", section 3.2. `features` has those of the maps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import ClassVar

import torch

from attnbench.plugin import Attention, Choice, Decoding, FeatureMap, Implementation, Option
from attnbench.workload import Workload

from .. import triton_kit
from . import native
from .features import Phi, elu, elu_kept, favor, favor_unscaled, orthogonal
from .plain import Scan


class Linear(Choice):
    """Linear attention in float32, whatever the dtype of the inputs.

    `impl=native` is a C++ kernel for elu features on a CPU, `impl=triton` kernels for them on CUDA, `impl=torch` plain
    torch; `impl=auto` is a kernel where one can run. On a CPU training takes plain torch, which keeps each chunk's
    scores and features for the backward pass; the GPU kernels have their own. They sum in float32, too, but multiply
    bfloat16 in bfloat16.
    """

    family: ClassVar[str] = "kernel"
    options: ClassVar[Mapping[str, Option]] = {
        "features": Option("elu", "phi: elu(x) + 1, or Performer's positive random features, FAVOR+", ("elu", "favor")),
        "count": Option(256, "favor: number of random features"),
        "chunk": Option(0, "torch, causal: tokens at a time, chunk^2 scores each; 0: 64 on a CPU, 512 on CUDA"),
        "impl": Option("auto", "what computes it", ("auto", "torch", "native", "triton")),
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
            return FeatureMap(query=lambda x: elu_kept(x)[0], key=lambda x: elu_kept(x)[0])
        projection = orthogonal(self.count, workload.head_dim, workload.seed)  # (count, head_dim)
        phi = partial(favor_unscaled, projection=projection, scale=workload.scale)
        return FeatureMap(query=phi, key=phi)

    def implementations(self, workload: Workload) -> Sequence[Implementation]:
        def no_tensor_cores(w: Workload) -> str | None:
            return "in float32 the Triton kernels do without tensor cores" if w.dtype == "float32" else None

        gpu = Implementation(
            "triton", self._triton, self._no_triton, no_tensor_cores,
            lambda w: triton_kit.kernels(__name__).workspace_bytes(w), lambda w: triton_kit.kernels(__name__).flops(w),
        )  # fmt: skip
        cpu = Implementation(
            "native", self._native, self._no_native, workspace_bytes=native.workspace_bytes, flops=self._products
        )
        plain = Implementation("torch", self._torch, workspace_bytes=self._torch_bytes, flops=self._products)
        return (gpu, plain, cpu) if workload.device == "cuda" else (cpu, plain, gpu)

    def _triton(self, workload: Workload) -> Attention:
        gpu, w = triton_kit.kernels(__name__), workload
        return Attention(partial(gpu.attention, is_causal=w.is_causal), f"triton, {self._what()}, {gpu.described(w)}")

    def _no_triton(self, workload: Workload) -> str | None:
        if workload.device == "cuda" and workload.phase == "decode":
            return "the Triton kernels go through all keys"
        if workload.device == "cuda" and (self.features != "elu" or self.chunk):
            return "the Triton kernels are for elu features and their own chunk"
        return triton_kit.unsupported(workload)

    def _native(self, workload: Workload) -> Attention:
        how = f"{native.described()} in float32, {self._what()}, chunks of {native.CHUNK}"
        return Attention(native.linear(workload), how)

    def _no_native(self, workload: Workload) -> str | None:
        if workload.device == "cpu" and workload.phase == "forward" and (self.features != "elu" or self.chunk):
            return "the C++ kernel is for elu features and its own chunk"
        return native.unsupported(workload)

    def _torch(self, workload: Workload) -> Attention:
        scan, asked = self._scan(workload), " (as asked)" if self.impl == "torch" else ""
        return Attention(scan, f"plain torch, {self._what()}, chunks of {scan.step}{asked}")

    def _torch_bytes(self, workload: Workload) -> int | None:
        """The sums, and what one chunk of queries and of keys holds in float32; nothing of it grows with l."""
        return None if workload.phase == "train" else 4 * self._scan(workload).floats()

    def decoding(self, workload: Workload) -> Decoding:
        """The state is the running sum, which does not grow: a token adds to it, and its query reads it."""
        scan = self._scan(workload)
        return Decoding(scan.start, scan.after, f"plain torch, {self._what()}, a sum as state")

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

    def _what(self) -> str:
        return "elu(x) + 1" if self.features == "elu" else f"FAVOR+ with {self.count} features"

    def _size(self, workload: Workload) -> int:
        return workload.head_dim if self.features == "elu" else self.count

    def _scan(self, workload: Workload) -> Scan:
        # On a GPU a chunk costs a dozen kernel launches, on a CPU its scores.
        chunk = self.chunk or (64 if workload.device == "cpu" else 512)
        return Scan(workload, self._phi(workload), self._size(workload), chunk)

    def _phi(self, workload: Workload) -> Phi:
        if self.features == "elu":
            return elu_kept if workload.phase == "train" else elu
        projection = orthogonal(self.count, workload.head_dim, workload.seed).to(workload.device, torch.float32)
        return partial(favor, projection=projection, scale=workload.scale)
