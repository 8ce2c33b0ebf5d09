"""`model.json`, `cache.json`, `parallel.json`: what the commands of those names found, in folders beside the runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnbench.errors import AttnbenchError, refusals
from attnbench.records import strict
from attnbench.records.schema import Row


@dataclass(frozen=True)
class Judged:
    """A sort of judgement: the command that makes one, the file that it writes, and what each row has in any case."""

    command: str
    file: str
    needed: tuple[str, ...]

    def is_one(self, folder: Path) -> bool:
        """Whether the folder holds what the command wrote."""
        return (folder / self.file).is_file()

    def read(self, folder: Path) -> dict[str, Any]:
        """The content of the file. Raises: AttnbenchError: it can't be read, or is none."""
        path = folder / self.file
        with refusals(f"read {path}"):
            text = path.read_text(encoding="utf-8", errors="replace")
        try:
            found: dict[str, Any] = strict.loads(text)
        except ValueError as error:
            raise AttnbenchError(f"{path} {error}") from None
        rows = found.get("rows") if isinstance(found, dict) else None
        if not isinstance(rows, list) or not isinstance(found.get("machine"), dict):
            raise AttnbenchError(f"{path} is none of `attnbench {self.command}`: it has no rows, or no machine")
        for number, row in enumerate(rows, 1):
            missing = [name for name in self.needed if name not in row] if isinstance(row, dict) else self.needed
            if missing:
                raise AttnbenchError(f"row {number} of {path} has no {missing[0]}")
        return found

    def rows(self, folders: Iterable[Path]) -> list[Row]:
        """The rows of all, each with the `machine` that it was measured on."""
        return [row | {"machine": found["machine"]} for found in map(self.read, folders) for row in found["rows"]]


MODEL = Judged(
    "model",
    "model.json",
    ("model", "plugin", "variant", "family", "seq", "dtype", "mask", "heads", "kv_heads", "head_dim", "threads",
     "status"),
)  # fmt: skip
CACHE = Judged(
    "cache",
    "cache.json",
    ("model", "cache", "family", "seq", "dtype", "threads", "status", "bits_per_value", "bytes", "perplexity_ratio",
     "perplexity_ratio_low", "perplexity_ratio_high", "kl_mean", "kl_mean_low", "kl_mean_high", "top1_agreement",
     "needles", "step_s", "step_speedup", "step_speedup_low", "step_speedup_high"),
)  # fmt: skip
PARALLEL = Judged(
    "parallel",
    "parallel.json",
    ("scheme", "variant", "world", "batch", "heads", "kv_heads", "head_dim", "value_dim", "seq", "dtype", "device",
     "mask", "phase", "threads", "status", "reason", "latency_s", "latency_low_s", "latency_high_s", "speedup",
     "speedup_low", "speedup_high", "sent_bytes", "predicted_sent_bytes", "peak_bytes", "link_bytes_per_s",
     "implementation_rel_l2", "approximation_rel_l2", "warnings"),
)  # fmt: skip
