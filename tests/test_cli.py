"""The command line: what it can't do ends as one line that says so, exit code 2, and nothing written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attnbench.commands import main
from attnbench.workers import server


class Started(Exception):
    """The command line was understood, and a server would start."""


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty folder to stand in, where a command ends well at the point where it would start its first process."""

    def start(*_: object) -> None:
        raise click.exceptions.Exit(0)

    monkeypatch.setattr(server.Forkserver, "__init__", start)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments, catch_exceptions=False, prog_name="attnbench")


def assert_refused(result: Result, *says: str) -> None:
    assert result.exit_code == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1, result.stderr
    for text in says:
        assert text in result.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--seq 512..1000", "doubling from 512 does not hit 1000; nearest are 512 and 1024"),
        ("--seq 512..1000+100", "steps of 100 from 512 does not hit 1000; nearest are 912 and 1012"),
        ("--seq 1024..512", "runs backwards; write 512..1024"),
        ("--seq x", "'x' is no size"),
        ("--seq=", "'' is no size"),
        ("--seq 0", "--seq must be between 1 and 999999999999"),
        ("--seq 512,", "'' is no size"),
        ("--seq -1", "'-1' is no size"),
        ("--seq 1e3", "'1e3' is no size"),
        ("--seq 99999999999999999999", "--seq must be between"),
        ("--seq 1..100001+1", "over 10000 values"),
        ("--kv-seq 1..2..3", "--kv-seq '1..2..3'"),
        ("--kv-seq 100 --mask causal", "a causal mask needs --kv-seq >= --seq"),
        ("--kv-seq 100 --scope block", "--kv-seq must equal --seq"),
        ("--heads 8 --kv-heads 3", "8 heads cannot share 3 kv heads"),
        ("--head-dim 6.5", "--head-dim '6.5'"),
        ("--dtype float8", "'float8' is none of float32, bfloat16, float16"),
        ("--mask full,diagonal", "--mask must be one of full, causal, window:N, tree:2x3, not 'diagonal'"),
        ("--device tpu", "tpu"),
        ("--scope everything", "everything"),
        ("--block middle", "middle"),
        ("--norm between", "between"),
        ("--inputs real", "real"),
        ("--precision 0%", "--precision '0%' is no share; write 2% or 0.02"),
        ("--precision 100%", "no share"),
        ("--precision nan", "no share"),
        ("--memory 0", "--memory '0' is no amount of memory"),
        ("--memory lots", "write 16GiB, 16GB or 512M"),
        ("--l2 cold", "'cold' is not one of 'kept', 'flushed'"),
        ("--budget 0", "--budget"),
        ("--budget nan", "--budget"),
        ("--budget inf", "--budget"),
        ("--timeout nan", "--timeout"),
        ("--timeout -1", "--timeout"),
        ("--seed -1", "--seed"),
        ("--seed 1.5", "--seed"),
        ("--threads 0", "--threads"),
        ("--threads many", "--threads"),
        ("--no-such-option", "--no-such-option"),
        ("--preset lama-3-8b", "no preset 'lama-3-8b'; there is: llama-3-8b"),
        ("surplus", "surplus"),
        ("--seq", "--seq"),
        ("--resume nowhere", "nowhere is no run: it has no run.json"),
        ("--resume nowhere --seq 512", "--resume takes the sweep from the run; drop --seq"),
        ("--plugins sdpaa", "no plugin is called 'sdpaa'; did you mean sdpa"),
        ("--plugins nothing*", "no plugin is called 'nothing*'"),
        ("--plugins sdpa:backend", "'backend' is no option; write name:key=value"),
        ("--plugins sdpa:backend=math:backend=auto", "gives an option twice"),
        ("--plugins=", "no plugin is called ''"),
        ("--baseline sdpaa", "no plugin is called 'sdpaa'"),
        ("--baseline sdpa:*", "must name one plugin"),
        ("--baseline sdpa,naive", "must name one plugin"),
        ("--seq 1..10000+1 --batch 1..10000+1 --heads 1..10000+1", "workloads"),
    ],
)
def test_a_run_that_can_not_be_is_refused(parse: Path, arguments: str, says: str) -> None:
    assert_refused(invoke("run", *arguments.split(" ")), says)
    assert list(parse.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("nonsense", "nonsense"),
        ("--nonsense", "--nonsense"),
        ("plugins nonsense", "no plugin is called 'nonsense'"),
        ("plugins --device tpu", "tpu"),
        ("report nowhere", "nowhere is no run"),
        ("report", "no run under results; make one with: attnbench run"),
        ("export", "RUNS"),
        ("export nowhere", "nowhere is no run"),
        ("export --format nonsense nowhere", "nonsense"),
        ("theory --preset nonsense", "no preset 'nonsense'"),
        ("theory --preset mla --device-memory 32GB", "--device-memory needs --preset with a whole model"),
        ("theory --preset gpt2-small --heads 3", "--preset says it already; drop --heads"),
        ("theory --link 450GB/s", "--link needs --devices"),
        ("theory --devices 2 --schemes rings --link 1G", "'rings' is none of ring, ulysses"),
        ("theory --devices 2 --phase decode", "--devices is of attention, forward or in training"),
        ("theory --devices 8..9 --peak 1T", "--devices 8..9: doubling from 8"),
        ("theory --preset gpt2-small --device-memory much", "--device-memory 'much' is no amount of memory"),
    ],
)
def test_other_commands_refuse_alike(parse: Path, arguments: str, says: str) -> None:
    assert_refused(invoke(*arguments.split(" ")), says)
    assert list(parse.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        "",
        "--seq 512..16384",
        "--seq 1 --batch 1..4 --heads 8,16 --kv-heads 1..8 --head-dim 64,128 --value-dim 32",
        "--seq 512..4096+512,7 --kv-seq 4096 --mask full,causal --scope attention",
        "--dtype float32,bfloat16 --precision 0.5% --budget 1 --timeout 0.1 --memory 1.5GiB --seed 2147483647",
        "--plugins all",
        "--plugins sdpa,block*,sdpa:backend=math,sdpa:*",
        "--baseline none --block decoder --norm post --inputs outlier --dry-run",
        "--baseline sdpa:backend=math",
        "--preset llama-3-8b --head-dim 64 --seq 1024",
    ],
)
def test_a_run_that_can_be_gets_as_far_as_its_first_process(parse: Path, arguments: str) -> None:
    result = invoke("run", *arguments.split())
    assert (result.exit_code, result.output) == (0, "")


