"""`attnbench generate`: runs the two phases of inference for some plugins, shows and writes what came of it."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from attnbench.bench.channel import Closed, Expired, Message
from attnbench.bench.forkserver import Forkserver
from attnbench.bench.plan import Cell, ask, cells_of, describe_exit
from attnbench.bench.runner import ask_machine
from attnbench.errors import AttnbenchError
from attnbench.registry import find, select
from attnbench.workload import Workload

_ALIKE = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 1e-2}  # relative L2 by which the two ways may differ
_MAY_DIFFER = ("quantized", "sparse")  # with more tokens, these round otherwise or show other blocks


@dataclass(frozen=True)
class Generation:
    """What was asked, where, and a result for each plugin: what `bench.generation.generate` says, or why it failed."""

    workload: Workload
    prompt: int
    tokens: int
    repeats: int
    machine: Message
    results: list[dict[str, Any]]

    @property
    def title(self) -> str:
        w = self.workload
        return (
            f"{self.prompt} tokens of prompt, {self.tokens} generated; {w.layers} {w.block} blocks, batch {w.batch}, "
            f"{w.heads} heads of {w.head_dim}, {w.dtype}, {w.threads} threads"
        )


def measure(
    server: Forkserver, plugins: str, threads: int, prompt: int, tokens: int, repeats: int, timeout: float,
    heads: int, kv_heads: int | None, head_dim: int, **sizes: Any,
) -> Generation:  # fmt: skip
    """Generates with each plugin in a process of its own, one after the other.

    Raises:
        AttnbenchError: a plugin is unknown, or the sizes make no workload.
    """
    w = Workload(
        seq=1, kv_seq=prompt + tokens, heads=heads, kv_heads=kv_heads or heads, head_dim=head_dim, value_dim=head_dim,
        mask="causal", phase="decode", scope="block", threads=threads, **sizes,
    )  # fmt: skip
    cells = [cell for r in select(plugins, find()) for cell in cells_of(r, ask(server, r, [w]), [w])]
    asked = {"prompt": prompt, "tokens": tokens, "repeats": repeats}
    results = [{"plugin": c.plugin, "variant": c.variant} | _one(server, c, asked, timeout) for c in cells]
    return Generation(w, prompt, tokens, repeats, ask_machine(server), results)


def _one(server: Forkserver, cell: Cell, asked: Message, timeout: float) -> Message:
    if cell.status:
        return {"failed": cell.status, "reason": cell.reason}
    worker = server.start()
    message = {
        "op": "generate", "workload": cell.workload.as_dict(), "target": cell.target, "options": cell.options, **asked
    }  # fmt: skip
    try:
        answer = worker.request(message, timeout)
    except Expired:
        return {"failed": "timeout", "reason": f"no answer within {timeout:.0f} s (--timeout)"}
    except Closed:
        return {"failed": "crashed", "reason": describe_exit(worker.end())}
    finally:
        worker.end()
    allowed = _ALIKE[cell.workload.dtype]
    if "failed" not in answer and cell.family not in _MAY_DIFFER and not answer["difference"] <= allowed:
        off = f"with a cache it says something else than without: relative L2 {answer['difference']:.1e}"
        answer |= {"failed": "wrong", "reason": f"{off}, over {allowed:.0e}"}
    return answer


def show(found: Generation) -> None:
    """Prints a row a plugin."""
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
    Console(width=None if sys.stdout.isatty() else 200, markup=False, highlight=False).print(table)
    for result in found.results:
        if "failed" in result:
            print(f"{result['plugin']}: {result['failed']}: {result['reason']}")


def write(found: Generation, folder: Path) -> None:
    """Writes generation.json, and a figure where a plugin came to an end.

    Raises:
        AttnbenchError: the folder can't be written.
    """
    from attnbench.report.figures import save
    from attnbench.report.generation_figure import generation

    try:
        folder.mkdir(parents=True, exist_ok=True)
        content = {"command": ["attnbench", *sys.argv[1:]]} | asdict(found)
        (folder / "generation.json").write_text(json.dumps(content, indent=1) + "\n")
        if done := [result for result in found.results if "failed" not in result]:
            past = 0 if found.workload.block == "decoder" else found.prompt
            save(generation(done, past, found.title), folder / "generation")
    except OSError as error:
        raise AttnbenchError(f"can't write to {folder}: {error.strerror}; choose another --out") from None
