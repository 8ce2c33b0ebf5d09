"""What is computed in where nobody says, and what commands print for machines and shells."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import cpuinfo
import pytest

from attnbench import environment
from attnbench.devices import machine
from attnbench.devices.cpu import DEVICE
from attnbench.sweep.settings import Asked

FOR_DECODING = {"int4", "fp8", "paged"}
HIDDEN = {"ATTNBENCH_MAX_CPU_ISA": "avx2", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}


def attnbench(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "attnbench", *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, env=os.environ | variables)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done


@pytest.mark.parametrize(
    ("flags", "has"),
    [
        (["avx2", "fma"], False),
        (["avx512f", "avx512_vnni"], False),
        (["avx512f", "avx512_bf16"], True),
        (["amx_bf16"], True),
        (["asimd", "sve", "svebf16"], True),
    ],
)
def test_a_cpu_multiplies_bfloat16_where_it_says_so(
    flags: list[str], has: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpuinfo, "get_cpu_info", lambda: {"flags": flags})
    assert machine.multiplies_bfloat16() is has


@pytest.mark.parametrize("name", HIDDEN)
def test_what_holds_a_cpu_back_holds_the_dtype_back(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "multiplies_bfloat16", lambda: True)
    monkeypatch.setattr(DEVICE, "facts", lambda: {"cpu_capability": "AVX512"})
    for each in HIDDEN:
        monkeypatch.delenv(each, raising=False)
    assert DEVICE.usual_dtype() == "bfloat16"
    monkeypatch.setenv(name, HIDDEN[name])
    assert environment.holds_cpu(os.environ)
    assert DEVICE.usual_dtype() == "float32"


def test_a_sweep_is_causal_and_in_the_dtype_that_is_fast_here() -> None:
    usual = DEVICE.usual_dtype()
    for words, dtype in (((), usual), (("--dtype", "auto"), usual), (("--dtype", "float16"), "float16")):
        told = json.loads(attnbench("run", "--seq", 64, *words, "--dry-run", "--json").stdout)
        assert {cell["dtype"] for cell in told["cells"]} == {dtype}
        assert {cell["mask"] for cell in told["cells"]} == {"causal"}
        assert {cell["block"] for cell in told["cells"]} == {"", "decoder-only"}
        assert {cell["status"] for cell in told["cells"]} == {None}  # every variant can do what nobody chose
        assert {cell["plugin"].split(":")[0] for cell in told["cells"]}.isdisjoint(FOR_DECODING)
    decoding = json.loads(attnbench("run", "--seq", 64, "--phase", "decode", "--dry-run", "--json").stdout)
    assert {cell["plugin"].split(":")[0] for cell in decoding["cells"]} > FOR_DECODING
    hidden = json.loads(attnbench("run", "--seq", 64, "--dry-run", "--json", **HIDDEN).stdout)
    assert {cell["dtype"] for cell in hidden["cells"]} == {"float32"}
    assert Asked.of(dtype="auto").sweep.dtype == Asked.of().sweep.dtype == ()


def test_plugins_fit_a_hundred_columns_and_say_what_would_run() -> None:
    for variables in ({}, HIDDEN):
        lines = attnbench("plugins", **variables).stdout.splitlines()
        assert max(map(len, lines)) <= 100
    told = json.loads(attnbench("plugins", "--json", "--dtype", "bfloat16", "--isa", "avx2").stdout)
    here = {each["plugin"]: each["here"] for each in told["plugins"]}
    assert here["retention"].startswith("causal mask only: torch")
    assert here["naive"] == "yes (emulated)"  # bfloat16 products
    assert here["linear"].startswith("native")
    detailed = attnbench("plugins", "int8").stdout
    assert "rows=1" in detailed
    assert "1|32|128" in detailed


KEYS: dict[tuple[Any, ...], set[str]] = {
    ("plugins",): {"device", "plugins"},
    ("theory",): {"workload", "products"},
    ("theory", "--preset", "gpt2-xl-1.5b"): {
        "workload",
        "products",
        "training",
        "inference",
        "workspaces",
        "parameters",
    },
    ("generate", "--tokens", 2, "--prompt", 8, "--layers", 1, "--heads", 2, "--repeats", 1): {"results", "prompt"},
}


@pytest.mark.parametrize("words", KEYS, ids=lambda words: " ".join(map(str, words)))
def test_tables_are_json_too(words: tuple[Any, ...]) -> None:
    assert json.loads(attnbench(*words, "--json").stdout).keys() >= KEYS[words]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_gets_its_script(shell: str) -> None:
    assert "_ATTNBENCH_COMPLETE" in attnbench("completion", shell).stdout


@pytest.mark.parametrize(
    ("typed", "offered"),
    [("attnbench sh", "show"), ("attnbench run --plugins sdpa,na", "sdpa,naive"), ("attnbench run --inp", "--inputs")],
)
def test_it_completes_commands_options_and_plugins(typed: str, offered: str) -> None:
    words = {"COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - 1), "_ATTNBENCH_COMPLETE": "bash_complete"}
    code = "import sys; sys.argv[0] = 'attnbench'; from attnbench.commands import main; main(prog_name='attnbench')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | words)
    assert f"plain,{offered}" in done.stdout.splitlines()


def test_a_quiet_run_says_where_it_is_and_no_more(tmp_path: Any) -> None:
    small = (
        "--plugins",
        "naive",
        "--baseline",
        "naive",
        "--seq",
        16,
        "--heads",
        1,
        "--scope",
        "attention",
        "--budget",
        5,
    )
    done = attnbench("run", *small, "--quiet", "--out", tmp_path)
    assert done.stdout == f"run: {next(tmp_path.iterdir())}\n"
    told = json.loads(attnbench("run", *small, "--quiet", "--json", "--out", tmp_path).stdout)
    assert [cell["status"] for cell in told["cells"]] == ["ok"]


@pytest.mark.parametrize("command", ["run", "plugins", "completion"])
def test_help_has_examples(command: str) -> None:
    assert f"\n  attnbench {command}" in attnbench(command, "--help").stdout
