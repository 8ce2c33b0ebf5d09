"""What attnbench raises on purpose: for a user, and to end a cell."""

from collections.abc import Iterator
from contextlib import contextmanager


class AttnbenchError(ValueError):
    """Something the user asked for can't be done; the message is one line that says what would be right."""


@contextmanager
def refusals(attempt: str, instead: str = "") -> Iterator[None]:
    """Makes an AttnbenchError of what the system refuses: "can't write a.csv: No space left on device; choose another".

    attempt: "write a.csv". instead: what would be right.
    """
    try:
        yield
    except OSError as error:
        raise AttnbenchError(f"can't {attempt}: {error.strerror}{instead and f'; {instead}'}") from None


class Failed(Exception):
    """The cell ends here, with this status."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason
