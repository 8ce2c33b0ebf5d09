"""Which case finds each of the mistakes in plugins/mistakes.py, and what it says; finds them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from attnbench.advice.conforms import TIMEOUT, Outcome, Trials, conform
from attnbench.judge.cases import chosen
from attnbench.registry import Found, Request
from attnbench.workers.server import Forkserver

PLUGINS = str(Path(__file__).parent / "plugins")
PATIENCE = {"NeverDone": 15.0}  # seconds for a case


@dataclass(frozen=True)
class Mistake:
    """A class of plugins/mistakes.py, the group of cases that finds it, the first of them that does, and what is said.

    case: its name. reason: a regular expression. after: the case behind which alone it shows; "": it shows by itself.
    """

    name: str
    group: str
    case: str
    reason: str
    after: str = ""


_OFF = "implementation error|a row is off|calls itself exact"
MISTAKES = {
    mistake.name: mistake
    for mistake in (
        Mistake("WrongScale", "shapes", "odd", _OFF),
        Mistake("ValueScale", "shapes", "value-dim", _OFF),
        Mistake("TopLeft", "shapes", "cache", _OFF),
        Mistake("OneTooMany", "shapes", "odd", _OFF),
        Mistake("Everything", "shapes", "odd", _OFF),
        Mistake("UsualScale", "beyond", "scale", _OFF),
        Mistake("NoWindow", "beyond", "window", _OFF),
        Mistake("WideWindow", "beyond", "window", _OFF),
        Mistake("CappedMask", "beyond", "softcap-causal", _OFF),
        Mistake("OneSink", "beyond", "sinks", _OFF),
        Mistake("RaisesFar", "beyond", "alibi", _OFF),
        Mistake("EvenSlopes", "beyond", "alibi-causal", _OFF),
        Mistake("BothWays", "beyond", "relative-causal", _OFF),
        Mistake("NoMaximum", "values", "large", "NaN or infinite"),
        Mistake("HiddenMaximum", "values", "large", "NaN or infinite"),
        Mistake("WrongAxis", "shapes", "odd", _OFF),
        Mistake("DroppedBlock", "shapes", "odd", _OFF),
        Mistake("CountedPadding", "shapes", "one", _OFF),
        Mistake("Interleaved", "shapes", "grouped", _OFF),
        Mistake("FirstHead", "shapes", "grouped", _OFF),
        Mistake("FirstEntry", "shapes", "batch", _OFF),
        Mistake("QueryShaped", "shapes", "value-dim", "shape"),
        Mistake("HalfSums", "shapes", "tail", _OFF),
        Mistake("Padding", "ragged", "ragged", _OFF),
        Mistake("Behind", "ragged", "ragged", "not 0 behind the end"),
        Mistake("OnePast", "decoding", "served", _OFF),
        Mistake("AlwaysFloat", "shapes", "one", "output is torch.float32"),
        Mistake("Dense", "layouts", "transposed", _OFF),
        Mistake("DenseRows", "layouts", "columns", "NaN"),
        Mistake("Overread", "layouts", "slice", "NaN"),
        Mistake("ScalesQuery", "shapes", "one", "changes its inputs"),
        Mistake("OneKey", "shapes", "one", "shares its memory with an input"),
        Mistake("MaskByLength", "shapes", "odd", "after another case", "odd"),
        Mistake("Accumulates", "shapes", "one", _OFF),
        Mistake("Unseeded", "repeats", "twice", "another output"),
        Mistake("StaleRow", "decoding", "steps", "step 2 of 6"),
        Mistake("ValueForgotten", "decoding", "steps", "step 2 of 6"),
        Mistake("AppendsAgain", "decoding", "steps", "once more from the same state"),
        Mistake("UnscaledGradient", "gradients", "gradient", "gradient of key"),
        Mistake("NoRowSum", "gradients", "gradient", "gradient of query"),
        Mistake("DenseGradient", "gradients", "gradient-transposed", "gradient of"),
        Mistake("DetachedValue", "gradients", "gradient", "gradient of value"),
        Mistake("ClaimsAll", "shapes", "head-dim-16", "AssertionError"),
        Mistake("SaysTrue", "promises", "said", "supports says True"),
        Mistake("SmallPromise", "workspace", "workspace", "workspace_bytes says"),
        Mistake("LargePromise", "workspace", "workspace", "kept from sizes"),
        Mistake("WildPointer", "shapes", "step", "SIGSEGV"),
        Mistake("NeverDone", "shapes", "odd", "no answer within"),
        Mistake("MoreThreads", "shapes", "one", "changes global state"),
    )
}


def row(mistake: Mistake, last: Outcome) -> str:
    """Of the table in docs/plugins.md."""
    what = (getattr(import_module(".plugins.mistakes", __package__), mistake.name).__doc__ or "").strip()
    by = " behind ".join(f"`{case.spec}`" for case in (last.case, *last.after)) if last.failed else "nothing"
    return f"| {what} | {last.status} at {by} | {last.reason.partition('; it fits ')[2]} |"


def found(names: Iterable[str]) -> Iterator[tuple[Mistake, list[Outcome], str]]:
    """For each its outcomes up to the first that fails, and the command that repeats that."""
    with Forkserver(1) as server:
        for name in names:
            mistake = MISTAKES[name]
            with trials(server, name) as asked:
                outcomes = list(conform(asked, chosen([mistake.group], "cpu"), first=True))
                yield mistake, outcomes, asked.repeat(outcomes[-1])


def trials(server: Forkserver, name: str) -> Trials:
    request = Request(Found(name, f"mistakes:{name}", "planted", "1.0", path=PLUGINS))
    return Trials(server, request, name, {}, PATIENCE.get(name, TIMEOUT))
