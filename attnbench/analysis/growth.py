"""How time and memory grow with the length, measured and predicted."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import pandas as pd

from attnbench.analysis.memory import holders_of_scores, peak_of, workspace_of
from attnbench.analysis.rows import Row, finished, operations, records, series, tidy
from attnbench.stats.powers import fit_exponent

_CLOSE = 0.1  # of an exponent to a whole number that names an order


def growth(frame: pd.DataFrame) -> pd.DataFrame:
    """The exponent p of l^p of latency, peak memory and workspace, measured and predicted over the same lengths.

    Latency is predicted to grow as operations do, peak memory as `peak` does. Both are fitted in the same way
    (`powers.fit_exponent`), so that what lower orders add at finite lengths is in both.

    Returns a row for each series and quantity that has three lengths: PROBLEM, plugin, quantity ("latency",
    "peak memory" or "workspace"), measured with its 95% interval low and high, predicted, shortest and longest length
    of the fit, and order: of the operations at the two longest lengths, "l^2", "l" or "constant", or "" between those.
    """
    table, holders = [], holders_of_scores(frame)
    for shared, rows in series(frame):
        done = records(finished(rows))
        lengths = [row["length"] for row in done]
        columns: dict[str, tuple[str, Callable[[Row], float]]] = {
            "latency": ("latency_s", operations),
            "peak memory": ("peak_bytes", partial(peak_of, holders=holders)),
            "workspace": ("workspace_bytes", workspace_of),
        }
        for quantity, (column, theirs) in columns.items():
            values = [float(row[column]) for row in done]
            fit = fit_exponent(lengths, values)
            if fit:
                usable = [v > 0 and math.isfinite(v) for v in values]
                same = [theirs(row) if use else math.nan for row, use in zip(done, usable, strict=True)]
                predicted = fit_exponent(lengths, same)
                table.append(
                    shared
                    | {"quantity": quantity, "measured": fit.value, "low": fit.low, "high": fit.high}
                    | {"predicted": predicted.value if predicted else math.nan}
                    | {"shortest": fit.lengths[0], "longest": fit.lengths[-1], "order": order(records(rows))}
                )
    return tidy(table, "quantity", "measured", "low", "high", "predicted", "shortest", "longest", "order")


def order(rows: Sequence[Row]) -> str:
    """How the operations grow between the two longest lengths: "l^2", "l", "constant", or "" where none is near."""
    counts = {float(row["length"]): operations(row) for row in rows}
    if len(counts) < 2:
        return ""
    (short, few), (long, many) = sorted(counts.items())[-2:]
    power = math.log(many / few) / math.log(long / short)
    names = {0: "constant", 1: "l", 2: "l^2"}
    return names.get(round(power), "") if abs(power - round(power)) <= _CLOSE else ""
