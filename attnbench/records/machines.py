"""The machines of a run: what tells them apart, what they are called, and what run.json says of each."""

from collections.abc import Mapping
from itertools import chain, count
from typing import Any

from attnbench import environment
from attnbench.records.schema import Meta

_HARDWARE = ("cpu", "hardware_threads", "memory_bytes", "gpu")


def hardware(machine: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells a machine from another, or from itself under variables that change kernels or where threads run."""
    return *(machine.get(k) for k in _HARDWARE), environment.changes(machine) or "nothing set"


def identity(machine: Mapping[str, Any]) -> tuple[Any, ...]:
    """What must be the same for a run to be resumed: its numbers would not compare otherwise.

    One element more where variables change the kernels or where threads run: see `environment.changes`.
    """
    return (
        *(machine.get(k) for k in _HARDWARE),
        machine.get("libraries", {}).get("torch"),
        *filter(None, [environment.changes(machine)]),
    )


def name_of(machine: Mapping[str, Any], others: Mapping[str, Mapping[str, Any]] | None = None) -> str:
    """A machine in a few words: "AMD EPYC, 2 threads".

    others: machines by the names that they have already. One that is the same by its `identity` lends its name; from
    the rest the name differs, by more words where it has to.
    """
    others = others or {}
    own = identity(machine)
    if name := next((name for name, known in others.items() if identity(known) == own), None):
        return name
    base, told = _base(machine), _details(machine)
    if base not in others:
        return base
    apart = [word for word, theirs in zip(told, _details(others[base]), strict=True) if word and word != theirs]
    numbered = (f"{base}, #{number}" for number in count(2))
    names = chain([", ".join([base, *apart]), ", ".join([base, *filter(None, told)])], numbered)
    return next(name for name in names if name not in others)


def _base(machine: Mapping[str, Any]) -> str:
    threads = machine.get("hardware_threads")
    words = [machine.get("gpu"), machine.get("cpu") or "an unnamed machine"]
    words += [f"{threads:g} thread{'s' * (threads != 1)}"] if threads else []
    return ", ".join(str(word) for word in words if word)


def _details(machine: Mapping[str, Any]) -> tuple[str, str, str]:
    """The rest of its `identity`, in words."""
    memory, torch = machine.get("memory_bytes"), (machine.get("libraries") or {}).get("torch")
    size = f"{memory / 2**30:.3g} GiB" if memory else ""
    return size, f"torch {torch}" if torch else "", environment.changes(machine)


def of_run(meta: Meta) -> dict[str, Mapping[str, Any]]:
    """The facts of each machine that a run was measured on, by name; the first is the one that it began on."""
    if many := meta.get("machines"):
        return dict(many)
    first = meta.get("machine") or {}
    return {name_of(first): first}


def apart(meta: Meta) -> dict[str, dict[str, Any]]:
    """What run.json says of a run, as if each of its machines had one of its own, by the machine's name."""
    found, ceilings = {}, meta.get("ceilings_of")
    for name, facts in of_run(meta).items():
        own = {"machine": dict(facts), "ceilings": meta.get("ceilings") if ceilings is None else ceilings.get(name)}
        found[name] = {key: value for key, value in meta.items() if key not in ("machines", "ceilings_of")} | own
    return found