@pytest.mark.parametrize("command", ["", "run", "report", "plugins", "export", "theory", "doctor"])
def test_help(command: str) -> None:
    result = invoke(*command.split(), "--help")
    assert result.exit_code == 0
    assert result.stdout.startswith(f"Usage: attnbench {command}".strip())


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from attnbench.commands import main; main(['run', '--help'], standalone_mode=False); "
        "print([m for m in ('torch', 'numpy', 'pandas', 'scipy', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


# Fuzzing.

NUMBERS = st.integers(-2, 40).map(str)
WORDS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12)
GRAMMAR = st.text("0123456789.,+-eE% KMGTiB:*=", max_size=12)
RANGES = st.builds("{}..{}{}".format, NUMBERS, NUMBERS, st.sampled_from(["", "+1", "+3", "+0", ",5", "..9"]))
SIZES = NUMBERS | RANGES | GRAMMAR | WORDS
VALUES = {
    "--plugins": st.sampled_from(["all", "sdpa", "naive,sdpa", "block*", "sdpa:*", "sdpa:backend=math"]) | WORDS | GRAMMAR,
    "--baseline": st.sampled_from(["none", "sdpa", "all", "*"]) | WORDS,
    **dict.fromkeys(
        ("--seq", "--kv-seq", "--batch", "--heads", "--kv-heads", "--head-dim", "--value-dim"), SIZES
    ),
    "--dtype": st.sampled_from(["float32", "bfloat16,float16", "float32,"]) | WORDS,
    "--device": st.sampled_from(["auto", "cpu", "cuda"]) | WORDS,
    "--mask": st.sampled_from(["full", "causal", "causal,full"]) | WORDS,
    "--scope": st.sampled_from(["attention", "block", "all"]) | WORDS,
    "--block": st.sampled_from(["encoder", "decoder", "decoder-only"]) | WORDS,
    "--norm": st.sampled_from(["pre", "post"]) | WORDS,
    "--inputs": st.sampled_from(["normal", "outlier"]) | WORDS,
    "--seed": NUMBERS | GRAMMAR | WORDS,
    "--threads": NUMBERS | GRAMMAR | WORDS,
    "--precision": GRAMMAR | WORDS,
    "--budget": NUMBERS | st.floats().map(str) | GRAMMAR | WORDS,
    "--timeout": NUMBERS | st.floats().map(str) | GRAMMAR | WORDS,
    "--memory": NUMBERS | GRAMMAR | WORDS,
    "--out": WORDS,
    "--name": WORDS,
    "--resume": WORDS,
}  # fmt: skip
OPTIONS = st.sampled_from(sorted(VALUES)).flatmap(lambda name: st.tuples(st.just(name), VALUES[name]))
ARGUMENTS = st.lists(OPTIONS | WORDS.map(lambda w: (w,)), max_size=6).map(lambda parts: [a for p in parts for a in p])


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(arguments=ARGUMENTS, dry=st.booleans())
def test_no_arguments_make_a_run_break(parse: Path, arguments: list[str], dry: bool) -> None:
    result = invoke("run", *arguments, *(["--dry-run"] if dry else []))
    if result.exit_code:
        assert_refused(result)
    elif result.stdout:
        assert result.stdout.startswith("Usage: ")  # a word was --help, or a prefix of it
    assert list(parse.iterdir()) == []


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(option=st.sampled_from(sorted(VALUES)), value=SIZES | WORDS)
def test_no_single_value_makes_a_run_break(parse: Path, option: str, value: str) -> None:
    result = invoke("run", f"{option}={value}")
    if result.exit_code:
        assert_refused(result)
    assert list(parse.iterdir()) == []


