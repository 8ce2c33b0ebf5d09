"""`attnbench generate`."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import click

from attnbench.commands.options import (
    CELL_FAILED,
    COUNT,
    ISA,
    JSON,
    PATH,
    THREADS,
    Seconds,
    option,
    print_json,
    print_table,
    tell,
    warn_of_packages,
)
from attnbench.devices.machine import default_threads
from attnbench.errors import refusals
from attnbench.workload import DTYPES, NORMS

if TYPE_CHECKING:
    from attnbench.sweep.generation import Generation, Sizes


@click.command()
@option("--plugins", default="sdpa", help="As for run.")
@option("--prompt", type=COUNT, default=512, help="Tokens of the first phase.")
@option("--tokens", type=COUNT, default=32, help="New ones, one by one.")
@option("--layers", type=COUNT, default=4)
@option("--block", type=click.Choice(["decoder-only", "decoder"]), default="decoder-only")
@option("--norm", type=click.Choice(NORMS), default="pre")
@option("--batch", type=COUNT, default=1)
@option("--heads", type=COUNT, default=8)
@option("--kv-heads", type=COUNT, help="[default: as --heads]")
@option("--head-dim", type=COUNT, default=64)
@option("--dtype", type=click.Choice(list(DTYPES)), default="float32")
@THREADS
@ISA
@option("--repeats", type=COUNT, default=5, help="Of the whole; medians are shown.")
@option("--timeout", type=Seconds(0.1, 1e6), default=600, help="Seconds for a plugin.")
@option("--out", type=PATH, help="Also write generation.json, .png and .svg here.")
@JSON
def command(
    plugins: str, out: Path | None, threads: int | None, isa: str, as_json: bool, **sizes: "Unpack[Sizes]"
) -> None:
    """Generate token by token, with a cache and without: the two phases of inference.

    A prompt goes through a stack of blocks at once, or with --block decoder through a stack of encoder blocks; then new
    tokens come one by one. Each is timed with the state that the variant keeps, and by computing all tokens again.

    \b
    attnbench generate --plugins sdpa,int8 --prompt 512 --tokens 64
    attnbench generate --plugins retention --layers 4
    """
    from attnbench.sweep.generation import generate

    warn_of_packages()
    found = generate(plugins, threads or default_threads(), isa, **sizes)
    if as_json:
        print_json(asdict(found))
    else:
        show(found)
    if out:
        write(found, out)
        (tell if as_json else click.echo)(f"written: {out / 'generation.json'}")
    sys.exit(0 if len(_done(found)) == len(found.results) else CELL_FAILED)


def show(found: "Generation") -> None:
    """Prints a row a plugin."""
    print(found.title)
    columns = ("plugin", "prompt", "a token with a cache: first", "last", "without: first", "last", "all tokens with",
               "without", "ratio", "outputs differ by")  # fmt: skip
    rows = []
    for result in _done(found):
        with_s, without_s = result["with_s"], result["without_s"]
        numbers = [result["prompt_s"], with_s[0], with_s[-1], without_s[0], without_s[-1], sum(with_s), sum(without_s)]
        ratio, off = f"{sum(without_s) / sum(with_s):.3g}x", f"{result['difference']:.1e}"
        rows.append([result["plugin"], *(f"{1e3 * s:.3g} ms" for s in numbers), ratio, off])
    print_table(columns, rows)
    for result in found.results:
        if "failed" in result:
            print(f"{result['plugin']}: {result['failed']}: {result['reason']}")


def write(found: "Generation", folder: Path) -> None:
    """Writes generation.json, and a figure where a plugin came to an end.

    Raises:
        AttnbenchError: the folder can't be written.
    """
    from attnbench.records import strict
    from attnbench.report.drawing import save
    from attnbench.report.figures.generation import generation

    with refusals(f"write to {folder}", "choose another --out"):
        folder.mkdir(parents=True, exist_ok=True)
        content = {"command": ["attnbench", *sys.argv[1:]]} | asdict(found)
        (folder / "generation.json").write_text(strict.dumps(content, indent=1) + "\n", encoding="utf-8")
        if done := _done(found):
            past = 0 if found.workload.block == "decoder" else found.prompt
            save(generation(done, past, found.title), folder / "generation")


def _done(found: "Generation") -> list[dict[str, Any]]:
    return [result for result in found.results if "failed" not in result]
