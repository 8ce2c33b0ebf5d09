"""Finds plugins, KV caches and schemes of several processes through entry points.

Finding reads package metadata only. Loading runs a plugin's code, so it happens in a worker process (see
`attnbench.workers.serve`), never in the process that plans the sweep.
"""

import difflib
import fnmatch
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from types import FunctionType
from typing import Any

from attnbench.cache import KVCache
from attnbench.errors import AttnbenchError, Failed
from attnbench.packages import about, only_whole
from attnbench.parallel import Scheme
from attnbench.peers import DISTRIBUTION, PEERS
from attnbench.plugin import API_VERSION, FAMILIES, Configured, Plugin, Value, of_function


@dataclass(frozen=True)
class Kind:
    """A sort of thing that entry points offer: their group, the option that names some, and what one is called."""

    group: str
    flag: str
    word: str


DEPRECATED: dict[str, str] = {}
"""Attributes of a plugin that go with the next major version, and what takes their place. Each stands here, and is told
of, for one minor version at least."""

PLUGINS = Kind("attnbench.plugins", "--plugins", "plugin")
CACHES = Kind("attnbench.caches", "--caches", "cache")
SCHEMES = Kind("attnbench.parallel", "--plugins", "scheme")


@dataclass(frozen=True)
class Found:
    """A plugin that a distribution offers, not loaded yet.

    problem: why it can't be used, such as two packages claiming the name; None where nothing is known against it.
    path: the folder that it is imported from, before all others; "" for where Python looks anyway.
    missing: of a peer, the command that installs its library; "" where that is there.
    """

    name: str
    target: str
    """"module:Class", as the entry point gives it; extras in brackets may follow."""
    distribution: str
    version: str
    problem: str | None = None
    path: str = ""
    missing: str = ""

    @property
    def origin(self) -> str:
        return f"{self.distribution} {self.version}"


@dataclass(frozen=True)
class Request:
    """A plugin as asked for on the command line: options still in text, `every` for "name:*".

    named: by its own name, not by "all" or a pattern.
    """

    found: Found
    options: tuple[tuple[str, str], ...] = ()
    every: bool = False
    named: bool = field(default=True, compare=False)


def find(path: str = "", kind: Kind = PLUGINS) -> dict[str, Found]:
    """All of a kind installed, by name, the built-in ones first. A name that two packages claim carries a problem.

    What a package with broken metadata offers is left out, see `packages`.

    path: a folder into which packages were installed: only theirs, see `Found`.
    """
    plugins: dict[str, Found] = {}
    with only_whole():
        entries = {
            (e.name, e.value, *(about(e.dist) if e.dist else ("unknown", "")))
            for e in (_offered(path, kind) if path else metadata.entry_points(group=kind.group))
        }
    for name, target, distribution, version in sorted(entries, key=lambda e: (e[2] != "attnbench", e)):
        plugin = Found(name, target, distribution, version, path=path)
        if not metadata.EntryPoint.pattern.match(target):
            problem = f"{plugin.origin} says {target!r} where its entry point should say module:Class"
            plugin = replace(plugin, problem=problem)
        if name in plugins:
            first = plugins[name]
            problem = f"two {kind.word}s are called {name!r}: one from {first.origin}, one from {plugin.origin}"
            plugins[name] = replace(first, problem=first.problem or problem)
        else:
            plugins[name] = plugin
    if path or kind is not PLUGINS:
        return plugins
    return {name: _peer(plugin) for name, plugin in plugins.items()}


def _peer(plugin: Found) -> Found:
    """With what is known of the library behind it, where it is a peer."""
    if plugin.distribution != DISTRIBUTION or plugin.name not in PEERS:
        return plugin
    peer = PEERS[plugin.name]
    return replace(plugin, path=peer.path, missing=peer.missing)


def _offered(path: str, kind: Kind) -> Iterator[metadata.EntryPoint]:
    for package in metadata.distributions(path=[path]):
        yield from package.entry_points.select(group=kind.group)


