"""What attnbench raises on purpose: for a user, and to end a cell."""

from __future__ import annotations


class AttnbenchError(ValueError):
    """Something the user asked for can't be done; the message is one line that says what would be right."""


class Failed(Exception):
    """The cell ends here, with this status."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason
