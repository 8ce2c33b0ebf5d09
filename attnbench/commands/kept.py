"""What a judgement found, on disk as it comes: a folder of its own beside the runs."""

import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnbench.errors import refusals

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from attnbench.records.judged import Judged


class Kept:
    """A new folder DATE-NAME, made with the first row: a file with all rows so far, and a figure at the end.

    asked: a dataclass with what was asked for. kind: see `records.judged`.

    Raises:
        AttnbenchError: it can't be made or written.
    """

    def __init__(self, asked: Any, out: Path, name: str, kind: "Judged") -> None:
        self._asked, self._out, self._name, self._kind = asked, out, name, kind
        self._started = datetime.now(UTC)
        self.folder: Path | None = None

    def write(self, found: dict[str, Any]) -> None:
        """Writes the file in one step: the old one stays whole until the new one is."""
        from attnbench.records import strict
        from attnbench.records.run import new_folder, replace_file

        self.folder = self.folder or new_folder(self._out, self._name)
        with refusals(f"write to {self.folder}", "choose another --out"):
            said = {"command": ["attnbench", *sys.argv[1:]], "started": self._started.isoformat(timespec="seconds")}
            text = strict.dumps(said | {"asked": asdict(self._asked)} | found, indent=1) + "\n"
            replace_file(self.folder / self._kind.file, text.encode())

    def draw(self, figure: "Figure", more: str = "") -> None:
        """Saves a figure of the file's name beside it. more: behind the name, where there are several."""
        from attnbench.report.drawing import save

        if self.folder:
            with refusals(f"write to {self.folder}", "choose another --out"):
                save(figure, self.folder / (Path(self._kind.file).stem + more))
