"""The command line: a file a command, each of which parses, calls and prints. What is heavy loads when it is needed."""

import errno
import os
import sys
from contextlib import suppress
from importlib import import_module
from io import TextIOWrapper
from typing import Any

import click

from attnbench.commands.options import INTERRUPTED, USAGE, tell
from attnbench.errors import AttnbenchError

_UNWRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
COMMANDS = (
    "best",
    "cache",
    "calibrate",
    "check",
    "compare",
    "completion",
    "doctor",
    "export",
    "generate",
    "guard",
    "model",
    "new",
    "parallel",
    "peers",
    "plugins",
    "report",
    "run",
    "show",
    "site",
    "submit",
    "theory",
    "verify",
)
"""Each is `command` in the module of its name here."""


def find(name: str) -> click.Command:
    """The command of this name, one of `COMMANDS`."""
    found: click.Command = import_module(f"attnbench.commands.{name}").command
    return found


class _Commands(click.Group):
    """Finds a command by its name. Bad usage, ours and click's, is one line and exit code 2."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        return find(name) if name in COMMANDS else None

    def main(self, *args: Any, **kwargs: Any) -> Any:
        _let_all_text_out()
        try:
            try:
                return super().main(*args, **(kwargs | {"standalone_mode": False}))
            finally:
                sys.stdout.flush()
        except AttnbenchError as error:
            message = str(error)
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.format_message())
            sys.exit(0)
        except click.Abort:
            sys.exit(INTERRUPTED)
        except click.ClickException as error:
            message = " ".join(error.format_message().split())
        except OSError as error:
            if error.filename is not None or error.errno not in _UNWRITTEN:
                raise
            message = f"can't print: {error.strerror}"
            _forget_stdout()
        # A name may hold a line break or worse: what a terminal can't print goes out as an escape.
        line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
        tell(f"attnbench: {line}")
        sys.exit(USAGE)


def _let_all_text_out() -> None:
    """What a terminal's encoding lacks goes out as a question mark; and where stdout is closed, nowhere."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - as long as the process
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _forget_stdout() -> None:
    """What could not be written is not tried again as the process ends."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="attnbench")
def main() -> None:
    """Compare attention variants by time, memory and accuracy."""
