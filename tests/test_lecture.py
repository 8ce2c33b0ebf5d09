"""docs/lecture.md: every command on the page is understood, and, made small, does what the page says."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import click
import pytest

from attnbench.commands import find as find_command
from attnbench.registry import find, instances, load, select
from attnbench.sweep.settings import Asked, Given

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "lecture.md").read_text()


class Block(NamedTuple):
    """The commands of one ```sh block, each as words, and its number among those of its section."""

    section: str
    number: int
    commands: list[list[str]]

    def __str__(self) -> str:
        return f"{self.section}-{self.number}"


def blocks() -> list[Block]:
    found = []
    for section in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]:
        for number, text in enumerate(re.findall(r"^```sh\n(.*?)^```$", section, re.MULTILINE | re.DOTALL), 1):
            lines = text.replace("\\\n", "").splitlines()  # as a shell joins what a backslash continues
            found.append(Block(section.split(".")[0], number, [shlex.split(line, comments=True) for line in lines]))
    return found


BLOCKS = blocks()
COMMANDS = [(f"{block}-{i}", words) for block in BLOCKS for i, words in enumerate(block.commands, 1)]


def test_every_claim_has_a_command_and_says_how_to_read_it() -> None:
    sections = re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]
    assert [section.split(".")[0] for section in sections] == [str(n) for n in range(1, 12)]
    for section in sections:
        for claim in re.split(r"^(?=\*\*Claim)", section, flags=re.MULTILINE)[1:]:
            assert claim.count("```sh\n") == 1, claim
            assert len(re.split(r"^```$", claim, flags=re.MULTILINE)[-1].split()) > 20, "how is the result read?"
    names = re.findall("<!-- result: (.*) -->", PAGE)
    assert len(names) == len(set(names))


@pytest.mark.parametrize("words", [pytest.param(words, id=name) for name, words in COMMANDS])
def test_every_command_is_understood(words: list[str]) -> None:
    if words[0] == "python":
        script = ROOT / words[1]
        assert script.is_file()
        assert all(f'"{word}"' in script.read_text() for word in words[2:] if word.startswith("--"))
        return
    assert words[0] == "attnbench"
    command = find_command(words[1])
    given = command.make_context(words[1], words[2:]).params
    if words[1] == "run":
        asked = {name: value for name, value in given.items() if name in Given.__annotations__}
        sweep = Asked.of(**asked).sweep
        assert replace(sweep, device="cpu", dtype=sweep.dtype or ("float32",)).workloads()
    if "plugins" in given:
        asked = [*select(given["plugins"], find()), *select(given.get("baseline") or "sdpa", find())]
        for request in asked:
            if request.found.distribution == "attnbench":
                assert instances(load(request.found.target), dict(request.options), request.every)


def test_a_renamed_option_would_be_seen() -> None:
    with pytest.raises(click.ClickException):
        find_command("run").make_context("run", ["--plugin-names", "sdpa"])


# What makes a command small: what to look for in it, and what to put there, in this order.
SMALL = [
    (r"(?<=--seq )\S*\.\.\S+", "64,128"),
    (r"(?<=--seq )\d+(?!\S)", "128"),
    (r"(?<=--layers )\d+,\S+", "1,2"),
    (r"(?<=--layers )\d+(?!\S)", "2"),
    (r"(?<=--prompt )\d+", "16"),
    (r"(?<=--tokens )\d+", "2"),
    (r" --budget \S+", ""),
    (r"^attnbench run ", "attnbench run --budget 5 --precision 50% "),
    (r"^attnbench generate ", "attnbench generate --repeats 1 "),
    (r"projections\.py", r"projections.py --seq 16 --rounds 6"),
    (r"adam\.py", r"adam.py --layers 2 --heads 2 --seq 64"),
]

# What the last command of a section's block, made small, must say.
SAYS = {
    "1-1": ["random", "dictionary", "distance"],
    "2-1": ["encoder-only", "decoder-only", "encoder-decoder", "intelligence"],
    "3-1": ["QK^T", "43"],
    "3-2": ["cross", "84", "10 k + 4"],
    "4-1": ["per head / three", "1024  16     16"],
    "5-1": ["report: "],
    "6-1": ["optimizer states", "does not fit"],
    "6-2": ["measured/theory", "together"],
    "6-3": ["8 of 8 cells", " ok"],
    "7-1": ["6 of 6 cells", " ok"],
    "7-2": ["9 of 9 cells", " ok"],
    "8-1": ["cells: ", " ok"],  # of as many variants as are installed
    "8-2": ["20 of 20 cells", " ok"],
    "9-1": ["decoder-only blocks", "retention", "without", "outputs differ by"],
    "9-2": ["decoder blocks", "linear", "without", "outputs differ by"],
    "9-3": ["10 of 10 cells", " ok"],
    "10-1": ["30 of 30 cells", " ok"],
    "11-1": ["report: "],
}


def small(words: list[str]) -> list[str]:
    if words[:2] == ["attnbench", "theory"]:
        return words  # costs nothing
    line = shlex.join(words)
    for pattern, by in SMALL:
        line = re.sub(pattern, by, line)
    return shlex.split(line)


def run(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """In `folder`, with the commands of this environment and the repository's scripts."""
    environment = dict(os.environ)
    if words[0] == "python":
        words = [sys.executable, str(ROOT / words[1]), *words[2:]]
    else:
        words = [str(Path(sys.executable).parent / words[0]), *words[1:]]
        if words[1] == "calibrate":
            environment["XDG_CACHE_HOME"] = str(folder / "cache")  # what the machine's owner measured stays
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_the_commands_do_what_the_page_says(block: Block, tmp_path: Path) -> None:
    for words in block.commands:
        done = run(small(words), tmp_path)
        said = done.stdout + done.stderr
        if words[1] == "calibrate" and "not kept" in said:
            continue  # the machine is busy, and it says so
        assert done.returncode == 0, said
    for text in SAYS[str(block)]:
        assert text in said, said
    assert not {path.name for path in tmp_path.iterdir()} - {"results", "reports", "cache", "generate"}
