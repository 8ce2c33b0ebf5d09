"""`attnbench generate`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import click

from attnbench.commands.options import CELL_FAILED, THREADS, Seconds, print_table
from attnbench.devices.machine import default_threads
from attnbench.errors import AttnbenchError
from attnbench.workload import DTYPES, NORMS

if TYPE_CHECKING:
    from attnbench.sweep.generation import Generation, Sizes


@click.command()
@click.option("--plugins", default="sdpa", show_default=True, help="As for run.")
@click.option("--prompt", type=click.IntRange(1), default=512, show_default=True, help="Tokens of the first phase.")
@click.option("--tokens", type=click.IntRange(1), default=32, show_default=True, help="New ones, one by one.")
@click.option("--layers", type=click.IntRange(1), default=4, show_default=True)
@click.option("--block", type=click.Choice(["decoder-only", "decoder"]), default="decoder-only", show_default=True)
@click.option("--norm", type=click.Choice(NORMS), default="pre", show_default=True)
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True)
@click.option("--heads", type=click.IntRange(1), default=8, show_default=True)
@click.option("--kv-heads", type=click.IntRange(1), help="[default: as --heads]")
@click.option("--head-dim", type=click.IntRange(1), default=64, show_default=True)
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="float32", show_default=True)
@THREADS
@click.option(
    "--repeats", type=click.IntRange(1), default=5, show_default=True, help="Of the whole; medians are shown."
)
@click.option("--timeout", type=Seconds(0.1, 1e6), default=600, show_default=True, help="Seconds for a plugin.")
@click.option("--out", type=click.Path(path_type=Path), help="Also write generation.json, .png and .svg here.")
def command(plugins: str, out: Path | None, threads: int | None, **sizes: Unpack[Sizes]) -> None:
    """Generate token by token, with a cache and without: the two phases of inference.

    A prompt goes through a stack of blocks at once, or with --block decoder through a stack of encoder blocks; then new
    tokens come one by one. Each is timed with the state that the variant keeps, and by computing all tokens again.
    """
    from attnbench.sweep.generation import generate

    found = generate(plugins, threads or default_threads(), **sizes)
    show(found)
    if out:
        write(found, out)
        click.echo(f"written: {out / 'generation.json'}")
    sys.exit(0 if all("failed" not in result for result in found.results) else CELL_FAILED)


def show(found: Generation) -> None:
    """Prints a row a plugin."""
    from rich.table import Table

    print(found.title)
    table = Table("plugin", "prompt", "a token with a cache: first", "last", "without: first", "last",
                  "all tokens with", "without", "ratio", "outputs differ by", box=None)  # fmt: skip
    for result in found.results:
        if "failed" in result:
            continue
        with_s, without_s = result["with_s"], result["without_s"]
        numbers = [result["prompt_s"], with_s[0], with_s[-1], without_s[0], without_s[-1], sum(with_s), sum(without_s)]
        ratio, off = f"{sum(without_s) / sum(with_s):.3g}x", f"{result['difference']:.1e}"
        table.add_row(result["plugin"], *(f"{1e3 * s:.3g} ms" for s in numbers), ratio, off)
    print_table(table)
    for result in found.results:
        if "failed" in result:
            print(f"{result['plugin']}: {result['failed']}: {result['reason']}")


def write(found: Generation, folder: Path) -> None:
    """Writes generation.json, and a figure where a plugin came to an end.

    Raises:
        AttnbenchError: the folder can't be written.
    """
    from attnbench.report.drawing import save
    from attnbench.report.figures.generation import generation

    try:
        folder.mkdir(parents=True, exist_ok=True)
        content = {"command": ["attnbench", *sys.argv[1:]]} | asdict(found)
        (folder / "generation.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        if done := [result for result in found.results if "failed" not in result]:
            past = 0 if found.workload.block == "decoder" else found.prompt
            save(generation(done, past, found.title), folder / "generation")
    except OSError as error:
        raise AttnbenchError(f"can't write to {folder}: {error.strerror}; choose another --out") from None
