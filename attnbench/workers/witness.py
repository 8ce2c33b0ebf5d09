"""A second opinion from a process that no plugin enters: it draws the values itself and compares plain bytes.

Whatever a plugin has done to the process that it lives in, to torch's operators or to the judge there, is not here.
"""

import torch
from torch import Tensor

from attnbench.judge import deviation, reference
from attnbench.judge.deviation import Error
from attnbench.plugin import Softmax
from attnbench.task.inputs import pools as pools_of
from attnbench.task.transformer import Block
from attnbench.theory.costs import attentions
from attnbench.workers.messages import Given
from attnbench.workload import Workload


class Witness:
    """Exact softmax attention on the values of one workload at a time, as all its cells are asked about the same."""

    def __init__(self) -> None:
        self._key: tuple[Workload, Given, int] | None = None

    def judge(self, workload: Workload, given: Given, rows: int, output: bytes) -> tuple[Error, str | None]:
        """How far an output is from exact attention, and what is wrong with one that is said to be that.

        rows: from which those to look at are drawn. output: (batch, heads, seq, value_dim), or of a block
        (batch, seq, width), contiguous.
        """
        w, in_block = workload, workload.scope == "block"
        if self._key != (w, given, rows):
            every = reference.EVERY_IN_BLOCK if in_block else reference.EVERY_ROW
            self._rows = reference.sample_rows(w.seq, rows, every=every)
            self._exact = self._made(w, given)  # as the output, of n rows
            self._key = w, given, rows
        shape = (w.batch, w.seq, w.width) if in_block else (w.batch, w.heads, w.seq, w.value_dim)
        out = torch.frombuffer(bytearray(output), dtype=getattr(torch, w.dtype)).view(shape)
        error = deviation.compare(out.index_select(-2, self._rows), self._exact)
        if not bool(out.isfinite().all()):  # all rows
            return error, "output has NaN or infinite values"
        return error, deviation.verdict(error, deviation.tolerance(w, "exact"))

    def _made(self, workload: Workload, given: Given) -> Tensor:
        torch.set_num_threads(workload.threads)
        torch.set_grad_enabled(False)
        pools, (drawn, *altered) = pools_of(workload), given.values
        pools.draw(drawn)
        for i, number in enumerate(altered):
            pools.alter(number, few=i > 0 or not given.thorough)
        views = pools.views(given.calls, given.places)
        first, *more = views[given.call % len(views)]
        if workload.scope != "block":
            key, value, *sinks = more
            return reference.exact(workload, first, key, value, self._rows, sinks)
        exact = dict.fromkeys(attentions(workload), Softmax())
        block = Block(workload, dict.fromkeys(exact, _nobody))
        memory = more[0] if more else None
        return reference.expected_block(workload, exact, block, first, memory, self._rows)


def _nobody(*tensors: Tensor) -> Tensor:
    raise AssertionError("a block of weights alone is not called")


def as_bytes(output: Tensor) -> bytes:
    """All values of a tensor, as they lie in memory when it is contiguous."""
    found: bytes = output.detach().contiguous().view(torch.uint8).numpy().tobytes()
    return found
