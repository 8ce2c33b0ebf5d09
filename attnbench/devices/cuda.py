"""An NVIDIA GPU, by CUDA: its own clock (`cuda_timer`), torch's count of its memory, and what NVML says of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from attnbench.devices.bursts import Timer
from attnbench.devices.device import Device

if TYPE_CHECKING:
    from torch import Tensor

    from attnbench.devices.nvml import Gpu


class Cuda(Device):
    """The GPU that torch uses in this process."""

    l2 = ("kept", "flushed")
    guessed_flops_per_s = 5e13
    group_backend = "nccl"

    def usual_dtype(self) -> str:
        return "bfloat16"

    def missing(self) -> str | None:
        import torch

        return None if torch.cuda.is_available() else "this machine or this torch has no CUDA device"

    def facts(self) -> dict[str, Any]:
        import torch

        from attnbench.devices import nvml

        if self.missing():
            return {"gpu": None, "gpu_memory_bytes": None, "gpu_free_bytes": None, "cuda": torch.version.cuda}
        found = torch.cuda.get_device_properties()
        free, total = torch.cuda.mem_get_info()
        return {
            "gpu": found.name,
            "cuda": torch.version.cuda,
            "gpu_memory_bytes": total,
            "gpu_free_bytes": free,
            "gpu_multiprocessors": found.multi_processor_count,
            "gpu_l2_bytes": found.L2_cache_size,
            "gpu_capability": f"{found.major}.{found.minor}",
            "gpu_driver": nvml.driver(),
            "gpu_state": self.state() or None,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        }

    def unmeasured(self) -> dict[str, str]:
        return {} if self._gpu() else dict.fromkeys(("energy_j", "process_bytes", "clock_hz"), "NVML is not to be had")

    def clocks(self) -> tuple[Any, ...]:
        import torch

        return torch.cuda, torch.cuda.Event

    def free_bytes(self) -> int:
        import torch

        return int(torch.cuda.mem_get_info()[0])

    def cache_bytes(self) -> int | None:
        import torch

        return int(torch.cuda.get_device_properties().L2_cache_size)

    def one_of(self, rank: int, world: int) -> str | None:
        import torch

        if (there := torch.cuda.device_count()) < world:
            return f"{world} processes need a GPU each, and here are {there}"
        torch.cuda.set_device(rank)
        return None

    def begin(self, limit: int | None) -> None:
        """limit: what asks for more gets torch's OutOfMemoryError."""
        import torch

        if limit is not None:
            total = torch.cuda.mem_get_info()[1]
            torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))

    def synchronise(self) -> None:
        import torch

        torch.cuda.synchronize()

    def timer(self, call: Callable[..., Any], tensors: Sequence[Tensor], l2: str = "kept") -> Timer:
        from attnbench.devices.cuda_timer import CudaTimer

        return CudaTimer(call, tensors, l2)

    def peak(self, call: Callable[[], Any]) -> tuple[Any, int]:
        import torch

        before = self.kept_bytes()
        torch.cuda.reset_peak_memory_stats()
        out = call()
        self.synchronise()
        return out, int(torch.cuda.max_memory_allocated()) - before

    def kept_bytes(self) -> int:
        """Those of torch's tensors."""
        import torch

        self.synchronise()
        return int(torch.cuda.memory_allocated())

    def reserved_bytes(self) -> int:
        import torch

        return int(torch.cuda.max_memory_reserved())

    def process_bytes(self) -> int | None:
        return gpu.process_bytes() if (gpu := self._gpu()) else None

    def state(self) -> dict[str, Any]:
        return gpu.state() if (gpu := self._gpu()) else {}

    def energy_j(self) -> float | None:
        return gpu.energy_j() if (gpu := self._gpu()) else None

    def give_back(self) -> None:
        import torch

        torch.cuda.empty_cache()

    def _gpu(self) -> Gpu | None:
        from attnbench.devices import nvml

        return nvml.current()


DEVICE = Cuda()
