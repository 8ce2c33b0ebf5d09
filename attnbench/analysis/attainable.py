"""How much of what this machine can do at best a cell reached: the roofline as columns."""

from collections.abc import Sequence
from dataclasses import asdict

import pandas as pd

from attnbench.analysis.frames import by_index, finished, operations, workload_of
from attnbench.records.schema import Meta, Row
from attnbench.theory.roofline import Ceilings, roof

COLUMNS = ("attainable_s", "roofline_fraction", "bound", "intensity", "achieved_flops_per_s", "ceiling",
           "ceiling_flops_per_s", "ceiling_bytes_per_s")  # fmt: skip


def columns(frame: pd.DataFrame, runs: Sequence[Meta]) -> pd.DataFrame:
    """`COLUMNS` for the finished rows whose run has ceilings, missing for all others; by index of `frame`.

    roofline_fraction: attainable over measured seconds. achieved_flops_per_s: the variant's own operations, as all
    here, over its latency. The rest: see `Roof`.
    """
    known = {str(run.get("name")): c for run in runs if (c := Ceilings.from_dict(run.get("ceilings")))}

    def reached(row: Row) -> Row | None:
        count, latency = operations(row), row["latency_s"]
        over = roof(workload_of(row), row["family"], count, known[row["run"]], row.get("cache_bytes"))
        if over is None:
            return None
        reach = {"roofline_fraction": over.attainable_s / latency, "achieved_flops_per_s": count / latency}
        return asdict(over) | reach

    done = finished(frame[frame["run"].isin(list(known)) & (frame["latency_s"] > 0)])
    return pd.DataFrame.from_dict(by_index(done, reached), orient="index", columns=list(COLUMNS))
