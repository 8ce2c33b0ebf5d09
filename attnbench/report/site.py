"""A leaderboard of many machines' runs as static pages: index.html, and a file of rows for each shape.

A shape is a workload but for device, dtype, threads and seed; the page loads the one that is looked at. Each row is
what one run measured: nothing is averaged.
Names and reasons are data: the page's scripts put them in as text.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from attnbench.errors import AttnbenchError
from attnbench.records.machines import hardware
from attnbench.records.run import replace_file
from attnbench.records.schema import WORKLOAD, Meta, Row
from attnbench.records.submission import Shared, apart
from attnbench.report import units
from attnbench.report.names import short_names
from attnbench.report.prepare import command_line, dimensions, machine_name
from attnbench.report.repeat import repeat_command
from attnbench.report.style import SHADES, shade
from attnbench.report.templates import templates
from attnbench.workload import Workload

_SCRIPTS = ("assets/d3.min.js", *(f"browser/{name}.js" for name in ("tell", "theme", "chart", "strip", "board")))
_ANY = {"dtype": "float32", "device": "cpu", "threads": 1, "seed": 0}  # what rows of one shape may differ in
_USUAL = {
    "phase": "forward", "layers": "1 layer", "inputs": "normal inputs", "scale": "usual scale",
    "ragged": "even lengths", "batch": "mixed batch",
}  # fmt: skip
_FIRST = ("phase", "scope", "layers", "mask", "length", "batch", "heads", "dim")
_OF_ROWS = ("run", "device", "dtype", "seed", "threads", "l2")  # of `dimensions`, what is no shape's
_FIGURES = (
    "latency_s", "latency_low_s", "latency_high_s", "speedup", "speedup_low", "speedup_high", "peak_bytes",
    "approximation_rel_l2",
)  # fmt: skip
_TOLD = ("plugin", "variant", "family", "baseline", "implementation", "status", "reason", "emulated", "converged")
_OF_COMMAND = ("plugin", "baseline", "dtype", "device", "threads", "seed", "l2", "isa")


@dataclass
class _Numbered:
    """Values by the order in which they came."""

    numbers: dict[Any, int] = field(default_factory=dict)

    def of(self, value: Any) -> int:
        return self.numbers.setdefault(value, len(self.numbers))


@dataclass
class _Shape:
    """The rows of one shape, each as JSON: see `Board.add`. machines: that have one with a number."""

    words: dict[str, str]
    commands: _Numbered = field(default_factory=_Numbered)
    written: dict[tuple[Any, ...], int] = field(default_factory=dict)
    rows: list[bytes] = field(default_factory=list)
    machines: set[int] = field(default_factory=set)


class Board:
    """Takes runs in one after the other, and writes the pages."""

    def __init__(self) -> None:
        self._shapes: dict[Workload, _Shape] = {}
        self._known: dict[tuple[Any, ...], _Shape] = {}
        self._machines, self._texts, self._plugins = _Numbered(), _Numbered(), _Numbered()
        self._labels: list[tuple[str, Meta]] = []
        self._families: dict[str, tuple[str, str]] = {}
        self._seen: dict[tuple[Any, ...], Path] = {}
        self._runs: list[list[Any]] = []
        self._encode = msgspec.json.Encoder().encode
        self.rows = 0

    def add(self, shared: Shared) -> Path | None:
        """Takes in a run, as one for each of its machines.

        Where it is there already, as a folder or a file, nothing is added, and that is returned.

        Raises:
            AttnbenchError: a row is of no workload.
        """
        twins = [self._add(part) for part in apart(shared)]
        return twins[0]

    def _add(self, shared: Shared) -> Path | None:
        meta = shared.meta
        own = (meta.get("started"), command_line(meta), hardware(meta.get("machine") or {}), shared.length)
        if own in self._seen:
            return self._seen[own]
        workloads = list(zip(*(shared.column(name) for name in WORKLOAD), strict=True))
        shapes = [self._known.get(values) or self._shape(values, shared.path) for values in workloads]
        self._seen[own] = shared.path
        machine = self._machine(meta)
        run = self._run(shared, machine)
        columns = (shared.column(name) for name in (*_TOLD, *_FIGURES))
        of_commands = zip(*(shared.column(name) for name in _OF_COMMAND), strict=True)
        text, plugins, encode = self._texts.of, self._plugins.of, self._encode
        for shape, values, how, told in zip(shapes, workloads, of_commands, zip(*columns, strict=True), strict=True):
            plugin, variant, family, baseline, ran, status, reason, emulated, converged, *figures = told
            if plugin not in self._families:
                self._families[plugin] = (variant, family)
            command = shape.written.get(how)
            if command is None:
                command = shape.written[how] = shape.commands.of(_command(values, how))
            done = status == "ok" and figures[0] is not None
            if done:
                shape.machines.add(machine)
            flags = (1 if converged else 0) + (2 if emulated else 0)
            base = plugins(baseline) if baseline else None
            row = [run, plugins(plugin), base, text(how[2]), text(how[3]), how[4], text(ran or ""), command, flags]
            row += figures if done else [text(status), text(reason or "")]
            shape.rows.append(encode(row))
        self.rows += shared.length
        return None

    def _shape(self, values: tuple[Any, ...], path: Path) -> _Shape:
        given = dict(zip(WORKLOAD, values, strict=True))
        try:
            workload = Workload.from_dict(given).replace(**_ANY)
        except AttnbenchError as error:
            raise AttnbenchError(f"{path} has a row of no workload: {error}") from None
        found = self._shapes.get(workload)
        if found is None:
            found = self._shapes[workload] = _Shape(_words(workload))
        self._known[values] = found
        return found

    def _machine(self, meta: Meta) -> int:
        machine = meta.get("machine") or {}
        number = self._machines.of((machine_name(meta), str(hardware(machine))))
        if number == len(self._labels):
            self._labels.append((machine_name(meta), machine))
        return number

    def _run(self, shared: Shared, machine: int) -> int:
        meta, of = shared.meta, shared.meta.get("machine") or {}
        torch = (of.get("libraries") or {}).get("torch")
        own = sorted({text for text in (meta.get("distributions") or {}).values() if text.startswith("attnbench ")})
        version = ", ".join(filter(None, [*own, of.get("git") and f"commit {of['git']}"]))
        source = shared.path.name
        facts = [str(meta.get("started") or "")[:16], torch or "", version, command_line(meta), source]
        self._runs.append([machine, *facts, bool(meta.get("ceilings")), bool(meta.get("standard"))])
        return len(self._runs) - 1

    def write(self, out: Path, left_out: int = 0) -> Path:
        """Writes index.html and data/*.js and returns the former. What an earlier site has in data goes.

        Raises:
            OSError: `out` can't be written.
        """
        data = out / "data"
        data.mkdir(parents=True, exist_ok=True)
        for path in data.glob("*.js"):
            if path.stem.isdigit():
                path.unlink()
        shapes = sorted(self._shapes.values(), key=lambda shape: (-len(shape.machines), -len(shape.rows)))
        for number, shape in enumerate(shapes):
            commands = self._encode(list(shape.commands.numbers))
            head = f"arrived({number}, ".encode()
            rows = b",\n".join(shape.rows)
            replace_file(data / f"{number}.js", head + b'{"commands":' + commands + b',"rows":[\n' + rows + b"\n]});\n")
        page = templates(_SCRIPTS, autoescape=True).get_template("site.html.j2")
        html = page.render(index=self._index(shapes), counts=self._counts(left_out))
        replace_file(out / "index.html", html.encode())
        return out / "index.html"

    def _index(self, shapes: Iterable[_Shape]) -> dict[str, Any]:
        shapes = list(shapes)
        variants = {plugin: self._families[plugin][0] for plugin in self._plugins.numbers if plugin in self._families}
        names = short_names(variants)
        every = list(shapes[0].words) if shapes else []
        told = [name for name in every if name == "length" or len({shape.words[name] for shape in shapes}) > 1]
        known = {plugin: self._families.get(plugin, ("", ""))[1] for plugin in self._plugins.numbers}
        return {
            "families": [[family, shade(family, 0), shade(family, 1)] for family in SHADES],
            "plugins": [
                [names.get(plugin, plugin), family if family in SHADES else "", plugin]
                for plugin, family in known.items()
            ],
            "machines": _distinct(self._labels),
            "runs": self._runs,
            "texts": list(self._texts.numbers),
            "choices": told,
            "shapes": [
                [[shape.words[name] for name in told], _heading(shape.words), len(shape.rows), len(shape.machines)]
                for shape in shapes
            ],
        }

    def _counts(self, left_out: int) -> str:
        parts = [
            units.count(len(self._runs), "run"), units.count(len(self._labels), "machine"),
            units.count(len(self._shapes), "shape"), units.count(self.rows, "cell"),
        ]  # fmt: skip
        return ", ".join(parts) + (
            f"; {units.count(left_out, 'file')} left out, which could not be read" * bool(left_out)
        )


def _words(workload: Workload) -> dict[str, str]:
    """Each dimension of a shape in words, no two shapes having all the same."""
    told = dimensions(workload.as_dict() | {"l2": ""})
    keys = units.length(workload.kv_seq)
    told["length"] = keys if workload.seq == workload.kv_seq else f"{units.length(workload.seq)} on {keys}"
    if workload.lengths not in told["ragged"]:
        told["ragged"] = f"lengths {workload.lengths}"
    order = dict.fromkeys([*_FIRST, *(name for name in told if name not in _OF_ROWS)])
    return {name: told[name] or _usual(name) for name in order}


def _usual(name: str) -> str:
    return _USUAL.get(name, f"no {name}")


def _heading(words: Mapping[str, str]) -> str:
    """What is not usual, and the length, in a line."""
    usual = {_usual(name) for name in words} - {"forward"}
    said = (f"length {word}" if name == "length" else word for name, word in words.items())
    return ", ".join(word for word in said if word not in usual)


def _command(workload: tuple[Any, ...], how: tuple[Any, ...]) -> str:
    row: Row = dict(zip(WORKLOAD, workload, strict=True)) | dict(zip(_OF_COMMAND, how, strict=True))
    return repeat_command({name: value for name, value in row.items() if value is not None})


def _distinct(labels: list[tuple[str, Meta]]) -> list[str]:
    """The machines' names; those of one name have their memory behind it, and a number where that is the same too."""
    sized = [name + (f", {units.size(m.get('memory_bytes'))}" if m.get("memory_bytes") else "") for name, m in labels]
    plain = [name for name, _ in labels]
    names, taken = list[str](), dict[str, int]()
    for name, long in zip(plain, sized, strict=True):
        best = name if plain.count(name) == 1 else long
        taken[best] = number = taken.get(best, 0) + 1
        names.append(best if number == 1 else f"{best} #{number}")
    return names
