"""The table of docs/plugins.md: `python -m tests.planted [NAME ...]`, from the root of the clone."""

from __future__ import annotations

import sys

from .mistakes import MISTAKES, found, row

for mistake, outcomes, _ in found(sys.argv[1:] or MISTAKES):
    print(row(mistake, outcomes[-1]), flush=True)
    print(mistake.name, outcomes[-1].reason, file=sys.stderr)
