"""Where this user's files go, on a host that knows no home folder for them too."""

from __future__ import annotations

import getpass
import os
import tempfile
from pathlib import Path

from platformdirs import user_cache_path, user_data_path

from attnbench.errors import AttnbenchError


def home() -> Path:
    """The user's home; without HOME and an entry in passwd a folder among the temporary ones that is theirs alone.

    Raises:
        AttnbenchError: there is no home, and no such folder can be had.
    """
    try:
        return Path.home()
    except RuntimeError:
        folder = Path(tempfile.gettempdir()) / f"attnbench-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError as error:
        raise AttnbenchError(f"this user has no home folder, and {folder}: {error.strerror}; set HOME") from None
    # Kernels are compiled and loaded below it, so another user must not have made it.
    if status.st_uid != os.getuid() or status.st_mode & 0o022 or not folder.is_dir():
        raise AttnbenchError(f"this user has no home folder, and {folder} may be another's; set HOME")
    return folder


def cache() -> Path:
    """attnbench's folder for what can be made again."""
    try:
        return user_cache_path("attnbench")
    except RuntimeError:  # nobody's home is known
        return home() / ".cache" / "attnbench"


def activations() -> Path:
    """What was captured from models, see `task.captured`."""
    return cache() / "activations"


def data() -> Path:
    """attnbench's folder for what was installed."""
    try:
        return user_data_path("attnbench")
    except RuntimeError:  # nobody's home is known
        return home() / ".local" / "share" / "attnbench"


def environment() -> dict[str, str]:
    """What a process needs beside `os.environ` so that others' code, torch's included, finds a home and a name."""
    needed = {}
    if home() != Path(os.path.expanduser("~")):
        needed["HOME"] = str(home())
    try:
        getpass.getuser()
    except (KeyError, OSError, ImportError):  # KeyError before Python 3.13
        needed["USER"] = str(os.getuid())
    return needed
