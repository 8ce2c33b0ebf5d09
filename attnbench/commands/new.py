"""`attnbench new`."""

from pathlib import Path

import click

from attnbench.commands.options import PATH, option


@click.command()
@click.argument("name")
@option("--into", type=PATH, default=Path("."), help="The folder in which the package's own is made.")
def command(name: str, into: Path) -> None:
    """Write a package for a plugin of your own, called NAME.

    It runs as it is, as exact attention in plain torch, and its mathematics is for you to fill in: a module, its entry
    point, its tests, a workflow for GitHub, a README. Nothing that is there is written over.

    \b
    attnbench new my-attention
    attnbench new my-attention --into plugins
    """
    from attnbench.template import write

    made = write(name, into)
    for path in made:
        click.echo(path)
    click.echo(f"\nnow:\n    pip install -e '{into / name}[test]'\n    attnbench check {name}")
    click.echo(f"    attnbench run --plugins {name} --seq 512..2048 && attnbench report")
