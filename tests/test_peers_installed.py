"""Which peers are installed, which command installs the others, and a folder of its own for one: on peers made up here."""

from __future__ import annotations

import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from attnbench import check
from attnbench.commands import main
from attnbench.commands.plugins import _told
from attnbench.peers import PEERS, Peer
from attnbench.registry import Request, find, select
from attnbench.workers.ask import ask
from attnbench.workers.messages import Described
from attnbench.workers.server import Forkserver
from attnbench.workload import Workload

PROJECT = tomllib.loads((Path(__file__).parents[1] / "peers/pyproject.toml").read_text())["project"]
PLUGIN = """
import tiny_library
from attnbench.plugin import Attention, Plugin
from torch.nn.functional import scaled_dot_product_attention

class Tiny(Plugin):
    def build(self, workload):
        return Attention(scaled_dot_product_attention, f"tiny {tiny_library.VERSION}")
"""
WORKLOAD = Workload(seq=8, kv_seq=8)


def run(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(main, words)
    return done.exit_code, done.output.strip()


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A peer whose library is nowhere yet, and a shelf from which pip could install it."""
    monkeypatch.setitem(PEERS, "tiny", Peer("tiny", "made up", ("tiny-library==1.5",)))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setattr(sys, "path", sys.path[:])
    with zipfile.ZipFile(tmp_path / "tiny_library-1.5-py3-none-any.whl", "w") as wheel:
        info = "tiny_library-1.5.dist-info"
        wheel.writestr("tiny_library.py", "VERSION = 1.5")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-library\nVersion: 1.5\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", f"tiny_library.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    return tmp_path


@pytest.fixture
def offered(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The distribution of the peers, with a plugin for this one."""
    site, info = tiny / "site", tiny / "site/attnbench_peers-9.dist-info"
    info.mkdir(parents=True)
    (site / "tiny_plugin.py").write_text(PLUGIN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: attnbench-peers\nVersion: 9\n")
    (info / "entry_points.txt").write_text("[attnbench.plugins]\ntiny = tiny_plugin:Tiny\n")
    monkeypatch.syspath_prepend(site)


def test_the_list_is_that_of_the_distribution() -> None:
    assert set(PEERS) - {"tiny"} == set(PROJECT["entry-points"]["attnbench.plugins"])
    for peer in PEERS.values():
        assert not peer.extra or set(peer.needs) <= set(PROJECT["optional-dependencies"][peer.extra]), peer


def test_what_no_package_offers_is_named_with_its_command() -> None:
    if "ggml" in find():
        pytest.skip("attnbench-peers is installed here")
    assert run("run", "--plugins", "tiny") == (
        2,
        "attnbench: --plugins 'tiny': tiny is a peer that is not installed: "
        "pip install ./peers && attnbench peers install tiny",
    )
    assert "pip install './peers[ggml]'" in run("run", "--plugins", "tiled,ggml:cache=q8_0")[1]


@pytest.mark.usefixtures("offered")
def test_a_peer_without_its_library_is_no_part_of_all() -> None:
    found = find()
    assert found["tiny"].missing == "attnbench peers install tiny"
    assert "tiny" not in {request.found.name for request in select("all", found)}
    assert run("run", "--plugins", "tiny")[0] == 2
    assert (
        _told([found["tiny"]], "cpu", "float32", "auto", load=False)[0]["here"]
        == "not installed: attnbench peers install tiny"
    )
    code, said = run("peers")
    assert code == 0
    assert "made up" in said
    assert '"install": "attnbench peers install tiny"' in run("peers", "--json")[1]


@pytest.mark.usefixtures("offered")
def test_its_own_folder_is_what_it_imports_from() -> None:
    code, said = run("peers", "install", "tiny")
    assert (code, said.partition(" in ")[0]) == (0, "tiny 1.5")
    found = find()["tiny"]
    assert (found.missing, Path(found.path).is_relative_to(PEERS["tiny"].folder)) == ("", True)
    with Forkserver(1) as server:
        assert isinstance(ask(server, Request(found), [WORKLOAD]), Described)
    assert check("tiny", WORKLOAD).implementation == "tiny 1.5"


def test_what_pip_cannot_install_is_one_line_and_leaves_what_was_there(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("peers", "install", "tiny")[0] == 0
    (tiny / "tiny_library-1.5-py3-none-any.whl").unlink()
    code, said = run("peers", "install", "tiny")
    assert (code, len(said.splitlines())) == (2, 1)
    assert "tiny-library==1.5" in said
    assert (PEERS["tiny"].version, [each.name for each in PEERS["tiny"].folder.parent.iterdir()]) == ("1.5", ["tiny"])
    monkeypatch.setitem(PEERS, "tiny", Peer("tiny", "made up", ("tiny-library=={torch}.*",), torches=("1.0",)))
    assert PEERS["tiny"].version is None  # a release for another torch counts as none
    assert "compiled for torch 1.0, and here is torch" in run("peers", "install", "tiny")[1]
    assert "no peer is called 'nobody'" in run("peers", "install", "nobody")[1]
