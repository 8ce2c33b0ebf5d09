"""`attnbench cache`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from msgspec import to_builtins

from attnbench.commands.kept import Kept
from attnbench.commands.kinds import show_kinds
from attnbench.commands.options import (
    CELL_FAILED,
    COUNT,
    INTERRUPTED,
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
    warn_of_threads,
)
from attnbench.devices.machine import default_threads

if TYPE_CHECKING:
    from attnbench.sweep.caches import Judgement


@click.command()
@click.option(
    "--list", "listed", is_flag=True, help="Show the caches that are installed and their options; judge none."
)
@option("--model", default="smollm2", help="A decoder: smollm2, gemma3, or a folder or .gguf file of yours.")
@option("--caches", default="all", help="all, names (a,b), patterns (int*), name:key=value, name:*.")
@option("--seq", type=click.IntRange(2), default=1024, help="Tokens of a window of text.")
@option(
    "--text", "texts", type=PATH, multiple=True, help="UTF-8; more than once for more documents.  [default: shipped]"
)
@option("--chunk", type=COUNT, default=32, help="Tokens that go in together; 1 is decoding token by token, and slow.")
@option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", help="What the model computes in.")
@option("--windows", type=click.IntRange(2), default=64, help="Of text, at most.")
@option("--budget", type=Seconds(1, 1e7), default=600, help="Seconds for all; a cache that is begun gets two windows.")
@option("--timeout", type=Seconds(0.1, 1e6), default=600, help="Seconds for one cache.")
@THREADS
@ISA
@option("--out", type=PATH, default=Path("results"), help="DATE-NAME with cache.json and a figure goes here.")
@option("--name", default="cache")
@JSON
def command(listed: bool, out: Path, name: str, as_json: bool, **given: Any) -> None:
    """How little may be kept of keys and values? A published model that decodes with each KV cache.

    Bits a value, perplexity, how far next tokens move, whether a fact in a long text is found, and the time of a step
    where a kernel reads what is kept. --caches all also answers some disputed claims, such as whether a rotation helps.

    \b
    attnbench cache --caches bf16,int8,int4 --seq 1024
    attnbench cache --caches 'turboquant:*,kivi:bits=2' --budget 300
    attnbench cache --list                                   # which there are, and their options
    """
    from attnbench.records.judged import CACHE
    from attnbench.sweep.caches import Asked, judge

    warn_of_packages()
    if listed:
        show_offered(given["isa"], as_json)
        return
    texts = [str(path.absolute()) for path in given.pop("texts")]
    asked = Asked(texts=texts, threads=given.pop("threads") or default_threads(), **given)
    warn_of_threads(asked.threads)
    kept = Kept(asked, out, name, CACHE)
    try:
        found = judge(asked, tell, lambda found: kept.write(_content(found)))
    except KeyboardInterrupt:
        tell(f"interrupted; what there is: {kept.folder}" if kept.folder else "interrupted")
        sys.exit(INTERRUPTED)
    _draw(found, kept)
    if as_json:
        print_json({"model": to_builtins(found.model), "rows": found.rows, "claims": found.claims})
    else:
        show(found)
    (tell if as_json else click.echo)(f"written: {kept.folder}")
    sys.exit(CELL_FAILED if any(row["status"] not in ("ok", "skipped") for row in found.rows) else 0)


def show_offered(isa: str, as_json: bool) -> None:
    """Prints the caches that are installed, and their options."""
    from attnbench.registry import CACHES
    from attnbench.sweep.caches import offered

    show_kinds(
        CACHES.word, [(found, said, {"family": getattr(said, "family", "")}) for found, said in offered(isa)], as_json
    )


_COLUMNS = ("cache", "bits", "perplexity", "over exact's", "KL mean, 99%", "same top token", "needle", "bytes",
            "a step", "speedup")  # fmt: skip


def show(found: "Judgement") -> None:
    """Prints a row a cache, why what is missing is, and the claims."""
    facts, done = found.model, [row for row in found.rows if row["status"] == "ok"]
    print(f"{facts.what or facts.name}. Licence: {facts.licence}.{facts.note and f' Note: {facts.note}.'}")
    if done:
        first = done[0]
        print(f"\n{facts.name}, windows of {first['seq']} tokens, {first['dtype']}, {first['chunk']} tokens at a time")
        print_table(_COLUMNS, map(_shown, done), pad_edge=False)
    for row in found.rows:
        if row["status"] != "ok":
            print(f"{row['cache']}: {row['status']}: {row['reason']}")
    for reason in dict.fromkeys(row["no_step"] for row in done if row["no_step"]):
        names = ", ".join(row["cache"] for row in done if row["no_step"] == reason)
        print(f"no time of a step, {reason}: {names}")
    for claim in found.claims:
        print(f"{claim['question']}\n    {claim['sentence']}")


def _shown(row: dict[str, Any]) -> list[str]:
    from attnbench.report import units

    needle = units.hits([n["found"] for n in row["needles"] or ()])
    speedup = units.ratio(*(row[f"step_speedup{end}"] for end in ("", "_low", "_high")))
    return [
        row["cache"], f"{row['bits_per_value']:.2f}", f"{row['perplexity']:.4g}", _ratio(row),
        f"{units.error(row['kl_mean'])}, {units.error(row['kl_p99'])}", f"{row['top1_agreement']:.1%}", needle,
        units.size(row["bytes"]), units.seconds(row["step_s"]), speedup,
    ]  # fmt: skip


def _ratio(row: dict[str, Any]) -> str:
    ratio, low, high = (row[f"perplexity_ratio{end}"] for end in ("", "_low", "_high"))
    return f"{ratio:.4f}x" + ("" if low is None else f" [{low:.4f}, {high:.4f}]")


def _content(found: "Judgement") -> dict[str, Any]:
    return {
        "machine": found.machine, "model": to_builtins(found.model), "rows": found.rows, "claims": found.claims,
    }  # fmt: skip


def _draw(found: "Judgement", kept: Kept) -> None:
    from attnbench.report.figures.caches import caches

    if done := [row for row in found.rows if row["status"] == "ok"]:
        kept.draw(caches(done))