def select(text: str, plugins: Mapping[str, Found], kind: Kind = PLUGINS) -> list[Request]:
    """Those that `--plugins`, or `--caches`, names: "all", "a,b", "block*", "name:key=value:key=value", "name:*".

    Peers whose library is not installed are among those of "all" and of patterns no more than what no package offers.

    Raises:
        AttnbenchError: a name is unknown (the message offers the nearest), a peer's library is not installed (the
            command that does it), or a spec is malformed.
    """
    requests: dict[Request, Request] = {}
    for spec in (part.strip() for part in text.split(",")):
        name, *settings = spec.split(":")
        names = _match(name, plugins, spec, kind)
        every = settings == ["*"]
        options = () if every else tuple(_setting(setting, spec, kind) for setting in settings)
        if len(dict(options)) < len(options):
            raise AttnbenchError(f"{kind.flag} {spec!r} gives an option twice")
        for each in (Request(plugins[match], options, every, match == name) for match in names):
            if each.named or each not in requests:
                requests[each] = each
    return list(requests.values())


def _match(name: str, plugins: Mapping[str, Found], spec: str, kind: Kind) -> list[str]:
    peers = PEERS if kind is PLUGINS else {}
    if command := plugins[name].missing if name in plugins else peers[name].missing if name in peers else "":
        raise AttnbenchError(f"{kind.flag} {spec!r}: {name} is a peer that is not installed: {command}")
    pattern = "*" if name == "all" else name
    offered = (known for known, found in plugins.items() if not found.missing)
    names = [known for known in offered if known == name or fnmatch.fnmatchcase(known, pattern)]
    if not names:
        near = difflib.get_close_matches(name, plugins, n=3, cutoff=0.4) or list(plugins)
        raise AttnbenchError(
            f"{kind.flag} {spec!r}: no {kind.word} is called {name!r}; did you mean {' or '.join(near)}?"
        )
    return names


def _setting(text: str, spec: str, kind: Kind) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (key and equals and value):
        raise AttnbenchError(f"{kind.flag} {spec!r}: {text!r} is no option; write name:key=value or name:*")
    return key, value


def load(target: str) -> type[Plugin]:
    """Imports "module:Class", or "module:function" as `of_function` takes it. Runs the plugin's code.

    Raises:
        TypeError: the target is no plugin. Whatever the plugin's import raises passes through.
        Failed: it is written for another version of the contract.
    """
    found: Any = metadata.EntryPoint("plugin", target, PLUGINS.group).load()
    if isinstance(found, FunctionType):
        return of_function(found)
    if not (isinstance(found, type) and issubclass(found, Plugin)):
        raise TypeError(f"{target} is no subclass of attnbench.Plugin")
    _check_family(found, target)
    if reason := _misfit(found.api):
        raise Failed("unsupported", reason)
    return found


def _check_family(found: type[Plugin | KVCache], target: str) -> None:
    if found.family not in FAMILIES:
        raise TypeError(f"{target} has family {found.family!r}; known are {', '.join(FAMILIES)}")


def load_cache(target: str) -> type[KVCache]:
    """Imports "module:Class" of a KV cache. Runs its code.

    Raises:
        TypeError: the target is no cache. Whatever its import raises passes through.
    """
    found: Any = metadata.EntryPoint("cache", target, CACHES.group).load()
    if not (isinstance(found, type) and issubclass(found, KVCache)):
        raise TypeError(f"{target} is no subclass of attnbench.cache.KVCache")
    _check_family(found, target)
    return found


def load_scheme(target: str) -> type[Scheme]:
    """Imports "module:Class" of a scheme of attention across processes. Runs its code.

    Raises:
        TypeError: the target is none. Whatever its import raises passes through.
    """
    found: Any = metadata.EntryPoint("scheme", target, SCHEMES.group).load()
    if not (isinstance(found, type) and issubclass(found, Scheme)):
        raise TypeError(f"{target} is no subclass of attnbench.parallel.Scheme")
    return found


