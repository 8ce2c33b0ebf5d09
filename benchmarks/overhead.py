"""Where the time of a sweep goes that is not in calls: which request to a worker takes how much beside its calls.

python benchmarks/overhead.py [--plugins all] [--seq 512..16384] [--budget 280] [--out FILE]

The sweep is that of `attnbench run`; nothing is kept of it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any

import click

from attnbench.sweep import crew, engine
from attnbench.sweep.session import Session, Unwatched
from attnbench.sweep.settings import Asked
from attnbench.workers.server import Forkserver

WHAT = {
    "Prepare, thorough": "a cell's first process: draw values, measure memory",
    "small problems": "try a variant on them, once for each dtype, mask and shape of heads",
    "Prepare, again": "a cell's further processes: draw values",
    "Look, judged": "judge a call of one burst a process, in the plugin's process",
    "Look": "look at what came out of the other bursts",
    "Judge": "judge the call that measured memory, where no burst's was",
    "Aim": "give a burst's calls their values",
    "Burst": "messages around a burst, and the clock",
    "Finish": "a worker's last figures",
    "witness": "judge in a process without plugins",
    "start": "start processes",
    "leave": "end them",
    "plan": "ask the machine and all plugins",
}
TRUST = ("small problems", "Look, judged", "Look", "Judge", "Aim", "Burst", "witness")
"""Of these, what keeps plugins honest and sees what disturbs a burst."""
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
    ask, judged = crew.Crew.ask, dict[int, bool]()

    def asked(self: crew.Crew, cell: Any, worker: Any, request: Any) -> Any:
        began = monotonic()
        answer = ask(self, cell, worker, request)
        name = type(request).__name__
        if name == "Prepare":
            name += ", thorough" if request.thorough else ", again"
            probes_s = getattr(answer, "probes_s", 0.0)
            _spent["small problems"] += probes_s
            began += probes_s
        if name == "Aim":
            judged[worker.pid] = request.check is not None
        if name == "Look" and judged[worker.pid]:
            name += ", judged"
        known = sum(getattr(answer, part, None) or 0.0 for part in ("calls_s", "setup_s"))  # compilation is in these
        _spent[name] += monotonic() - began - known
        return answer

    crew.Crew.ask = asked  # type: ignore[method-assign]
    crew.Crew.witness = _timed("witness", crew.Crew.witness)  # type: ignore[method-assign]
    crew.Crew.leave = _timed("leave", crew.Crew.leave)  # type: ignore[method-assign]
    Forkserver.start = _timed("start", Forkserver.start)  # type: ignore[method-assign]


@click.command()
@click.option("--plugins", default="all", show_default=True)
@click.option("--seq", default="512..16384", show_default=True)
@click.option("--budget", default=280.0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Write the seconds and the machine here, as JSON.")
def main(plugins: str, seq: str, budget: float, out: Path | None) -> None:
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
    trust = sum(_spent[name] for name in TRUST)
    click.echo(f"{trust:6.1f} s {trust / wall:6.1%}  keeps plugins honest and watches the machine: {', '.join(TRUST)}")
    if out:
        shares = {"calls": seconds.calls, "compilation": seconds.compilation, **_spent, "session": rest}
        out.write_text(json.dumps({"wall": wall, "seconds": shares, "trust": trust, "machine": plan.facts}))


if __name__ == "__main__":
    main()
