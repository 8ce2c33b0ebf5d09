"""A report's folder: index.html (self-contained), report.md, and the figures of both.

Names of plugins, runs and reasons are data: every value is escaped where it is put on a page, and no path is made of
one.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from attnbench.analysis import attainable, rows, shares
from attnbench.records.schema import GPU_COLUMNS
from attnbench.report import figures, predicted_tables, tables
from attnbench.report.panels import Panel, arrange, machine_name
from attnbench.report.roofline_figure import roofline as draw_roofline
from attnbench.report.side_by_side import side_by_side
from attnbench.report.style import Style
from attnbench.report.verdict import verdict

_TEXTS = ("run", "plugin", "variant", "family", "implementation", "distribution", "scope", "block", "norm", "phase",
          "device", "dtype", "lengths", "mask", "inputs", "status", "reason", "traceback", "baseline", "warnings",
          "converged", "timing", "l2", "start_throttled", "end_throttled")  # fmt: skip
_NUMBERS = (
    "batch", "heads", "kv_heads", "seq", "kv_seq", "head_dim", "value_dim", "layers", "seed", "threads", "latency_s",
    "latency_low_s", "latency_high_s", "rounds", "speedup", "speedup_low", "speedup_high", "peak_bytes",
    "workspace_bytes", "input_bytes", "output_bytes", "saved_bytes", "cache_bytes", "flops_per_s", "variant_flops",
    "density", "setup_s", "implementation_rel_l2", "approximation_rel_l2", "tolerance", *tables.GRADIENTS,
    "wall_s", "energy_j", "reserved_bytes", "process_bytes", *GPU_COLUMNS,
)  # fmt: skip

Draw = Callable[[Sequence[Panel], Style], Figure | None]

FIGURES = {
    "overview": ("At a glance", "Every panel is explained with its own figure below."),
    "latency": (
        "Latency against length",
        "Lower is faster, and a straight line is a power of the length l: the legend names the fitted power with its "
        "95% interval (over the lengths from an eighth of the longest up). Points are medians; bands and bars are "
        "their 95% intervals, often narrower than the marker. A cross at the top is a cell without a number.",
    ),
    "memory": (
        "Peak memory against length",
        "Inputs, output and workspace of one call, lower is leaner. The dotted line is inputs and output alone, which "
        "no variant can avoid: what lies above it is workspace.",
    ),
    "speedup": (
        "Speedup over the baseline",
        "Measured in pairs with the baseline, round by round; above 1x is faster. Where a band holds 1x, the two were "
        "not told apart.",
    ),
    "errors": (
        "Two errors that mean different things",
        "Left: is the code right? Its output against the function that the variant itself defines; it has to stay "
        "under its tolerance. Right: what does that function cost? The same output against exact softmax attention on "
        "these inputs; a variant can be perfectly right on the left and useless on the right.",
    ),
    "speed-vs-error": (
        "Speed against error",
        "Up is faster, left is closer to exact attention. Circled variants are on the Pareto front: no other is both "
        "faster and closer. Exact variants count as equally close, since they differ by rounding only.",
    ),
    "attention-share": (
        "Attention's share of the block's time",
        "Latency of attention alone over that of the transformer block around it; the rest is projections, FFN and "
        "norms, which no faster attention can shorten. The two are measured one after the other, so where a variant's "
        "latency varies from minute to minute a share may even pass 100%; its interval says how far to trust it.",
    ),
    "amdahl": (
        "What survives in the block",
        "Solid: the block's speedup over the baseline's block, as measured. Dashed: what Amdahl's law makes of the "
        "speedup of attention alone and of attention's share of the baseline's block. Where the solid line lies lower, "
        "the variant costs the rest of the block something: caches, or the layout of its output; or the machine was "
        "slower while attention alone was measured than while the block was.",
    ),
    "roofline": (
        "What was reached of what is attainable",
        "How fast a variant computes, against how many operations it has for each byte that has to move (inputs, "
        "weights and output); operations are the variant's own, so one that leaves work out is not the faster here. "
        "The grey line is what this machine reached at best, in products of each format and, the slope, in reading "
        "memory: the closer below it, the less is left to gain for the same operations. Where tensors fit the caches "
        "the slope is no bound. A larger marker is a longer length.",
    ),
}  # fmt: skip


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


def write_report(frame: pd.DataFrame, runs: Sequence[Mapping[str, Any]], out: Path) -> Path:
    """Writes index.html, report.md and figures/*.png, *.svg under `out` and returns the HTML page's path.

    frame: rows as `records.load` gives them, of one run or several; may be empty or hold failed cells only.
    runs: what run.json says, one a run.
    Figures of an earlier report in the same place are removed.

    Raises:
        OSError: `out` can't be written.
    """
    frame = prepared(frame, runs)
    panels, style = arrange(frame, runs), Style.of(frame)
    folder = out / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if re.fullmatch(rf"({'|'.join(FIGURES)})(-\d+)?\.(png|svg)", path.name):
            path.unlink()
    pictures = [_saved(name, title, figure, folder) for name, title, figure in _drawn(panels, runs, style)]
    page = _content(frame, panels, runs, style, pictures)
    markdown = _markdown()
    page["pull_request"] = markdown.get_template("pull_request.md.j2").render(page)
    (out / "report.md").write_text(markdown.get_template("report.md.j2").render(page), encoding="utf-8")
    index = out / "index.html"
    index.write_text(_html().get_template("report.html.j2").render(page), encoding="utf-8")
    return index


def prepared(frame: pd.DataFrame, runs: Sequence[Mapping[str, Any]] = ()) -> pd.DataFrame:
    """All the columns that a report needs, whatever an older record lacks, with numbers as numbers.

    runs: what run.json says, one a run; without, nothing is known of ceilings.
    """
    frame = frame.reset_index(drop=True).reindex(columns=list(dict.fromkeys([*frame.columns, *_TEXTS, *_NUMBERS])))
    for name in _NUMBERS:
        frame[name] = pd.to_numeric(frame[name], errors="coerce")
    bare = [str(plugin).partition(":")[0] for plugin in frame["plugin"]]
    frame["variant"] = [v if isinstance(v, str) else b for v, b in zip(frame["variant"], bare, strict=True)]
    frame["run"] = frame["run"].fillna("").astype(str)
    frame["converged"] = frame["converged"].ne(False)
    frame = frame.sort_values(["run", "plugin"], kind="stable") if frame["run"].nunique() > 1 else frame
    return frame.join([shares.attention_share(frame), shares.amdahl(frame), attainable.columns(frame, runs)])


def _drawn(
    panels: Sequence[Panel], runs: Sequence[Mapping[str, Any]], style: Style
) -> Iterator[tuple[str, str, Figure]]:
    """(file name, title, figure) of whatever there is to draw; panels that do not fit go into a second figure."""
    if main := _main_panel(panels):
        machines = dict.fromkeys(machine_name(run) for run in runs)
        glance = figures.overview(main, style, "; ".join(machines))
        if glance:
            yield "overview", FIGURES["overview"][0], glance
    several: dict[str, Draw] = {
        "latency": figures.latency,
        "memory": figures.memory,
        "speedup": figures.speedup,
        "errors": figures.errors,
    }
    for name, draw in several.items():
        yield from _numbered(name, _in_parts(draw, panels, style))
    yield from _numbered("speed-vs-error", [figures.speed_vs_error(panel, style) for panel in panels])
    yield from _numbered("attention-share", _in_parts(figures.attention_share, panels, style))
    yield from _numbered("amdahl", _in_parts(figures.amdahl, panels, style))
    yield from _numbered("roofline", _in_parts(draw_roofline, panels, style))


def _main_panel(panels: Sequence[Panel]) -> Panel | None:
    """The panel with the most finished cells, the first among equals."""
    return max(panels, key=lambda panel: len(rows.finished(panel.frame)), default=None)


def _in_parts(draw: Draw, panels: Sequence[Panel], style: Style) -> list[Figure | None]:
    size = figures.PANELS
    return [draw(panels[i : i + size], style) for i in range(0, len(panels), size)]


def _numbered(name: str, drawn: Sequence[Figure | None]) -> Iterator[tuple[str, str, Figure]]:
    some = [figure for figure in drawn if figure]
    for number, figure in enumerate(some, 1):
        title = FIGURES[name][0] + (f" ({number} of {len(some)})" if len(some) > 1 else "")
        yield name if number == 1 else f"{name}-{number}", title, figure


def _saved(name: str, title: str, figure: Figure, folder: Path) -> Picture:
    figures.save(figure, folder / name)
    svg = (folder / f"{name}.svg").read_bytes()
    # Only the first of several figures of a kind says how to read it.
    read = FIGURES[name][1] if name in FIGURES else ""
    return Picture(name, title, read, base64.b64encode(svg).decode(), round(100 * figure.get_figwidth()))


def _content(
    frame: pd.DataFrame,
    panels: Sequence[Panel],
    runs: Sequence[Mapping[str, Any]],
    style: Style,
    pictures: Sequence[Picture],
) -> dict[str, Any]:
    finished = [panel for panel in panels if len(rows.finished(panel.frame))]
    return {
        "machines": list(dict.fromkeys(machine_name(run) for run in runs)),
        "subtitle": "; ".join(
            [*dict.fromkeys(map(_when_and_where, runs)), "attnbench " + metadata.version("attnbench")]
        ),
        "verdict": verdict(frame, panels, runs, style),
        "best": [tables.best_by_length(panel, style) for panel in finished],
        "pictures": pictures,
        "averages": tables.average_speedups(finished, style) if finished else None,
        "side_by_side": side_by_side(frame, runs, style),
        "predicted": predicted_tables.tables(frame, panels, runs, style),
        "on_the_gpu": [told for panel in panels if (told := tables.on_the_gpu(panel, style)).rows],
        "results": [(tables.results(panel, style), tables.commands(panel, style)) for panel in panels],
        "missing": tables.missing(panels, style),
        "tracebacks": tables.tracebacks(panels, style),
        "warnings": tables.warnings(frame, style),
        "variants": tables.variants(frame, style),
        "runs": [(str(run.get("name") or "unnamed"), tables.run_facts(run)) for run in runs],
        "tables": tables.pull_request(panels, style),
    }


def _when_and_where(run: Mapping[str, Any]) -> str:
    started = str(run.get("started") or "")[:16].replace("T", " ")
    return f"{machine_name(run)}, measured {started}" if started else machine_name(run)


def _html() -> Environment:
    here = Path(__file__).parent
    made = Environment(loader=FileSystemLoader(here), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
                       lstrip_blocks=True)  # fmt: skip
    made.globals["css"] = Markup((here / "report.css").read_text(encoding="utf-8"))
    return made


def _markdown() -> Environment:
    """Every value is escaped unless it is marked safe."""
    made = Environment(loader=FileSystemLoader(Path(__file__).parent), finalize=escape_markdown, trim_blocks=True,
                       lstrip_blocks=True, undefined=StrictUndefined, keep_trailing_newline=True)  # fmt: skip
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
