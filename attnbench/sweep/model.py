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
from attnbench.stats.intervals import median_interval
from attnbench.sweep.cell import Cell
from attnbench.sweep.plan import cells_of
from attnbench.workers.about_models import AskModel, JudgeModel, ModelFacts, ModelJudged
from attnbench.workers.ask import ask, ask_machine, ask_once, describe_exit
from attnbench.workers.channel import Closed, Expired
from attnbench.workers.messages import Failure
from attnbench.workers.server import Forkserver
from attnbench.workload import Workload

REFERENCE = "sdpa"
_DEPTHS = {4096: (0.0, 0.25, 0.5, 0.75, 1.0), 1 << 40: (0.0, 0.5, 1.0)}  # of needles, up to so many tokens
_MEMORY_SHARE = 0.8  # of what is free
_EXACT_SHARE, _SLOWER = 0.7, 1.5  # of a cell's share of the budget; times as long as exact
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
        rooms = _Rooms(asked, began, sum(cell.status is None for _, _, cell in planned), memory)
        for name, facts, cell in planned:
            answer = _judged(server, name, cell, rooms)
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


@dataclass
class _Rooms:
    """How much of the budget each cell may take, so that all are judged on as many windows as exact attention is.

    left: cells to come. memory: bytes that each may allocate. windows, took: exact's, and its seconds.
    """

    asked: Asked
    began: float
    left: int
    memory: int
    windows: dict[tuple[str, int], int] = field(default_factory=dict)
    took: dict[tuple[str, int], float] = field(default_factory=dict)

    @property
    def over(self) -> float:
        """Seconds that are left of the budget."""
        return self.asked.budget - (monotonic() - self.began)

    def seconds(self, key: tuple[str, int]) -> float | None:
        """For the next cell; None where it does not fit. Exact takes a part of its share, the others may be slower."""
        share, took = max(0.0, self.over) / max(1, self.left), self.took.get(key)
        self.left -= 1
        if took is None:
            return _EXACT_SHARE * share
        return None if self.over < took else min(self.over, _SLOWER * took)


def _judged(server: Forkserver, name: str, cell: Cell, rooms: _Rooms) -> ModelJudged | None:
    """What came of a cell; None where it has ended otherwise."""
    if cell.status is not None:
        return None
    asked, w, key = rooms.asked, cell.workload, (name, cell.workload.seq)
    seconds = rooms.seconds(key)
    if seconds is None:
        took, left = rooms.took[key], max(0.0, rooms.over)
        cell.end("skipped", f"exact attention took {took:.0f} s, {left:.0f} s are left: a higher --budget")
        return None
    depths = next(depths for up_to, depths in _DEPTHS.items() if w.seq <= up_to)
    windows = rooms.windows.get(key, asked.windows)
    question = JudgeModel(
        name, list(asked.texts), w, cell.target, cell.options, windows, seconds, list(depths), asked.tokens
    )
    began = monotonic()
    answer = ask_once(server, question, asked.timeout, rooms.memory, cell.path)
    if isinstance(answer, Failure):
        cell.end(answer.status, answer.reason, answer.traceback)
        return None
    if cell.variant == REFERENCE:
        rooms.windows.setdefault(key, len(answer.windows))
        rooms.took.setdefault(key, monotonic() - began)
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
    found: dict[str, Any] = dict.fromkeys(_NUMBERS)
    windows = answer.windows
    clusters, tokens = [w.document for w in windows], [w.tokens for w in windows]
    found |= {
        "implementation": answer.implementation, "layers": answer.layers, "note": answer.note,
        "windows": len(windows), "documents": len(set(clusters)), "peak_bytes": answer.peak_bytes,
    }  # fmt: skip
    if windows[0].cosine is not None:
        cosine = clustered_mean([w.cosine or 0.0 for w in windows], tokens, clusters)
        found |= {"cosine": cosine.mean, "cosine_low": cosine.low, "cosine_high": cosine.high}
        found["rank_correlation"] = answer.rank_correlation
    else:
        ratio = clustered_mean([w.nll - w.exact_nll for w in windows], tokens, clusters).exp()
        perplexity = clustered_mean([w.nll for w in windows], tokens, clusters).exp()
        for name, mean in (("perplexity", perplexity), ("perplexity_ratio", ratio)):
            found |= {name: mean.mean, f"{name}_low": mean.low, f"{name}_high": mean.high}
        found |= {
            "tokens": sum(tokens),
            "exact_perplexity": clustered_mean([w.exact_nll for w in windows], tokens, clusters).exp().mean,
            "kl_mean": sum(w.kl for w in windows) / sum(tokens),
            "kl_p99": answer.kl_p99,
            "top1_agreement": sum(w.agreed for w in windows) / sum(tokens),
        }
    if answer.needles:
        found["needle"] = sum(n.found for n in answer.needles) / len(answer.needles)
        found["needles"] = [{"depth": n.depth, "found": n.found, "nll": n.nll} for n in answer.needles]
    for name, own, exact in (
        ("prefill", answer.prefill_s, answer.exact_prefill_s),
        ("token", answer.token_s, answer.exact_token_s),
    ):
        if own:
            ratios = median_interval([e / o for e, o in zip(exact, own, strict=False)])
            found |= {
                f"{name}_s": median_interval(own).median,
                f"exact_{name}_s": median_interval(exact).median,
                f"{name}_speedup": ratios.median,
                f"{name}_speedup_low": ratios.low,
                f"{name}_speedup_high": ratios.high,
            }
    return found


_NUMBERS = (
    "implementation", "layers", "note", "windows", "documents", "tokens", "perplexity", "perplexity_low",
    "perplexity_high", "exact_perplexity", "perplexity_ratio", "perplexity_ratio_low", "perplexity_ratio_high",
    "kl_mean", "kl_p99", "top1_agreement", "needle", "needles", "cosine", "cosine_low", "cosine_high",
    "rank_correlation", "prefill_s", "exact_prefill_s", "prefill_speedup", "prefill_speedup_low",
    "prefill_speedup_high", "token_s", "exact_token_s", "token_speedup", "token_speedup_low", "token_speedup_high",
    "peak_bytes",
)  # fmt: skip


def _line(row: dict[str, Any]) -> str:
    what = f"{row['model']} {row['seq']} {row['plugin']}: "
    if row["status"] != "ok":
        return what + f"{row['status']}: {row['reason']}"
    if row["perplexity"] is None:
        return what + f"cosine {row['cosine']:.4f}, {row['windows']} windows"
    return what + f"perplexity {row['perplexity']:.4g}, exact {row['exact_perplexity']:.4g}, {row['windows']} windows"
