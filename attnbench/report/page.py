"""A report's folder: index.html (self-contained), report.md, and the figures of both.

Names of plugins, runs and reasons are data: every value is escaped where it is put on a page, and no path is made of
one.
"""

import base64
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from jinja2 import Environment
from markupsafe import Markup
from matplotlib.figure import Figure

from attnbench.analysis.frames import finished
from attnbench.analysis.levels import levels as by_model
from attnbench.records.schema import Meta, Row
from attnbench.report import across, drawing
from attnbench.report.explore import explorer
from attnbench.report.figures import (
    block,
    caches,
    deviation,
    inputs,
    latency,
    levels,
    memory,
    overview,
    parallel,
    roofline,
    speedup,
    tradeoff,
)
from attnbench.report.findings import findings
from attnbench.report.prepare import Panel, arrange, machine_name, prepared
from attnbench.report.style import Style
from attnbench.report.summary import summary
from attnbench.report.tables import best, cells, predicted
from attnbench.report.tables.caches import by_cache, done
from attnbench.report.tables.inputs import by_inputs
from attnbench.report.tables.levels import by_level
from attnbench.report.tables.parallel import by_world
from attnbench.report.tables.run import run_facts, side_by_side, variants, warnings
from attnbench.report.templates import templates

Draw = Callable[[Sequence[Panel], Style], Figure | None]


@dataclass(frozen=True)
class Beside:
    """What there is beside rows of runs: the machines' names, what `analysis.levels` says of models, KV caches, and

    attention across processes.
    """

    machines: str
    levels: pd.DataFrame
    caches: Sequence[Mapping[str, Any]]
    shared: Sequence[Mapping[str, Any]]


DrawAll = Callable[[Sequence[Panel], Style, Beside], Sequence[Figure | None]]
"""Of all the panels, the style and what is beside them, as many figures as it takes."""


class Kind(NamedTuple):
    """A kind of figure: its title on the page, how to read it, and what draws it."""

    title: str
    read: str
    draw: DrawAll


def _main(draw: Callable[[Panel, Style, str], Figure | None]) -> DrawAll:
    """One figure, of the panel with the most finished cells, the first among equals."""

    def drawn(panels: Sequence[Panel], style: Style, beside: Beside) -> Sequence[Figure | None]:
        main = max(panels, key=lambda panel: len(finished(panel.frame)), default=None)
        return [draw(main, style, beside.machines)] if main else []

    return drawn


def _each(draw: Callable[[Panel, Style], Figure | None]) -> DrawAll:
    """A figure for each panel."""
    return lambda panels, style, _: [draw(panel, style) for panel in panels]


def _all(draw: Draw) -> DrawAll:
    """One figure of all panels."""
    return lambda panels, style, _: [draw(panels, style)]


def _parts(draw: Draw) -> DrawAll:
    """As many panels in a figure as fit; those that do not go into a second one."""
    size = drawing.PANELS
    return lambda panels, style, _: [draw(panels[i : i + size], style) for i in range(0, len(panels), size)]


# By the file's name, in the order of the page. A new figure is a new file in figures/, imported above, and a line here.
FIGURES = {
    "overview": Kind("At a glance", overview.READ, _main(overview.overview)),
    "latency": Kind("Latency against length", latency.READ, _parts(latency.latency)),
    "memory": Kind("Peak memory against length", memory.READ, _parts(memory.memory)),
    "speedup": Kind("Speedup over the baseline", speedup.READ, _parts(speedup.speedup)),
    "errors": Kind("Two errors that mean different things", deviation.READ, _parts(deviation.deviation)),
    "errors-by-inputs": Kind("Who looks better on noise than they are", inputs.READ, _all(inputs.inputs)),
    "speed-vs-error": Kind("Speed against error", tradeoff.READ, _each(tradeoff.tradeoff)),
    "attention-share": Kind("Attention's share of the block's time", block.READ_SHARE, _parts(block.attention_share)),
    "amdahl": Kind("What survives in the block", block.READ_AMDAHL, _parts(block.amdahl)),
    "levels": Kind(
        "From the kernel to the model", levels.READ, lambda _, style, beside: [levels.levels(beside.levels, style)]
    ),
    "kv-caches": Kind(
        "What a KV cache keeps, and what the model loses",
        caches.READ,
        lambda _, style, beside: [caches.caches(rows) for each in beside.caches if (rows := done(each))],
    ),
    "processes": Kind(
        "One attention, several processes",
        parallel.READ,
        lambda _, style, beside: [
            parallel.parallel(rows)
            for each in beside.shared
            for rows in map(across.done, across.problems(each["rows"]))
            if rows
        ],
    ),
    "roofline": Kind("What was reached of what is attainable", roofline.READ, _parts(roofline.roofline)),
}


_SCRIPTS = ("assets/d3.min.js", *(f"browser/{name}.js" for name in ("tell", "theme", "tables", "chart", "explore")))
_ROOM = 2_800_000  # bytes of a page; what pictures find no room in it lie beside it


@dataclass(frozen=True)
class Picture:
    """One figure on the page: `name` is its file's, without a suffix."""

    name: str
    title: str
    read: str
    svg: str
    """Base64, for a data: address."""
    width: int
    """Pixels at which its letters are as large as the page's."""


