"""Figures and pages drawn from records.

matplotlib and seaborn load when a report is written, not before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnbench.report.repeat import repeat_command

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["repeat_command", "write_report"]


def write_report(frame: pd.DataFrame, runs: Sequence[Mapping[str, Any]], out: Path) -> Path:
    """Writes a report under `out` and returns its HTML page; see `attnbench.report.page.write_report`."""
    from attnbench.report import page

    return page.write_report(frame, runs, out)
