"""The table of KV caches: what each keeps of a number, and what became of the model."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from attnbench.records.schema import Row
from attnbench.report import units
from attnbench.report.tables.table import Table

_COLUMNS: dict[str, Callable[[Row], str]] = {
    "cache": lambda row: str(row["cache"]),
    "bits": lambda row: f"{row['bits_per_value']:.2f}",
    "bytes": lambda row: units.size(row["bytes"]),
    "perplexity over exact's": lambda row: units.ratio(
        *(row[f"perplexity_ratio{end}"] for end in ("", "_low", "_high"))
    ),
    "KL": lambda row: units.error(row["kl_mean"]),
    "same top token": lambda row: units.percent(row["top1_agreement"]),
    "needle": lambda row: units.hits([n["found"] for n in row["needles"] or ()]),
    "a step": lambda row: units.seconds(row["step_s"]),
    "its speedup over bf16": lambda row: units.ratio(*(row[f"step_speedup{end}"] for end in ("", "_low", "_high"))),
}


def by_cache(judged: Sequence[Mapping[str, Any]]) -> list[Table]:
    """judged: what `attnbench cache` wrote, see `records.judged`. A table for each, and one of what it answers."""
    return [table for each in judged if done(each) for table in (_table(each), _claims(each)) if table.rows]


def done(judged: Mapping[str, Any]) -> list[Row]:
    """The rows that have numbers."""
    return [row for row in judged["rows"] if row["status"] == "ok"]


def _table(judged: Mapping[str, Any]) -> Table:
    rows = sorted(done(judged), key=lambda row: (-row["bits_per_value"], row["kl_mean"]))
    body = [[text(row) for text in _COLUMNS.values()] for row in rows]
    shown = [i for i, _ in enumerate(_COLUMNS) if any(line[i] != units.NOTHING for line in body)]
    names = [list(_COLUMNS)[i] for i in shown]
    first = rows[0]
    return Table(
        names,
        [[line[i] for i in shown] for line in body],
        f"{first['model']}, windows of {units.length(first['seq'])} tokens, {first['dtype']}",
        frozenset(names) - {"cache"},
    )


def _claims(judged: Mapping[str, Any]) -> Table:
    rows = [[str(claim["question"]), str(claim["sentence"])] for claim in judged.get("claims") or ()]
    return Table(["question", "what the same windows say"], rows, "What is disputed")
