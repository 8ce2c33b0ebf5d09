"""`attnbench model`: whether published models still work with a variant as their attention, and how fast they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from attnbench.errors import AttnbenchError
from attnbench.models.known import find as find_model
from attnbench.registry import Request, find, select
from attnbench.stats.clusters import clustered_mean
from attnbench.sweep.cell import Cell
from attnbench.sweep.plan import cells_of
from attnbench.sweep.scored import COLUMNS, ENDS, Room, needles, scores, times
from attnbench.workers.about_models import AskModel, JudgeModel, ModelFacts, ModelJudged
from attnbench.workers.ask import ask, ask_machine, ask_once, describe_exit
from attnbench.workers.channel import Closed, Expired
from attnbench.workers.messages import Failure
from attnbench.workers.server import Forkserver
from attnbench.workload import Workload

REFERENCE = "sdpa"
_DEPTHS = {4096: (0.0, 0.25, 0.5, 0.75, 1.0), 1 << 40: (0.0, 0.5, 1.0)}  # of needles, up to so many tokens
_MEMORY_SHARE = 0.8  # of what is free
_LOAD_SECONDS = 600.0  # unpacking a model, at the first time


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What `attnbench model` is asked for. texts: paths; none for the shipped text. seqs: lengths of windows."""

    models: Sequence[str]
    plugins: str
    seqs: Sequence[int]
    texts: Sequence[str] = ()
    dtype: str = "float32"
    threads: int = 1
    isa: str = "auto"
    budget: float = 540.0
    timeout: float = 600.0
    windows: int = 64
    tokens: int = 9


@dataclass(frozen=True)
class Judgement:
    """What came of it. models: what each says of itself. rows: see `row`.

    refused: a line for each length that a model, or the text, is too short for.
    """

    machine: dict[str, Any]
    models: list[ModelFacts]
    rows: list[dict[str, Any]] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


def judge(asked: Asked, say: Callable[[str], None], keep: Callable[[Judgement], None]) -> Judgement:
    """Judges each variant in each model at each length, in a process of its own, exact attention first.

    say: told a line where one ends, and where something takes long. keep: given what there is after each row.

    Raises:
        AttnbenchError: a plugin or model is unknown or not installed, or no model takes any of the lengths.
    """
    began = monotonic()
    requests = select(f"{REFERENCE},{asked.plugins}", find())
    for name in asked.models:
        find_model(name).paths()
    with Forkserver(asked.threads, asked.isa) as server:
        machine = ask_machine(server)
        found = Judgement(machine.machine, [_facts(server, name, asked, say) for name in asked.models])
        planned = [
            (name, facts, cell)
            for name, facts in zip(asked.models, found.models, strict=True)
            for seq in _taken(facts, asked.seqs, found.refused, say)
            for cell in _cells(server, requests, _workload(facts, seq, asked))
        ]
        if not planned:
            raise AttnbenchError("; ".join(found.refused))
        memory = int(_MEMORY_SHARE * machine.devices["cpu"].free_bytes)
        room = Room(asked.budget, began, sum(cell.status is None for _, _, cell in planned), asked.windows)
        for name, facts, cell in planned:
            answer = _judged(server, name, cell, asked, room, memory) if cell.status is None else None
            found.rows.append(row(facts, cell, answer))
            keep(found)
            say(_line(found.rows[-1]))
    return found


def _facts(server: Forkserver, name: str, asked: Asked, say: Callable[[str], None]) -> ModelFacts:
    worker = server.start()
    packed = not find_model(name).paths()[0].is_dir()
    say(f"{name}: loading" + ("; its weights are unpacked if they never were, in up to a minute" if packed else ""))
    try:
        answer = worker.request(AskModel(name, list(asked.texts), list(asked.seqs)), _LOAD_SECONDS)
    except (Expired, Closed):
        raise AttnbenchError(f"the process that loads {name} came to no end: {describe_exit(worker.end())}") from None
    finally:
        worker.end()
    if isinstance(answer, Failure):
        raise AttnbenchError(answer.reason)
    return answer


def _taken(facts: ModelFacts, seqs: Sequence[int], refused: list[str], say: Callable[[str], None]) -> list[int]:
    """The lengths that the model and the text have; of each other one a line is said."""
    taken = []
    for seq in seqs:
        if seq > facts.longest:
            refused.append(f"{facts.name} was made for {facts.longest} tokens at most: not judged at {seq}")
        elif not facts.windows[seq]:
            refused.append(f"{facts.name}: no document has {seq} tokens; give a longer --text, or a shorter --seq")
        else:
            taken.append(seq)
            continue
        say(refused[-1])
    return taken


