"""A machine's ceilings on disk, in the user's cache folder."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attnbench import home
from attnbench.errors import AttnbenchError
from attnbench.records import run, strict
from attnbench.theory.roofline import Ceilings
from attnbench.workload import DEVICES


def stored_at(facts: Mapping[str, Any], device: str, threads: int) -> Path:
    """Where the ceilings of a machine are kept. facts: `device.describe`."""
    # A GPU's ceilings don't depend on the CPU's threads.
    key = json.dumps([*run.identity(dict(facts)), device, threads if DEVICES[device].host else None])
    return home.cache() / f"ceilings-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def store(ceilings: Ceilings, facts: Mapping[str, Any]) -> Path:
    """Keeps them for later runs and returns where.

    Raises:
        AttnbenchError: the file can't be written.
    """
    path = stored_at(facts, ceilings.device, ceilings.threads)
    content = {"machine": run.identity(dict(facts))} | ceilings.as_dict()
    temporary = path.with_suffix(f".{os.getpid()}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(strict.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise AttnbenchError(f"can't write {path}: {error.strerror}; set XDG_CACHE_HOME to a folder you own") from None
    return path


def stored(facts: Mapping[str, Any], device: str, threads: int) -> Ceilings | None:
    """The ceilings that were kept for a machine, device and number of threads; None if there are none, or broken."""
    try:
        return Ceilings.from_dict(strict.loads(stored_at(facts, device, threads).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None
