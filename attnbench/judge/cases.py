"""What a variant is tried on, case by case: small problems of every kind. Loads no torch.

A case is written `name:field=value`, such as "grouped:dtype=bfloat16:mask=causal": what `CASES` has under its name,
with fields of the workload, `lay` or `values` that differ from it.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from attnbench.errors import AttnbenchError
from attnbench.workload import DTYPES, MASKS, Workload

_SMALL = Workload(seq=64, kv_seq=64, heads=2, kv_heads=2, head_dim=32, value_dim=32)
_KINDS = {name: type(value) for name, value in _SMALL.as_dict().items()}
_BEYOND = ("threads", "device")  # said once for all cases
LAYS = ("contiguous", "transposed", "slice", "columns", "expanded")
VALUES = ("", "large", "dominant", "alike", "huge", "hidden", "zero", "tiny")
"""See `judge.draws`; "" are those of a run."""


@dataclass(frozen=True)
class Case:
    """One thing to try.

    name: its entry of `CASES`. group: what it is about. trial: how it is judged, a name of `judge.trials.TRIALS`.
    lay: how inputs lie. values: what is drawn.
    """

    name: str
    group: str
    workload: Workload
    trial: str = "call"
    lay: str = "contiguous"
    values: str = ""

    @property
    def spec(self) -> str:
        """As it is written, whatever the device and the threads. dtype and mask are named in any case."""
        like = CASES[self.name]
        differ = [
            f"{name}={value}"
            for name, value in self.workload.as_dict().items()
            if name not in _BEYOND and (value != getattr(like.workload, name) or name in ("dtype", "mask"))
        ]
        differ += [f"{n}={getattr(self, n)}" for n in ("lay", "values") if getattr(self, n) != getattr(like, n)]
        return ":".join([self.name, *differ])

    def on(self, **changes: Any) -> Case:
        """The same with another workload."""
        return Case(self.name, self.group, self.workload.replace(**changes), self.trial, self.lay, self.values)


def _each(group: str, of: Mapping[str, Mapping[str, Any]], trial: str = "call", **both: Any) -> Iterator[Case]:
    for name, changes in of.items():
        given = both | dict(changes)
        own = {n: given.pop(n) for n in ("lay", "values") if n in given}
        yield Case(name, group, _SMALL.replace(**given), trial, **own)


def _lengths(seq: int, kv_seq: int = 0, **more: Any) -> dict[str, Any]:
    return {"seq": seq, "kv_seq": kv_seq or seq, **more}


def _beyond() -> Iterator[Case]:
    window = _lengths(90, mask="window:24")
    alibi, relative = _lengths(40, 70, bias="alibi"), _lengths(50, 170, bias="relative")
    yield from _each("beyond", {
        "scale": _lengths(70, softmax_scale=0.3, mask="causal"), "window": window,
        "window-1": window | {"mask": "window:1"},
        "window-cache": window | {"seq": 30, "heads": 4}, "softcap": _lengths(70, softcap=2.0),
        "softcap-causal": _lengths(70, softcap=2.0, mask="causal"), "sinks": _lengths(70, sinks=True, heads=4),
        "sinks-causal": _lengths(40, 70, sinks=True, mask="causal"),
        "alibi": alibi | {"heads": 4}, "alibi-causal": alibi | {"heads": 6, "mask": "causal"},
        "relative": relative, "relative-causal": relative | {"mask": "causal"},
        "alibi-and-more": alibi | {"softmax_scale": 0.3, "mask": "window:24", "softcap": 2.0},
        "all-of-it": _lengths(80, softmax_scale=0.3, mask="window:24", softcap=2.0, sinks=True),
        "gradient-window": window | {"phase": "train"},
        "gradient-softcap": _lengths(40, softcap=2.0, mask="causal", phase="train"),
        "gradient-alibi": alibi | {"heads": 4, "phase": "train"},
        "gradient-relative": relative | {"mask": "causal", "phase": "train"},
    })  # fmt: skip
    steps = {
        "window-steps": window | {"seq": 1}, "softcap-steps": _lengths(1, 40, softcap=2.0, mask="causal"),
        "alibi-steps": alibi | {"seq": 1, "mask": "causal"}, "relative-steps": relative | {"seq": 1, "mask": "causal"},
    }  # fmt: skip
    yield from _each("beyond", steps, "steps", phase="decode")


def _cases() -> Iterator[Case]:
    yield Case("said", "promises", _SMALL, "said")
    yield from _each("shapes", {
        "one": _lengths(1), "odd": _lengths(17), "tail": _lengths(257), "cache": _lengths(100, 257),
        "step": _lengths(1, 300), "few-keys": _lengths(100, 40), "grouped": _lengths(130, heads=4),
        "multi-query": _lengths(100, 140, heads=4, kv_heads=1), "batch": _lengths(65, batch=2, inputs="outlier"),
        "value-dim": _lengths(100, value_dim=48), "narrow-value": _lengths(40, head_dim=64, value_dim=16),
        **{f"head-dim-{n}": _lengths(33, head_dim=n, value_dim=n) for n in (16, 64, 80, 128, 192, 256)},
    })  # fmt: skip
    ragged = _lengths(48, batch=3, lengths="48,1,17")
    yield from _each("ragged", {
        "ragged": ragged, "ragged-grouped": ragged | {"heads": 4, "value_dim": 48},
        "ragged-transposed": ragged | {"lay": "transposed"},
        "ragged-cache": _lengths(5, 48, batch=3, lengths="48,5,17"),
        "ragged-gradient": ragged | {"phase": "train"},
    })  # fmt: skip
    yield from _each("layouts", {lay: _lengths(49, batch=2, lay=lay) for lay in LAYS[1:]})
    yield from _each("layouts", {"columns-cache": _lengths(20, 70, lay="columns")}, mask="causal")
    yield from _each("values", {v: _lengths(65, values=v) for v in VALUES[1:]})
    yield from _beyond()
    yield Case("twice", "repeats", _SMALL.replace(**_lengths(130)), "twice")
    yield Case("no-batch", "shapes", _SMALL, "no-batch")
    yield from _decoding()
    yield from _each("gradients", {
        "gradient": _lengths(33), "gradient-grouped": _lengths(40, heads=4, value_dim=48),
        "gradient-cache": _lengths(20, 70), "gradient-one": _lengths(1, 5), "gradient-tail": _lengths(129),
        "gradient-transposed": _lengths(33, batch=2, lay="transposed"),
        "gradient-expanded": _lengths(33, batch=2, lay="expanded"),
        "gradient-huge": _lengths(33, values="huge"),
    }, phase="train")  # fmt: skip
    blocks = {"encoder": _lengths(40), "decoder-only": _lengths(40, heads=4, mask="causal"),
              "decoder": _lengths(24, 40, mask="causal")}  # fmt: skip
    inside = {"scope": "block", "norm": "pre"}
    for block, sizes in blocks.items():
        yield from _each("block", {block: sizes | {"block": block}}, **inside)
    stack = {"stack-train": _lengths(30, mask="causal", layers=2, block="decoder-only", phase="train")}
    yield from _each("block", stack, **inside)
    for block, sizes in blocks.items():
        yield from _each("compile", {f"compiled-{block}": sizes | {"block": block}}, "compiled", **inside)
    yield from _each("workspace", {
        "workspace": _lengths(1024, 1024), "workspace-grouped": _lengths(700, 1500, heads=8),
    }, "workspace", head_dim=64, value_dim=64)  # fmt: skip
    yield Case("drawn", "drawn", _SMALL)


def _decoding() -> Iterator[Case]:
    steps = {
        "steps": _lengths(1, 40), "chunks": _lengths(4, 61), "from-nothing": _lengths(1, 6),
        "grouped-steps": _lengths(1, 70, heads=4), "batch-steps": _lengths(1, 33, batch=2, value_dim=48),
    }  # fmt: skip
    yield from _each("decoding", steps, "steps", phase="decode", mask="causal")
    yield from _each("decoding", {"crossing": _lengths(3, 50)}, phase="decode")
    tree = _lengths(7, 60, mask="tree:2x3")
    trees = {
        "tree": tree,
        "tree-written": tree | {"mask": "tree:0,0,1,1,4,2", "heads": 4},
        "tree-alone": tree | {"kv_seq": 7},
    }
    yield from _each("beyond", trees, phase="decode")
    served = _lengths(21, 40, batch=5, lengths="q21_2q1s40_q5s18_q1s2")
    yield from _each(
        "decoding", {"served": served, "served-grouped": served | {"heads": 4}}, phase="decode", mask="causal"
    )


CASES = {case.name: case for case in _cases()}

_IN: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "promises": ((), ()),
    "shapes": (("float32", "bfloat16"), MASKS),
    "layouts": (("float32", "bfloat16"), MASKS),
    "ragged": (("float32", "bfloat16"), MASKS),
    "values": (tuple(DTYPES), MASKS),
    "beyond": (("float32", "bfloat16"), ()),
    "repeats": (tuple(DTYPES), MASKS),
    "decoding": (tuple(DTYPES), ()),
    "gradients": (("float32", "bfloat16"), MASKS),
    "block": (("float32", "bfloat16"), ()),
    "compile": (("float32",), ()),
    "workspace": (("float32", "bfloat16"), MASKS),
}
"""In which dtypes and with which masks the cases of a group are tried; those of `drawn` are drawn."""

OPTIONAL = ("compile",)
"""Groups that are tried only where they are asked for: they take minutes."""


def listed(device: str, threads: int = 1, optional: Iterable[str] = ()) -> list[Case]:
    """All cases, the simple ones first, but those of groups that are `OPTIONAL` and not given, and the drawn ones."""
    found: dict[Case, None] = {}
    for case in CASES.values():
        if case.group == "drawn" or (case.group in OPTIONAL and case.group not in optional):
            continue
        dtypes, masks = _IN[case.group]
        for dtype, mask in product(dtypes or (case.workload.dtype,), masks or (case.workload.mask,)):
            if _makes_sense(case, mask):
                found[case.on(dtype=dtype, mask=mask, device=device, threads=threads)] = None
    return list(found)


def _makes_sense(case: Case, mask: str) -> bool:
    if mask == "causal":
        return case.workload.seq <= case.workload.kv_seq
    return case.values != "hidden"  # from nobody, where all is visible


def chosen(texts: Iterable[str], device: str, threads: int = 1) -> list[Case]:
    """The cases that are meant: groups, names or patterns of either ("gradient*"), or one as `Case.spec` writes it.

    Raises:
        AttnbenchError: there is none of that name, or what differs makes no workload.
    """
    found: dict[Case, None] = {}
    every = listed(device, threads, OPTIONAL)
    for text in texts:
        matches = [c for c in every if any(fnmatch.fnmatchcase(word, text) for word in (c.group, c.name))]
        if not matches:
            matches = [parse(text).on(device=device, threads=threads)]
        found |= dict.fromkeys(matches)
    return list(found)


def parse(text: str) -> Case:
    """The one case that a spec such as "grouped:dtype=bfloat16" stands for.

    Raises:
        AttnbenchError: there is none of that name, or what differs makes no workload.
    """
    name, *settings = re.split(":(?=[^:=]*=)|:$", text) if "=" in text else text.split(":")  # of a mask, window:24
    if name not in CASES:
        near = difflib.get_close_matches(name, CASES, n=3, cutoff=0.4) or list(CASES)
        raise AttnbenchError(f"--case {text!r}: no case is called {name!r}; did you mean {' or '.join(near)}?")
    like, changes = CASES[name], dict[str, Any]()
    own = {"lay": like.lay, "values": like.values}
    for setting in settings:
        key, equals, value = setting.partition("=")
        known = own | {n: kind for n, kind in _KINDS.items() if n not in _BEYOND}
        if not equals or key not in known:
            raise AttnbenchError(f"--case {text!r}: {setting!r} is no field of a case, as {', '.join(known)}")
        if key in own:
            allowed = LAYS if key == "lay" else VALUES
            if value not in allowed:
                raise AttnbenchError(f"--case {text!r}: {key} is one of {', '.join(filter(None, allowed))}")
            own[key] = value
            continue
        try:
            changes[key] = value == "True" if _KINDS[key] is bool else _KINDS[key](value)
        except ValueError:
            raise AttnbenchError(f"--case {text!r}: {key}={value!r} is no number") from None
    return Case(like.name, like.group, like.workload.replace(**changes), like.trial, **own)
