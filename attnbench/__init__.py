"""attnbench compares attention variants by time, memory and accuracy.

The names below load on first use: importing attnbench loads neither torch nor matplotlib.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attnbench.errors import AttnbenchError
    from attnbench.plugin import Attention, FeatureMap, Option, Plugin, Softmax
    from attnbench.records import load
    from attnbench.workload import Sweep, Workload

_HOMES = {
    "AttnbenchError": "errors",
    "Attention": "plugin",
    "FeatureMap": "plugin",
    "Option": "plugin",
    "Plugin": "plugin",
    "Softmax": "plugin",
    "Sweep": "workload",
    "Workload": "workload",
    "load": "records",
}

__all__ = ["Attention", "AttnbenchError", "FeatureMap", "Option", "Plugin", "Softmax", "Sweep", "Workload", "load"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"attnbench.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'attnbench' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
