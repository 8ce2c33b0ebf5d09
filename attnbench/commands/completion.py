"""`attnbench completion`."""

import click
from click.shell_completion import get_completion_class

SHELLS = ("bash", "zsh", "fish")


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def command(ctx: click.Context, shell: str) -> None:
    """Print what makes SHELL complete commands, options and plugins' names.

    \b
    attnbench completion bash >> ~/.bashrc
    attnbench completion zsh >> ~/.zshrc
    attnbench completion fish > ~/.config/fish/completions/attnbench.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(ctx.find_root().command, {}, "attnbench", "_ATTNBENCH_COMPLETE").source())