def _workload(facts: ModelFacts, seq: int, asked: Asked) -> Workload:
    """The attention of a prefill."""
    return Workload(
        seq=seq, kv_seq=seq, heads=facts.heads, kv_heads=facts.kv_heads, head_dim=facts.head_dim,
        value_dim=facts.head_dim, dtype=asked.dtype, mask="full" if facts.encoder else "causal", threads=asked.threads,
    )  # fmt: skip


def _cells(server: Forkserver, requests: Sequence[Request], workload: Workload) -> list[Cell]:
    cells = [cell for r in requests for cell in cells_of(r, ask(server, r, [workload]), [workload])]
    for cell in cells:
        if cell.status is None and cell.family == "recurrent":
            cell.end("unsupported", "a recurrence approximates no softmax, which the model's weights are made for")
    return cells


def _judged(server: Forkserver, name: str, cell: Cell, asked: Asked, room: Room, memory: int) -> ModelJudged | None:
    """What came of a cell; None where it has ended otherwise. memory: bytes that it may allocate."""
    w, problem = cell.workload, (name, cell.workload.seq)
    seconds = room.seconds(problem)
    if seconds is None:
        cell.end("skipped", room.why_not(problem, "exact attention"))
        return None
    depths = next(depths for up_to, depths in _DEPTHS.items() if w.seq <= up_to)
    windows = room.windows.get(problem, room.most)
    question = JudgeModel(
        name, list(asked.texts), w, cell.target, cell.options, windows, seconds, list(depths), asked.tokens
    )
    began = monotonic()
    answer = ask_once(server, question, asked.timeout, memory, cell.path)
    if isinstance(answer, Failure):
        cell.end(answer.status, answer.reason, answer.traceback)
        return None
    if cell.variant == REFERENCE:
        room.learn(problem, began, len(answer.windows))
    return answer


def row(facts: ModelFacts, cell: Cell, answer: ModelJudged | None) -> dict[str, Any]:
    """A row of `attnbench model`, its names as docs/models.md lists them; None where there is no number."""
    w = cell.workload
    found: dict[str, Any] = {
        "model": facts.name, "plugin": cell.plugin, "variant": cell.variant, "family": cell.family, "seq": w.seq,
        "dtype": w.dtype, "heads": w.heads, "kv_heads": w.kv_heads, "head_dim": w.head_dim, "threads": w.threads,
        "mask": w.mask, "status": cell.status or "ok", "reason": cell.reason,
    }  # fmt: skip
    numbers = dict.fromkeys(_NUMBERS) if answer is None else _numbers(answer)
    return found | numbers


def _numbers(answer: ModelJudged) -> dict[str, Any]:
    windows = answer.windows
    clusters, tokens = [w.document for w in windows], [w.tokens for w in windows]
    found = dict.fromkeys(_NUMBERS) | {
        "implementation": answer.implementation, "layers": answer.layers, "note": answer.note,
        "windows": len(windows), "documents": len(set(clusters)), "peak_bytes": answer.peak_bytes,
    }  # fmt: skip
    if windows[0].cosine is None:
        found |= scores(windows, answer.kl_p99)
    else:
        cosine = clustered_mean([w.cosine or 0.0 for w in windows], tokens, clusters)
        found |= {"cosine": cosine.mean, "cosine_low": cosine.low, "cosine_high": cosine.high}
        found["rank_correlation"] = answer.rank_correlation
    found |= needles(answer.needles)
    found |= times("prefill", answer.prefill_s, "exact", answer.exact_prefill_s)
    return found | times("token", answer.token_s, "exact", answer.exact_token_s)


_NUMBERS = (
    "implementation", "layers", "note", *COLUMNS, *(f"cosine{end}" for end in ENDS), "rank_correlation",
    "prefill_s", "exact_prefill_s", *(f"prefill_speedup{end}" for end in ENDS),
    "token_s", "exact_token_s", *(f"token_speedup{end}" for end in ENDS), "peak_bytes",
)  # fmt: skip


def _line(row: dict[str, Any]) -> str:
    what = f"{row['model']} {row['seq']} {row['plugin']}: "
    if row["status"] != "ok":
        return what + f"{row['status']}: {row['reason']}"
    if row["perplexity"] is None:
        return what + f"cosine {row['cosine']:.4f}, {row['windows']} windows"
    return what + f"perplexity {row['perplexity']:.4g}, exact {row['exact_perplexity']:.4g}, {row['windows']} windows"