def _misfit(api: str) -> str | None:
    """Why a plugin that is written for this version of the contract is left out; None where it fits, or doesn't say."""
    if not api:
        return None
    if not (isinstance(api, str) and re.fullmatch(r"\d+\.\d+", api)):
        return f"its api is {api!r}, where a version of the plugin contract should be, such as {API_VERSION!r}"
    (major, minor), (ours, least) = (map(int, version.split(".")) for version in (api, API_VERSION))
    if major == ours and minor <= least:
        return None
    mend = "an older attnbench, or a newer plugin" if major < ours else "a newer attnbench"
    return f"it is written for version {api} of the plugin contract, and here is {API_VERSION}: it needs {mend}"


def deprecated(kind: type[Plugin]) -> list[str]:
    """What a plugin says that goes with the next major version, and what to say in its place."""
    own = {name for one in kind.__mro__ if not one.__module__.startswith("attnbench.") for name in vars(one)}
    return [
        f"{name} goes with the next major version: {instead}" for name, instead in DEPRECATED.items() if name in own
    ]


def instances(kind: type[Configured], options: Mapping[str, str], every: bool) -> list[dict[str, Value]]:
    """The option values that a request stands for: one set, or for "name:*" the product of all declared choices.

    Raises:
        AttnbenchError: an option is unknown or its value is not allowed.
    """
    for key in options:
        if key not in kind.options:
            near = difflib.get_close_matches(key, kind.options, n=1) or list(kind.options) or ["none"]
            raise AttnbenchError(f"no option {key!r}; did you mean {' or '.join(near)}?")
    axes: Iterable[Sequence[Value]] = (
        (o.choices or (o.default,)) if every else (o.parse(options[n], n) if n in options else o.default,)
        for n, o in kind.options.items()
    )
    return [dict(zip(kind.options, values, strict=True)) for values in itertools.product(*axes)]


def requested(variant: str | Callable[..., Any]) -> Request:
    """The one plugin that a spec names, or a class or a function (query, key, value) -> out of a module is.

    Raises:
        AttnbenchError: a spec is malformed, or names none or several; another process could not import the function.
    """
    if not isinstance(variant, str):
        return Request(_of_module(variant))
    return _only(variant, PLUGINS)


def _of_module(call: Callable[..., Any]) -> Found:
    """As a plugin that a worker imports by the name of what is called."""
    module, name = getattr(call, "__module__", ""), getattr(call, "__qualname__", "")
    if not name.isidentifier() or getattr(sys.modules.get(module), name, None) is not call:
        raise AttnbenchError(f"{name or call!r} can't be imported by another process; give a function of a module")
    file = sys.modules[module].__file__
    folder = str(Path(file).resolve().parents[module.count(".")]) if file else ""
    known = any(os.path.realpath(path) == folder for path in sys.path)
    return Found(name, f"{module}:{name}", module, "", path="" if known else folder)


def create(spec: str) -> Plugin:
    """The one plugin that a spec such as "int8:rows=32" names, with its options set. Runs the plugin's code.

    Raises:
        AttnbenchError: the spec is malformed, names none or several, has an option or a value that the plugin doesn't
            know, or two packages claim the name.
    """
    request = _sound(_only(spec, PLUGINS))
    if request.found.path not in ("", *sys.path):
        sys.path.insert(0, request.found.path)
    try:
        kind = load(request.found.target)
    except Failed as left_out:
        raise AttnbenchError(f"{request.found.name}: {left_out.reason}") from None
    (values,) = instances(kind, dict(request.options), every=False)
    return kind(**values)


def create_cache(spec: str) -> KVCache:
    """The same for a KV cache, such as "int4:group=32"."""
    request = _sound(_only(spec, CACHES))
    kind = load_cache(request.found.target)
    (values,) = instances(kind, dict(request.options), every=False)
    return kind(**values)


def _only(spec: str, kind: Kind) -> Request:
    requests = select(spec, find(kind=kind), kind)
    if len(requests) != 1 or requests[0].every:
        raise AttnbenchError(f"{spec!r} must name one {kind.word}")
    return requests[0]


def _sound(request: Request) -> Request:
    if request.found.problem:
        raise AttnbenchError(request.found.problem)
    return request


def canonical(name: str, options: Mapping[str, Value]) -> str:
    """The name of a result's `plugin` column: the bare name with every option, in the order declared."""
    return ":".join([name, *(f"{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in options.items())])
