"""Where the time of a sweep goes that is not in calls: which request to a worker takes how much beside its calls.

python benchmarks/overhead.py [--plugins all] [--seq 512..4096] [--budget 100]

The sweep is that of `attnbench run`; nothing is kept of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from time import monotonic
from typing import Any

import click

from attnbench.sweep import crew, engine
from attnbench.sweep.session import Session, Unwatched
from attnbench.sweep.settings import Asked
from attnbench.workers.server import Forkserver

WHAT = {
    "Prepare, thorough": "a cell's first process: build, draw values, judge, measure memory, small problems",
    "Prepare, again": "its further processes: build, draw values, warm up",
    "Look": "look at what came out of a burst; judge that of one burst a process",
    "Aim": "give a burst's calls their values",
    "Burst": "messages around a burst, and the clock",
    "Finish": "a worker's last figures",
    "witness": "judge in a process without plugins",
    "start": "start processes",
    "leave": "end them",
    "plan": "ask the machine and all plugins",
}
_spent: Counter[str] = Counter()


class _Kept:
    """Takes rows and leaves them."""

    def append(self, rows: object) -> None: ...


def _timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*given: Any, **how: Any) -> Any:
        began = monotonic()
        try:
            return function(*given, **how)
        finally:
            _spent[name] += monotonic() - began

    return call


def _watch() -> None:
    ask = crew.Crew.ask

    def asked(self: crew.Crew, cell: Any, worker: Any, request: Any) -> Any:
        began = monotonic()
        answer = ask(self, cell, worker, request)
        name = type(request).__name__
        if name == "Prepare":
            name += ", thorough" if request.thorough else ", again"
        known = sum(getattr(answer, part, None) or 0.0 for part in ("calls_s", "setup_s"))  # compilation is in these
        _spent[name] += monotonic() - began - known
        return answer

    crew.Crew.ask = asked  # type: ignore[method-assign]
    crew.Crew.witness = _timed("witness", crew.Crew.witness)  # type: ignore[method-assign]
    crew.Crew.leave = _timed("leave", crew.Crew.leave)  # type: ignore[method-assign]
    Forkserver.start = _timed("start", Forkserver.start)  # type: ignore[method-assign]


@click.command()
@click.option("--plugins", default="all", show_default=True)
@click.option("--seq", default="512..4096", show_default=True)
@click.option("--budget", default=100.0, show_default=True)
def main(plugins: str, seq: str, budget: float) -> None:
    began = monotonic()
    with engine.planned(Asked.of(plugins=plugins, seq=seq, budget=budget)) as plan:
        _spent["plan"] = monotonic() - began
        _watch()
        session = Session(plan.server, engine.settings_here(plan))
        session.run(plan.cells, _Kept(), Unwatched())
    wall, seconds = monotonic() - began, session.seconds
    click.echo(f"{wall:.0f} s: {seconds.calls:.0f} s in calls, {seconds.compilation:.0f} s in compilation; of the rest")
    for name, took in _spent.most_common():
        click.echo(f"{took:6.1f} s {took / wall:6.1%}  {name:18} {WHAT[name]}")
    rest = wall - seconds.calls - seconds.compilation - sum(_spent.values())
    click.echo(f"{rest:6.1f} s {rest / wall:6.1%}  the session itself")


if __name__ == "__main__":
    main()
