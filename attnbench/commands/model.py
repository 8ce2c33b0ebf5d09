"""`attnbench model`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from msgspec import to_builtins

from attnbench.commands.kept import Kept
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
from attnbench.errors import AttnbenchError
from attnbench.models.known import KNOWN
from attnbench.report import units
from attnbench.report.names import short_names
from attnbench.sizes import parse_sizes
from attnbench.workload import DTYPES

if TYPE_CHECKING:
    from attnbench.sweep.model import Asked, Judgement

_FAILED = ("crashed", "error", "wrong", "timeout", "out-of-memory")


@click.command()
@option("--model", "models", default="smollm2", help=f"{', '.join(KNOWN)}, a folder or a GGUF file; lists too.")
@option("--plugins", default="all", help="As for run. Exact attention is always among them.")
@option("--seq", help="Tokens of a window: 512..8192 doubles; lists too.  [default: 1024; of an encoder 512]")
@option(
    "--text", "texts", type=PATH, multiple=True, help="UTF-8; more than once for more documents.  [default: shipped]"
)
@option("--dtype", type=click.Choice(list(DTYPES)), default="float32", help="Of the model, exact attention's too.")
@option("--windows", type=COUNT, default=64, help="Of text, at most.")
@option("--budget", type=Seconds(1, 1e7), default=540, help="Seconds for all; two windows each are judged in any case.")
@option("--timeout", type=Seconds(0.1, 1e6), default=600, help="Seconds for one variant in one model.")
@THREADS
@ISA
@option("--out", type=PATH, default=Path("results"), help="DATE-NAME with model.json and a figure goes here.")
@option("--name", default="model")
@JSON
def command(models: str, seq: str | None, out: Path, name: str, as_json: bool, **given: Any) -> None:
    """Does the model still work? A published model with each variant as its attention.

    Perplexity, how far next tokens move, whether a fact in a long text is found, and the model's own speed.

    \b
    attnbench model --model smollm2,gemma3 --seq 1024
    attnbench model --model minilm --plugins int8,linear
    attnbench model --model ~/my-model --plugins int8 --text mine.txt
    """
    from attnbench.records.judged import MODEL
    from attnbench.sweep.model import judge

    warn_of_packages()
    asked = _asked(models, seq, given)
    warn_of_threads(asked.threads)
    kept = Kept(asked, out, name, MODEL)
    try:
        found = judge(asked, tell, lambda found: kept.write(_content(found)))
    except KeyboardInterrupt:
        tell(f"interrupted; what there is: {kept.folder}" if kept.folder else "interrupted")
        sys.exit(INTERRUPTED)
    _draw(found, kept)
    if as_json:
        print_json({"models": to_builtins(found.models), "rows": found.rows, "refused": found.refused})
    else:
        show(found)
    (tell if as_json else click.echo)(f"written: {kept.folder}")
    sys.exit(CELL_FAILED if any(row["status"] in _FAILED for row in found.rows) else 0)


def _asked(models: str, seq: str | None, given: dict[str, Any]) -> "Asked":
    from attnbench.sweep.model import Asked

    names = list(dict.fromkeys(part.strip() for part in models.split(",") if part.strip()))
    if not names:
        raise AttnbenchError(f"--model names no model; known are {', '.join(KNOWN)}")
    encoders = all(name in KNOWN and KNOWN[name].encoder for name in names)
    seqs = parse_sizes(seq or ("512" if encoders else "1024"))
    texts = [str(path.absolute()) for path in given.pop("texts")]
    threads = given.pop("threads") or default_threads()
    return Asked(models=names, seqs=seqs, texts=texts, threads=threads, **given)


_DECODER = ("plugin", "perplexity", "over exact's", "KL mean, 99%", "same top token", "needle", "prefill", "speedup",
            "a token", "speedup", "peak")  # fmt: skip
_ENCODER = ("plugin", "cosine", "rank correlation", "embedding", "speedup", "peak")


def show(found: "Judgement") -> None:
    """Prints a table for each model and length, and why what is missing is."""
    names = short_names({row["plugin"]: row["variant"] for row in found.rows})
    for facts in found.models:
        print(f"{facts.what or facts.name}. Licence: {facts.licence}.{facts.note and f' Note: {facts.note}.'}")
        rows = [row for row in found.rows if row["model"] == facts.name]
        for seq in dict.fromkeys(row["seq"] for row in rows):
            these = [row for row in rows if row["seq"] == seq]
            if done := [row for row in these if row["status"] == "ok"]:
                print(f"\n{facts.name}, {_windows(done)} of {seq} tokens, {done[0]['dtype']}")
                columns, cells = (_ENCODER, _encoded) if facts.encoder else (_DECODER, _decoded)
                print_table(columns, ([names[row["plugin"]], *cells(row)] for row in done))
            for said, plugins in _said(these).items():
                print(f"{', '.join(names[plugin] for plugin in plugins)}: {said}")
        print()
    for line in found.refused:
        print(line)


def _said(rows: list[dict[str, Any]]) -> dict[str, list[str]]:
    """What is to be said beside the numbers, and of which plugins."""
    said: dict[str, list[str]] = {}
    for row in rows:
        if words := row["note"] if row["status"] == "ok" else f"{row['status']}: {row['reason']}":
            said.setdefault(words, []).append(row["plugin"])
    return said


def _windows(rows: list[dict[str, Any]]) -> str:
    fewest, most = (pick(row["windows"] for row in rows) for pick in (min, max))
    return f"{most} windows" if fewest == most else f"{fewest} to {most} windows"


def _decoded(row: dict[str, Any]) -> list[str]:
    over = f"{row['perplexity_ratio']:.4g}{_between(row, 'perplexity_ratio')}"
    needle = units.hits([n["found"] for n in row["needles"] or ()])
    return [
        f"{row['perplexity']:.4g}{_between(row, 'perplexity')}", over,
        f"{units.error(row['kl_mean'])}, {units.error(row['kl_p99'])}", f"{row['top1_agreement']:.1%}", needle,
        *_times(row, "prefill"), *_times(row, "token"), units.size(row["peak_bytes"]),
    ]  # fmt: skip


def _encoded(row: dict[str, Any]) -> list[str]:
    rank = units.NOTHING if row["rank_correlation"] is None else f"{row['rank_correlation']:.4f}"
    cosine = f"{row['cosine']:.5f}{_between(row, 'cosine')}"
    return [cosine, rank, *_times(row, "prefill"), units.size(row["peak_bytes"])]


def _between(row: dict[str, Any], name: str) -> str:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return "" if low is None else f" [{low:.4g}, {high:.4g}]"


def _times(row: dict[str, Any], name: str) -> tuple[str, str]:
    speedup, low, high = (row[f"{name}_speedup{end}"] for end in ("", "_low", "_high"))
    unsure = " ±?" if low is None and speedup is not None else ""  # too few windows for an interval
    return units.seconds(row[f"{name}_s"]), units.ratio(speedup, low, high) + unsure


def _content(found: "Judgement") -> dict[str, Any]:
    return {
        "machine": found.machine, "models": to_builtins(found.models), "rows": found.rows, "refused": found.refused,
    }  # fmt: skip


def _draw(found: "Judgement", kept: Kept) -> None:
    from attnbench.report.figures.model import quality

    if done := [row for row in found.rows if row["status"] == "ok"]:
        kept.draw(quality(done))
