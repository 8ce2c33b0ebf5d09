"""The command line: a file a command, each of which parses, calls and prints. What is heavy loads when it is needed."""

import sys
from importlib import import_module
from typing import Any

import click

from attnbench.commands.options import INTERRUPTED, USAGE
from attnbench.errors import AttnbenchError

COMMANDS = ("calibrate", "doctor", "export", "generate", "plugins", "report", "run", "theory")
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
        try:
            return super().main(*args, **(kwargs | {"standalone_mode": False}))
        except AttnbenchError as error:
            message = str(error)
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.format_message())
            sys.exit(0)
        except click.Abort:
            sys.exit(INTERRUPTED)
        except click.ClickException as error:
            message = " ".join(error.format_message().split())
        # A name may hold a line break or worse: what a terminal can't print goes out as an escape.
        line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
        click.echo(f"attnbench: {line}", err=True)
        sys.exit(USAGE)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="attnbench")
def main() -> None:
    """Compare attention variants by time, memory and accuracy."""
