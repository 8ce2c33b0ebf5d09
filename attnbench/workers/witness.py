"""A second opinion from a process that no plugin enters: it draws the values itself and compares plain bytes.

Whatever a plugin has done to the process that it lives in, to torch's operators or to the judge there, is not here.
"""

import torch
from torch import Tensor

from attnbench.judge import deviation, reference
from attnbench.judge.deviation import Error
from attnbench.task.inputs import Pools
from attnbench.workload import Workload


class Witness:
    """Exact softmax attention on the values of one workload at a time, as all its cells are asked about the same."""

    def __init__(self) -> None:
        self._key: tuple[Workload, int, int] | None = None

    def error(self, workload: Workload, number: int, rows: int, output: bytes) -> Error:
        """How far an output is from exact attention.

        number: from which the call's values were drawn, see `Subject.prepare`. rows: the same for rows to look at.
        output: (batch, heads, seq, value_dim), contiguous.
        """
        if self._key != (workload, number, rows):
            self._rows = reference.sample_rows(workload.seq, rows)
            self._exact = self._made(workload, number)  # (batch, heads, n, value_dim)
            self._key = workload, number, rows
        w = workload
        out = torch.frombuffer(bytearray(output), dtype=getattr(torch, w.dtype)).view(w.batch, w.heads, w.seq, -1)
        return deviation.compare(out[:, :, self._rows], self._exact)

    def _made(self, workload: Workload, number: int) -> Tensor:
        torch.set_num_threads(workload.threads)
        torch.set_grad_enabled(False)
        pools = Pools(workload)
        pools.draw(number)
        pools.alter(number + 1)
        ((query, key, value),) = pools.views(1, number)
        return reference.exact(workload, query, key, value, self._rows)


def as_bytes(output: Tensor) -> bytes:
    """All values of a tensor, as they lie in memory when it is contiguous."""
    found: bytes = output.detach().contiguous().view(torch.uint8).numpy().tobytes()
    return found
