"""`attnbench generate`: runs the two phases of inference for some plugins, shows and writes what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

import msgspec

from attnbench.registry import find, select
from attnbench.sweep.cell import Cell
from attnbench.sweep.plan import cells_of
from attnbench.workers.ask import ask, ask_machine, ask_once
from attnbench.workers.messages import Failure, Generate
from attnbench.workers.server import Forkserver
from attnbench.workload import Workload

_ALIKE = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 1e-2}  # relative L2 by which the two ways may differ
_MAY_DIFFER = ("quantized", "sparse")  # with more tokens, these round otherwise or show other blocks


@dataclass(frozen=True)
class Generation:
    """What was asked, where, and for each plugin what `workers.generation.generate` says, or why it failed."""

    workload: Workload
    prompt: int
    tokens: int
    repeats: int
    machine: dict[str, Any]
    results: list[dict[str, Any]]

    @property
    def title(self) -> str:
        w = self.workload
        return (
            f"{self.prompt} tokens of prompt, {self.tokens} generated; {w.layers} {w.block} blocks, batch {w.batch}, "
            f"{w.heads} heads of {w.head_dim}, {w.dtype}, {w.threads} threads"
        )


class Sizes(TypedDict):
    """What is generated: tokens of the prompt and new ones, how often all of it, and the stack that generates them."""

    prompt: int
    tokens: int
    repeats: int
    timeout: float
    layers: int
    block: str
    norm: str
    batch: int
    heads: int
    kv_heads: int | None
    head_dim: int
    dtype: str


def generate(plugins: str, threads: int, isa: str = "auto", **sizes: Unpack[Sizes]) -> Generation:
    """Generates with each plugin in a process of its own, one after the other. isa: see `environment.ISAS`.

    Raises:
        AttnbenchError: a plugin is unknown, the sizes make no workload, or the CPU lacks the instructions.
    """
    prompt, tokens, repeats, heads, head_dim = (sizes[n] for n in ("prompt", "tokens", "repeats", "heads", "head_dim"))
    w = Workload(
        seq=1, kv_seq=prompt + tokens, heads=heads, kv_heads=sizes["kv_heads"] or heads, head_dim=head_dim,
        value_dim=head_dim, mask="causal", phase="decode", scope="block", threads=threads, layers=sizes["layers"],
        block=sizes["block"], norm=sizes["norm"], batch=sizes["batch"], dtype=sizes["dtype"],
    )  # fmt: skip
    asked = {"prompt": prompt, "tokens": tokens, "repeats": repeats}
    requests = select(plugins, find())
    with Forkserver(threads, isa) as server:
        machine = ask_machine(server).machine
        cells = [cell for r in requests for cell in cells_of(r, ask(server, r, [w]), [w])]
        results = [{"plugin": c.plugin, "variant": c.variant} | _one(server, c, asked, sizes["timeout"]) for c in cells]
        return Generation(w, prompt, tokens, repeats, machine, results)


def _one(server: Forkserver, cell: Cell, asked: dict[str, int], timeout: float) -> dict[str, Any]:
    if cell.status:
        return {"failed": cell.status, "reason": cell.reason}
    question = Generate(cell.workload, cell.target, cell.options, **asked)
    found = ask_once(server, question, timeout, path=cell.path)
    if isinstance(found, Failure):
        return {"failed": found.status, "reason": found.reason}
    answer = msgspec.structs.asdict(found)
    allowed = _ALIKE[cell.workload.dtype]
    if cell.family not in _MAY_DIFFER and not answer["difference"] <= allowed:
        off = f"with a cache it says something else than without: relative L2 {answer['difference']:.1e}"
        answer |= {"failed": "wrong", "reason": f"{off}, over {allowed:.0e}"}
    return answer
