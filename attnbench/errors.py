"""The one error that attnbench raises on purpose."""


class AttnbenchError(ValueError):
    """Something the user asked for can't be done; the message is one line that says what would be right."""