# Processes of their own.


def attnbench(folder: Path, *arguments: str | bytes) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "attnbench", *arguments], cwd=folder, capture_output=True, timeout=240, env=os.environ
    )


def test_an_error_leaves_by_stderr_alone(tmp_path: Path) -> None:
    done = attnbench(tmp_path, "run", "--seq", "512..1000")
    assert (done.returncode, done.stdout) == (2, b"")
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_the_caches_of_a_cpu_can_not_be_chosen(tmp_path: Path) -> None:
    done = attnbench(tmp_path, "run", "--plugins", "sdpa", "--seq", "64", "--device", "cpu", "--l2", "flushed")
    assert done.returncode == 2
    assert done.stderr.decode().splitlines() == [
        "attnbench: --l2 is for --device cuda: what the caches of cpu hold can't be chosen"
    ]
    assert not (tmp_path / "results").exists()


def test_a_dry_run_runs_nothing(tmp_path: Path) -> None:
    done = attnbench(tmp_path, "run", "--plugins", "sdpa", "--seq", "64,999999", "--dry-run", "--memory", "1GiB")
    assert done.returncode == 0, done.stderr
    assert b"2 cells" in done.stdout or b"3 cells" in done.stdout
    assert b"nothing was run" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "attnbench", "run", "--device", "cuda", "--seq", "64"],
        cwd=tmp_path, capture_output=True, timeout=240, env=hidden, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        "attnbench: --device cuda: this machine or this torch has no CUDA device; use --device cpu"
    ]
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_option_of_a_plugin(tmp_path: Path) -> None:
    done = attnbench(tmp_path, "run", "--plugins", "sdpa:kernel=math", "--seq", "64")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [b"attnbench: --plugins sdpa: no option 'kernel'; did you mean backend?"]
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_is_no_text(tmp_path: Path) -> None:
    done = attnbench(
        tmp_path, "run", "--plugins", "sdpa", "--seq", "64", "--heads", "1", "--scope", "attention", "--budget", "2",
        "--out", b"caf\xe9", "--name", b"na\xefve",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr
    assert done.stdout.splitlines()[-1].startswith(b"run: caf")
