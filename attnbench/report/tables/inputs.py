"""The table of errors by inputs: who looks better on noise than they are."""

from collections.abc import Sequence

import pandas as pd

from attnbench.analysis.frames import as_rows
from attnbench.analysis.inputs import compared, error_by_inputs, sorts
from attnbench.report import units
from attnbench.report.prepare import Panel, alike
from attnbench.report.style import Style
from attnbench.report.tables.table import Table


def by_inputs(panels: Sequence[Panel], style: Style) -> list[Table]:
    """A table for each problem that was put to several sorts of inputs."""
    return [table for group in alike(panels, "inputs") if (table := _table(group, style)).rows]


def _table(panels: Sequence[Panel], style: Style) -> Table:
    frame = pd.concat([panel.frame for panel in panels], ignore_index=True)
    names, found = sorts(frame), error_by_inputs(frame)
    others = compared(names)
    last = f"{others[0] if len(others) == 1 else 'the worst of a model'} over {names[0]}"
    rows = [
        [
            units.length(row["length"]),
            style.names[row["plugin"]],
            *(units.error(row[name]) for name in names),
            units.ratio(row["ratio"]),
        ]
        for row in as_rows(found)
    ]
    columns = [panels[0].axis, "variant", *(f"error on {name}" for name in names), last]
    words = (panels[0].words[name] for name in panels[0].words if name != "inputs")
    shared = ", ".join(word for word in words if word)
    return Table(columns, rows, shared, frozenset(columns) - {"variant"})
