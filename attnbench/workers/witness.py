"""A second opinion from a process that no plugin enters: it draws the values itself and compares plain bytes.

Whatever a plugin has done to the process that it lives in, to torch's operators or to the judge there, is not here.
"""

import torch
from torch import Tensor

from attnbench.judge import deviation, reference
from attnbench.judge.deviation import Error
from attnbench.task.inputs import Pools
from attnbench.workers.messages import Given
from attnbench.workload import Workload


class Witness:
    """Exact softmax attention on the values of one workload at a time, as all its cells are asked about the same."""

    def __init__(self) -> None:
        self._key: tuple[Workload, Given, int] | None = None

    def judge(self, workload: Workload, given: Given, rows: int, output: bytes) -> tuple[Error, str | None]:
        """How far an output is from exact attention, and what is wrong with one that is said to be that.

        rows: from which those to look at are drawn. output: (batch, heads, seq, value_dim), contiguous.
        """
        if self._key != (workload, given, rows):
            self._rows = reference.sample_rows(workload.seq, rows)
            self._exact = self._made(workload, given)  # (batch, heads, n, value_dim)
            self._key = workload, given, rows
        w = workload
        out = torch.frombuffer(bytearray(output), dtype=getattr(torch, w.dtype)).view(w.batch, w.heads, w.seq, -1)
        error = deviation.compare(out[:, :, self._rows], self._exact)
        if not bool(out.isfinite().all()):  # all rows
            return error, "output has NaN or infinite values"
        return error, deviation.verdict(error, deviation.tolerance(w, "exact"))

    def _made(self, workload: Workload, given: Given) -> Tensor:
        torch.set_num_threads(workload.threads)
        torch.set_grad_enabled(False)
        pools, (first, *others) = Pools(workload), given.values
        pools.draw(first)
        for i, number in enumerate(others):
            pools.alter(number, few=i > 0 or not given.thorough)
        views = pools.views(given.calls, given.places)
        query, key, value = views[given.call % len(views)]
        return reference.exact(workload, query, key, value, self._rows)


def as_bytes(output: Tensor) -> bytes:
    """All values of a tensor, as they lie in memory when it is contiguous."""
    found: bytes = output.detach().contiguous().view(torch.uint8).numpy().tobytes()
    return found
