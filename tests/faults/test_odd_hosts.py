"""Hosts that aren't a developer's laptop: it works, or one line says what to do, and nothing is lost."""

from __future__ import annotations

import ast
import json
import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest

from attnbench import AttnbenchError
from attnbench import home as homes
from attnbench.records import ceilings

from .harness import QUICK, Sweep, run

SOURCES = Path(homes.__file__).parent
PLAIN = ("env", "LC_ALL=C", "PYTHONUTF8=0", "PYTHONCOERCECLOCALE=0")


def attnbench(*arguments: str, wrapper: tuple[str, ...] = (), **options: object) -> subprocess.CompletedProcess[str]:
    """A command that is no run, with its exit code and what it said."""
    command = [*wrapper, sys.executable, "-m", "attnbench", *arguments]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=200, **options)  # type: ignore[call-overload,no-any-return]


def offer(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: str = "", version: str = "1.0") -> Path:
    """Puts a distribution with one plugin, `module:Mine`, where commands find it; returns its dist-info."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(f"[attnbench.plugins]\n{name} = {name.replace('-', '_')}:Mine\n")
    (folder / f"{name.replace('-', '_')}.py").write_text(f"{code}\n{_MINE}")
    found = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p != str(folder)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *found]))
    return info


_MINE = """
from torch.nn.functional import scaled_dot_product_attention
from attnbench import Plugin

class Mine(Plugin):
    def build(self, w):
        return lambda q, k, v: scaled_dot_product_attention(q, k, v)
