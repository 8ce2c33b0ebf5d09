"""How much of what this machine can do at best a cell reached: the roofline as columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from attnbench.theory import costs

if TYPE_CHECKING:
    import pandas as pd
from attnbench.theory.roofline import Ceilings, roof

COLUMNS = ("attainable_s", "roofline_fraction", "bound", "intensity", "achieved_flops_per_s", "ceiling",
           "ceiling_flops_per_s", "ceiling_bytes_per_s")  # fmt: skip


def columns(frame: pd.DataFrame, runs: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """`COLUMNS` for the finished rows whose run has ceilings, missing for all others; by index of `frame`.

    runs: what run.json says, one a run.
    roofline_fraction: attainable over measured seconds. achieved_flops_per_s: the variant's own operations, as all
    here, over its latency. The rest: see `Roof`.
    """
    import pandas as pd

    from attnbench.analysis import rows

    known = {str(run.get("name")): c for run in runs if (c := Ceilings.from_dict(run.get("ceilings")))}
    done = rows.finished(frame[frame["run"].isin(list(known))])
    done = done[done["latency_s"] > 0]
    found: dict[object, dict[str, Any]] = {}
    for index, row in zip(done.index, rows.records(done), strict=True):
        workload, own = rows.workload_of(row), row.get("variant_flops")
        operations = float(own) if own and own > 0 else float(costs.flops(workload))
        if over := roof(workload, row["family"], operations, known[row["run"]], row.get("cache_bytes")):
            latency = row["latency_s"]
            reached = {"roofline_fraction": over.attainable_s / latency, "achieved_flops_per_s": operations / latency}
            found[index] = asdict(over) | reached
    return pd.DataFrame.from_dict(found, orient="index", columns=list(COLUMNS))