def write_report(
    frame: pd.DataFrame,
    runs: Sequence[Meta],
    out: Path,
    models: Sequence[Row] = (),
    kv_caches: Sequence[Mapping[str, Any]] = (),
    shared: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Writes index.html, report.md and figures/*.png, *.svg under `out` and returns the HTML page's path.

    frame: rows as `records.load` gives them, of one run or several; may be empty or hold failed cells only.
    models: rows of `attnbench model`, kv_caches and shared: what `attnbench cache` and `attnbench parallel` wrote, see
    `records.judged`.
    Figures of an earlier report in the same place are removed.

    Raises:
        OSError: `out` can't be written.
    """
    frame = prepared(frame, runs)
    found = by_model(frame, runs, models)
    panels, style = arrange(frame, runs), Style.of(frame)
    folder = out / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if re.fullmatch(rf"({'|'.join(FIGURES)})(-\d+)?\.(png|svg)", path.name):
            path.unlink()
    pictures = list(_pictures(panels, style, Beside("; ".join(_machines(runs)), found, kv_caches, shared), folder))
    page = _content(frame, panels, runs, style, pictures)
    page |= {"explorer": explorer(panels, style), "embedded": ()}
    page |= {"by_level": by_level(found, style), "by_cache": by_cache(kv_caches), "by_world": by_world(shared)}
    markdown = _templates(finalize=escape_markdown, keep_trailing_newline=True)
    page["pull_request"] = markdown.get_template("pull_request.md.j2").render(page)
    (out / "report.md").write_text(markdown.get_template("report.md.j2").render(page), encoding="utf-8")
    index = out / "index.html"
    html = _templates(autoescape=True).get_template("report.html.j2")
    page["embedded"] = _fitting(pictures, _ROOM - len(html.render(page).encode()))
    index.write_text(html.render(page), encoding="utf-8")
    return index


def _pictures(panels: Sequence[Panel], style: Style, beside: Beside, folder: Path) -> Iterator[Picture]:
    """Draws and saves whatever there is to draw; only the first of several figures of a kind says how to read it."""
    for kind, (title, read, draw) in FIGURES.items():
        figures = [figure for figure in draw(panels, style, beside) if figure]
        for number, figure in enumerate(figures, 1):
            name = kind if number == 1 else f"{kind}-{number}"
            drawing.save(figure, folder / name)
            svg = base64.b64encode((folder / f"{name}.svg").read_bytes()).decode()
            of = f" ({number} of {len(figures)})" if len(figures) > 1 else ""
            yield Picture(name, title + of, read if number == 1 else "", svg, round(100 * figure.get_figwidth()))


def _fitting(pictures: Sequence[Picture], room: int) -> set[str]:
    """The names of the first pictures, as many as fit into so many bytes."""
    sizes = accumulate(len(picture.svg) for picture in pictures)
    return {picture.name for picture, size in zip(pictures, sizes, strict=True) if size <= room}


def _content(
    frame: pd.DataFrame,
    panels: Sequence[Panel],
    runs: Sequence[Meta],
    style: Style,
    pictures: Sequence[Picture],
) -> dict[str, Any]:
    done = [panel for panel in panels if len(finished(panel.frame))]
    return {
        "machines": _machines(runs),
        "subtitle": "; ".join([*dict.fromkeys(map(_when_and_where, runs)), f"attnbench {version('attnbench')}"]),
        "findings": findings(done, style),
        "summary": summary(frame, panels, runs, style),
        "best": [best.best_by_length(panel, style) for panel in done],
        "pictures": pictures,
        "averages": best.average_speedups(done, style) if done else None,
        "side_by_side": side_by_side(frame, runs, style),
        "by_inputs": by_inputs(panels, style),
        "predicted": predicted.tables(frame, panels, runs, style),
        "on_the_gpu": [told for panel in panels if (told := cells.on_the_gpu(panel, style)).rows],
        "results": [(cells.results(panel, style), cells.commands(panel, style)) for panel in panels],
        "missing": cells.missing(panels, style),
        "tracebacks": cells.tracebacks(panels, style),
        "warnings": warnings(frame, style),
        "variants": variants(frame, style),
        "runs": [(str(run.get("name") or "unnamed"), run_facts(run)) for run in runs],
        "tables": best.pull_request(panels, style),
    }


def _machines(runs: Sequence[Meta]) -> list[str]:
    return list(dict.fromkeys(machine_name(run) for run in runs))


def _when_and_where(run: Meta) -> str:
    started = str(run.get("started") or "")[:16].replace("T", " ")
    return f"{machine_name(run)}, measured {started}" if started else machine_name(run)


def _templates(**settings: Any) -> Environment:
    made = templates(_SCRIPTS, **settings)
    made.filters["fenced"] = fenced
    return made


def escape_markdown(value: Any) -> str:
    """Text that shows as itself inside a paragraph or a table cell of GitHub's Markdown, and pings nobody."""
    if isinstance(value, Markup):
        return value
    text = re.sub(r"\s+", " ", str(value)).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"[\\`*_|~$]", r"\\\g<0>", text)
    text = re.sub(r"\](?=[(\[:])", r"\\]", text)  # no links; plain brackets, as in intervals, need nothing
    return re.sub(r"@(?=\w)|#(?=\d)", "\\g<0>\u200b", text)  # a mention or a reference ends at a zero-width space


def fenced(text: str, language: str = "") -> Markup:
    """A code block whose fence is longer than any run of backticks within."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return Markup(f"{fence}{language}\n{text.rstrip()}\n{fence}")