"""


def said(done: subprocess.CompletedProcess[str], *texts: str) -> None:
    (line,) = done.stderr.splitlines()
    assert line.startswith("attnbench: ")
    assert all(text in line for text in texts), line


# A user without a home.


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """As cron, systemd and container platforms have it; the folder of temporary files that is left to them."""

    def unknown(_: int) -> None:
        raise KeyError("no such user")

    for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_without_a_home_there_is_a_folder_of_ones_own(homeless: Path) -> None:
    own = homeless / f"attnbench-{os.getuid()}"
    assert ceilings.stored_at({}, "cpu", 1).is_relative_to(own)
    assert homes.environment() == {"HOME": str(own), "USER": str(os.getuid())}
    assert own.stat().st_mode & 0o777 == 0o700
    assert os.listdir(homeless) == [own.name]  # above all nothing called ~


def test_a_folder_that_others_may_write_to_is_no_home(homeless: Path) -> None:
    own = homeless / f"attnbench-{os.getuid()}"
    own.mkdir()
    own.chmod(0o777)
    with pytest.raises(AttnbenchError, match="set HOME"):
        homes.home()
    own.rmdir()
    own.symlink_to(homeless)
    with pytest.raises(AttnbenchError, match="set HOME"):
        homes.home()


def test_where_there_is_a_home_nothing_is_changed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USER", "someone")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert homes.environment() == {}
    assert homes.cache() == tmp_path / ".cache" / "attnbench"
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert homes.cache() == Path("/elsewhere/attnbench")


@pytest.mark.slow
def test_a_run_without_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asks = "import getpass, pathlib; assert pathlib.Path.home().is_dir() and getpass.getuser()"
    offer(tmp_path / "packages", monkeypatch, "needs-home", asks)
    lacking = tuple(part for name in ("HOME", "USER", "LOGNAME") for part in ("-u", name))
    wrapper = ("env", *lacking, "unshare", "--user", "--map-user=12345")
    if subprocess.run([*wrapper, "true"], capture_output=True).returncode:
        pytest.skip("needs the right to be nobody")
    result = run(tmp_path, "--plugins", "needs-home", "--seq", "64", *QUICK, wrapper=wrapper)
    assert (result.code, result.statuses()) == (0, {"good": "ok", "needs-home": "ok"}), result.err
    assert not list(tmp_path.glob("~*"))


# A terminal and a locale that know ASCII alone; warnings as errors.


@pytest.mark.parametrize("wrapper", [PLAIN, ("env", "PYTHONWARNINGS=error")], ids=["locale", "warnings"])
def test_plugins_are_listed_in_any_locale_and_with_warnings_as_errors(wrapper: tuple[str, ...]) -> None:
    done = attnbench("plugins", "naive", wrapper=wrapper, stdout=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, "")
    assert "exact" in done.stdout


def test_what_the_terminal_cant_encode_is_no_traceback() -> None:
    done = attnbench("theory", "--help", wrapper=("env", "PYTHONIOENCODING=ascii:strict"), stdout=subprocess.PIPE)
    assert done.returncode == 0
    code = "from attnbench.commands import main; import click; main.add_command(click.Command('odd', callback=lambda: "
    code += "print('\\u00b1 \\udce9'))); main.get_command = lambda _, n: main.commands[n]; main(['odd'])"
    odd = subprocess.run([*PLAIN, sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (odd.stdout.strip(), odd.stderr) == ("? ?", "")


def unloadable(module: str, folder: Path) -> tuple[str, ...]:
    """A command's beginning, under which this module can't be imported, for a reason of two lines."""
    broken = "import sys\nclass Broken:\n def find_spec(self, name, *_):\n"
    broken += f"  if name == {module!r}: raise ValueError('as in\\nan odd build')\n"
    (folder / "sitecustomize.py").write_text(broken + "sys.meta_path.insert(0, Broken())\n")
    return "env", "PYTHONPATH=" + os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])


def test_an_optional_import_may_fail_as_it_likes(tmp_path: Path) -> None:
    environment = unloadable("torch._inductor.compile_fx", tmp_path)
    done = attnbench("plugins", "naive", wrapper=environment, stdout=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, "")
    assert "exact" in done.stdout
    code = "from attnbench.workers.ask import ask_machine; from attnbench.workers.server import Forkserver\n"
    code += "with Forkserver(1) as server: server.preload(); print(ask_machine(server).machine['usable_threads'] > 0)"
    loads = subprocess.run([*environment, sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (loads.stdout, loads.stderr) == ("True\n", "")


def test_text_files_say_their_encoding() -> None:
    """All but those of the kernel, which are ASCII."""
    silent = []
    for path in SOURCES.rglob("*.py"):
        for call in (node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)):
            name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            values = [a.value for a in call.args if isinstance(a, ast.Constant)]
            texts = name in ("read_text", "write_text") or (isinstance(call.func, ast.Name) and name == "open")
            kernel = any(str(value).startswith("/proc/") for value in values)
            if texts and not kernel and "encoding" not in {word.arg for word in call.keywords}:
                silent.append(f"{path.name}:{call.lineno}")
            if name == "run" and "text" in {word.arg for word in call.keywords}:
                silent.append(f"{path.name}:{call.lineno}")
    assert silent == []


# A full disk behind stdout.


def test_what_cant_be_printed_is_one_line_and_no_success() -> None:
    with open("/dev/full", "w") as full:
        said(attnbench("plugins", "naive", stdout=full), "can't print", "No space left")
        assert attnbench("plugins", "--help", stdout=full).returncode == 2
    closed = attnbench("plugins", "naive", wrapper=("sh", "-c", 'exec "$@" >&-', "sh"))
    assert (closed.returncode, closed.stderr) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_run_whose_output_finds_no_room_is_complete_on_disk(stream: str, tmp_path: Path) -> None:
    (tmp_path / stream).symlink_to("/dev/full")
    sweep = Sweep(tmp_path, "--plugins", "prints", "--seq", "64,96", *QUICK)
    assert sweep.process.wait(200) == (2 if stream == "stdout" else 0)
    assert sweep.survivors() == []
    (path,) = sweep.results.glob("*/run.json")
    assert json.loads(path.read_text())["finished"]
    assert len((path.parent / "cells.jsonl").read_text().splitlines()) == 2
    if stream == "stdout":  # the run is the same
        with open("/dev/full", "w") as full:
            said(attnbench("export", str(path.parent), stdout=full), "can't print")
            said(attnbench("report", str(path.parent), "--out", str(tmp_path / "page"), stdout=full), "can't print")
        assert (tmp_path / "page" / "index.html").stat().st_size


def test_why_torch_cant_be_loaded_is_said(tmp_path: Path) -> None:
    done = attnbench("plugins", "naive", wrapper=unloadable("torch", tmp_path), stdout=subprocess.PIPE)
    assert done.returncode == 2
    said(done, "torch can't be loaded here: ValueError: as in an odd build")


# Another version of a plugin than the run was begun with.


def test_a_run_is_not_resumed_with_another_version_of_a_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packages = tmp_path / "packages"
    info = offer(packages, monkeypatch, "mine")
    result = run(tmp_path, "--plugins", "min?", "--seq", "64", *QUICK)
    assert result.code == 0, result.err
    assert result.path is not None
    assert json.loads((result.path / "run.json").read_text())["distributions"]["mine"] == "mine 1.0"
    before = {path.name: path.read_bytes() for path in result.path.iterdir()}
    for change, here in (
        (lambda: (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 2.0\n"), "mine 2.0"),
        ((info / "entry_points.txt").unlink, "not installed"),
    ):
        change()
        refused = run(tmp_path, "--resume", str(result.path))
        assert refused.code == 2
        says = f"was begun with the plugin mine from mine 1.0, which is {here} here: install mine 1.0 again, or start a"
        assert says in refused.err
        assert len(refused.err.splitlines()) == 1
    assert {path.name: path.read_bytes() for path in result.path.iterdir()} == before
    offer(tmp_path / "again", monkeypatch, "mine")
    assert run(tmp_path, "--resume", str(result.path)).code == 0
