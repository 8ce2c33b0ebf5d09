"""What a machine can't execute is skipped with a reason of its own, and counted at the end: see conftest.py."""

from __future__ import annotations

import re

_LACKS = re.compile(
    r"this CPU lacks|no C\+\+ compiler|no Python\.h|no aarch64-linux-gnu|flex_attention needs Linux|could not import"
)


def is_the_machines(reason: str) -> bool:
    """Whether a plugin's refusal, or a test's, is this machine's doing: on another one it would run."""
    return bool(_LACKS.search(reason))
