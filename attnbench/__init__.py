"""attnbench compares attention variants by time, memory and accuracy.

The names below load on first use: importing attnbench loads neither torch nor matplotlib.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attnbench.advice.best import best
    from attnbench.errors import AttnbenchError
    from attnbench.judge.conformance import check
    from attnbench.plugin import Attention, Choice, FeatureMap, Implementation, Option, Plugin, Softmax
    from attnbench.records.run import load
    from attnbench.sizes import Sweep
    from attnbench.sweep.notebook import run
    from attnbench.task.attend import attend
    from attnbench.workload import Workload

_HOMES = {
    "AttnbenchError": "errors",
    "Attention": "plugin",
    "Choice": "plugin",
    "FeatureMap": "plugin",
    "Implementation": "plugin",
    "Option": "plugin",
    "Plugin": "plugin",
    "Softmax": "plugin",
    "Sweep": "sizes",
    "Workload": "workload",
    "attend": "task.attend",
    "best": "advice.best",
    "check": "judge.conformance",
    "load": "records.run",
    "run": "sweep.notebook",
}

__all__ = [
    "Attention", "AttnbenchError", "Choice", "FeatureMap", "Implementation", "Option", "Plugin", "Softmax", "Sweep",
    "Workload", "attend", "best", "check", "load", "run",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from attnbench.packages import only_whole

        with only_whole():  # torch, which some of them load, looks through all packages
            return getattr(import_module(f"attnbench.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'attnbench' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
