"""What a process without plugins says of an output: an error that no plugin can have told by itself."""

from __future__ import annotations

from attnbench.sweep.cell import Cell
from attnbench.sweep.crew import Crew, Live
from attnbench.theory.costs import output_bytes
from attnbench.workers.about_witness import Given
from attnbench.workers.messages import Columns

HIDDEN = "its process does not show what came out of its calls"
LATE = "what it shows of its output was not in its memory yet when the calls had been made"
_LIKE, _TINY = 2.0, 1e-5  # errors on two samples of rows are alike up to this factor; rounding is what it is
_LARGEST_OUTPUT = 48 << 20
_ERRORS = ("rel_l2", "max_abs", "cosine")


def has_witness(cell: Cell) -> bool:
    """Whether a process without plugins can say how far an output is from attention, and it fits into a message."""
    w = cell.workload
    in_block = w.scope == "block"
    size = w.batch * w.seq * w.width * w.itemsize if in_block else output_bytes(w)
    whole = not in_block or (w.layers == 1 and not w.lengths)
    return whole and w.on_host and cell.family != "recurrent" and size <= _LARGEST_OUTPUT


def hear(crew: Crew, one: Live, given: Given, rows: int, output: bytes, columns: Columns) -> None:
    """Sets an approximation error that was found apart from the plugin, and ends a cell that told of another.

    columns: what the plugin's own process told, if it did.
    """
    cell = one.cell
    found, alone = crew.witness(cell, given, rows, output), "implementation_rel_l2" not in columns
    if found is None:
        if alone and cell.status is None:
            cell.end("error", "what should have judged its output, apart from it, came to no end")
        return
    told = columns.get("approximation_rel_l2")
    told = told if isinstance(told, float) else found.rel_l2
    if alone:
        columns |= {f"implementation_{name}": getattr(found, name) for name in _ERRORS} | found.columns
    columns |= {f"approximation_{name}": getattr(found, name) for name in _ERRORS}
    if cell.status is not None:  # it was found to be wrong in another way
        return
    if cell.family == "exact" and found.problem:
        cell.end("wrong", found.problem)
    elif not found.rel_l2 <= _LIKE * told + _TINY or not told <= _LIKE * found.rel_l2 + _TINY:
        said = f"its process finds it {told:.1e} off attention (relative L2), one without it {found.rel_l2:.1e}"
        cell.end("wrong", said)
