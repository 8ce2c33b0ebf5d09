"""`attnbench run` for a notebook or a script: the same words, and a DataFrame comes back."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from attnbench.records.run import Run, load
from attnbench.records.schema import Row
from attnbench.sizes import Names, Sizes
from attnbench.sweep import engine, spread
from attnbench.sweep.session import Unwatched
from attnbench.sweep.settings import BUDGET, PRECISION, TIMEOUT, Asked

if TYPE_CHECKING:
    import pandas as pd


class _Told(Unwatched):
    """Passes the rows of each workload on to a callback."""

    def __init__(self, callback: Callable[[Sequence[Row], float], object]) -> None:
        self._callback = callback

    def rows(self, rows: Sequence[Row], seconds_left: float) -> None:
        self._callback(rows, seconds_left)

    again = rows


def run(
    plugins: str = "all",
    seq: Sizes | None = None,
    *,
    kv_seq: Sizes | None = None,
    batch: Sizes | None = None,
    tokens: int | None = None,
    heads: Sizes | None = None,
    kv_heads: Sizes | None = None,
    head_dim: Sizes | None = None,
    value_dim: Sizes | None = None,
    preset: str | None = None,
    dtype: Names | None = None,
    device: str = "auto",
    mask: Names | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    bias: str | None = None,
    phase: Names | None = None,
    scope: str | None = None,
    block: str | None = None,
    norm: str | None = None,
    style: str | None = None,
    layers: Sizes | None = None,
    lengths: str | None = None,
    batch_spec: str | None = None,
    inputs: Names | None = None,
    baseline: str = "sdpa",
    seed: int | None = None,
    threads: int | None = None,
    precision: str | float = PRECISION,
    budget: float = BUDGET,
    timeout: float = TIMEOUT,
    l2: str | None = None,
    memory: str | int | None = None,
    isa: str = "auto",
    on: str | None = None,
    out: str | Path | None = None,
    progress: Callable[[Sequence[Row], float], object] | None = None,
) -> pd.DataFrame:
    """Measures attention variants over a sweep: `attnbench run` for a notebook or a script. It needs no main guard.

    Each argument is the option of that name, None its default; sizes may be numbers and lists.
    plugins: "all", names "a,b", patterns "block*", options "name:key=value", or "name:*" for each choice. seq, kv_seq:
    lengths, such as 1024, [512, 1000] or "512..16384", which doubles; batch, heads, kv_heads, head_dim, value_dim and
    layers likewise. tokens: of the whole batch at each length. preset: a model's sizes, or "standard". dtype, mask,
    phase: one name or several. scope: "attention", "block" or "all". block, norm, style: of it. scale, softcap,
    bias: of the scores. lengths: of a ragged batch. batch_spec: a server's, "q2k_8q1s1k", in the place of sizes.
    inputs: how drawn, or a model's layer, "smollm2:3". baseline: what speedups refer to, or "none". precision: at which
    half-width an interval has converged, or "auto": what the budget can be expected to buy half of the cells. budget,
    timeout: seconds for the sweep and for a cell. memory: what may be in use. isa: "avx2" for no more. on: a cluster,
    "ray=ADDRESS". out: the run's folder, not there yet, or None. progress: gets rows, and seconds left.

    Returns a row a cell, as `attnbench.load(out)` does: latency_s, speedup, peak_bytes, both errors, status and reason.

    Raises:
        AttnbenchError: something asked for is not to be had, said before anything is measured, or `out` can't be made.
    """
    given, began = {name: value for name, value in locals().items() if name not in ("out", "progress")}, monotonic()
    return _measured(given, out, progress, began)


def _measured(
    given: dict[str, Any],
    out: str | Path | None,
    progress: Callable[[Sequence[Row], float], object] | None,
    began: float,
) -> pd.DataFrame:
    """`run` of what was given it."""
    spelled = ", ".join(f"{name}={value!r}" for name, value in given.items() if value is not None)
    on, watched = given.pop("on"), _Told(progress) if progress else Unwatched()
    asked = Asked.of(**given)
    with ExitStack() as stack:
        folder = Path(out) if out is not None else Path(stack.enter_context(tempfile.TemporaryDirectory())) / "run"
        if on:
            far = stack.enter_context(spread.planned(spread.at_large(asked, given["threads"]), on))
            record = stack.enter_context(Run.at(folder, spread.meta(far, [f"attnbench.run({spelled})"])))
            spread.measure(far, record, watched, began)
        else:
            near = stack.enter_context(engine.planned(asked))
            record = stack.enter_context(Run.at(folder, engine.meta(near, [f"attnbench.run({spelled})"])))
            engine.measure(near, record, watched, began)
        return load(folder)
