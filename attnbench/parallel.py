"""The contract of attention across processes: who holds which tokens, and what the processes of a group do together.

A scheme is a subclass of `Scheme` and an entry point in the group `attnbench.parallel`. Each process, a rank of a
`torch.distributed` group, holds its part of query, key and value, calls what `build` gave with that part alone, and
gets its part of the output. The harness starts the processes, counts the bytes that each has sent and the memory that
it held, puts the parts together and judges the whole against exact attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from attnbench.plugin import Attention, Call, Configured
from attnbench.workload import Workload

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup


class Scheme(Configured):
    """One way to share attention among processes. Its name is that of its entry point; options become attributes.

    Lengths split evenly: a rank holds as many tokens as every other one, of queries as of keys.
    """

    formula: str = ""
    """Which of `theory.schemes.SCHEMES` says what it sends; "" where none does, see `sent_bytes`."""

    trains: ClassVar[bool] = True
    """Whether torch can differentiate its call."""

    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")

    preloads: ClassVar[tuple[str, ...]] = ()
    """Modules of torch that it needs and that take seconds to load: the harness loads them once for all processes."""

    def unsupported(self, workload: Workload, world: int) -> str | None:
        """None, or in a few words why so many processes can't share this workload."""
        return uneven(workload, world)

    def tokens(self, workload: Workload, rank: int, world: int) -> Sequence[range]:
        """The tokens that a rank holds, in the order in which it holds them: here one run of them."""
        each = workload.seq // world
        return [range(rank * each, (rank + 1) * each)]

    def shard(self, tensor: Tensor, workload: Workload, rank: int, world: int) -> Tensor:
        """A rank's part of a whole tensor (batch, heads, seq, dim): (batch, heads, seq / world, dim), contiguous."""
        import torch

        runs = self.tokens(workload, rank, world)
        return torch.cat([tensor[:, :, run.start : run.stop] for run in runs], 2)

    def unshard(self, parts: Sequence[Tensor], workload: Workload) -> Tensor:
        """The whole (batch, heads, seq, dim) of all ranks' parts, in their order."""
        world, first = len(parts), parts[0]
        whole = first.new_empty(*first.shape[:2], workload.seq, first.shape[3])
        for rank, part in enumerate(parts):
            at = 0
            for run in self.tokens(workload, rank, world):
                whole[:, :, run.start : run.stop] = part[:, :, at : at + len(run)]
                at += len(run)
        return whole

    def build(self, workload: Workload, group: ProcessGroup) -> Call | Attention:
        """What each process of the group calls: parts of query, key and value -> its part of the output.

        query (batch, heads, seq / world, head_dim), key and value likewise, -> (batch, heads, seq / world, value_dim).
        All ranks make their calls in the same order. Where it `trains`, all of them differentiate, too.
        """
        raise NotImplementedError(f"{type(self).__name__} has no build")

    def sent_bytes(self, workload: Workload, world: int) -> int | None:
        """Payload that each process sends in a call, backward pass included; None: as `formula` has it."""
        return None


def uneven(workload: Workload, world: int, runs: int = 1) -> str | None:
    """Why a length does not split into as many equal runs of tokens for each process; None where it does."""
    if workload.seq % (world * runs) == 0:
        return None
    each = "" if runs == 1 else f", {runs} runs for each"
    return f"{workload.seq} tokens do not split evenly among {world} processes{each}"


def refusal(scheme: Scheme, workload: Workload, world: int) -> str | None:
    """Why a scheme can't share this workload among so many processes; None where it can."""
    if workload.trains and not scheme.trains:
        return "it has no backward pass"
    if workload.device not in scheme.devices:
        return f"it does not run on {workload.device}"
    return scheme.unsupported(workload, world)
