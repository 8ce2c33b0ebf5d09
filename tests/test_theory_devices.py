"""`attnbench theory --devices`: the table, what it says where nothing can be, and rates from this machine."""

import json
from typing import Any

import pytest
from click.testing import CliRunner, Result

from attnbench import AttnbenchError
from attnbench.commands import main, theory_devices
from attnbench.sizes import parse_rate
from attnbench.theory.roofline import Ceilings

H100 = "--peak 989TFLOP/s --bandwidth 3.35TB/s --link 450GB/s"


def theory(arguments: str) -> Result:
    return CliRunner().invoke(main, ["theory", *arguments.split()])


def rows_of(arguments: str) -> list[dict[str, Any]]:
    result = theory(f"{arguments} --json")
    assert result.exit_code == 0, result.output
    rows: list[dict[str, Any]] = json.loads(result.stdout)["rows"]
    return rows


def test_a_table_of_devices_and_schemes() -> None:
    result = theory(f"--preset llama-3-8b --seq 131072 --devices 32,64 {H100}")
    assert result.exit_code == 0, result.output
    first, device, heads, *lines = result.stdout.splitlines()
    assert first.startswith("attention 1x32/8x131072x128 bfloat16 causal: 141 TFLOP")
    assert device == "each device: 989 TFLOP/s, reads 3.35 TB/s, sends 450 GB/s while it receives as much"
    assert heads.split()[:3] == ["devices", "scheme", "time"]
    ring = next(line for line in lines if line.startswith("64 "))
    # 63 steps of 2048 tokens' keys and values of 8 heads, 2 bytes each: 504 MiB.
    # Of query, key, value and output 40 MiB, two blocks of 8 MiB, and 32 MiB in which blocks' outputs are added up.
    assert " ".join(ring.split()) == "64 ring 2.22 ms 0 s 504 MiB 88.0 MiB 70,329 100% fastest"
    assert lines[-1] == "not ulysses and tensor-parallel on 64 devices: 64 devices can't share 32 heads evenly"


@pytest.mark.parametrize(
    ("arguments", "fastest"),
    [
        (f"--preset llama-3-8b --seq 131072 --devices 8 {H100}", "ring"),
        # Few kv heads are cheap to gather, but what goes round a ring in so short steps is not hidden.
        (f"--preset llama-3-8b --seq 1024 --devices 8 {H100}", "ulysses"),
        (f"--preset llama-3-8b --seq 4096 --devices 8 --schemes ring-contiguous,ring {H100}", "ring"),
        (f"--seq 4096 --devices 8 --schemes tensor-parallel,all-gather {H100} --phase train", "tensor-parallel"),
    ],
)
def test_the_fastest_is_marked(arguments: str, fastest: str) -> None:
    rows = rows_of(arguments)
    assert [row["scheme"] for row in rows if row["fastest"]] == [fastest]
    assert min(rows, key=lambda row: row["time_s"])["scheme"] == fastest


def test_training_sends_more_and_an_encoder_has_no_causal_mask() -> None:
    common = f"--seq 4096 --devices 4 --schemes ring {H100}"
    forward, train, full = (rows_of(f"{common} {more}")[0] for more in ("", "--phase train", "--block encoder"))
    assert train["sent_bytes"] == 4 * forward["sent_bytes"]  # keys and values twice, gradients of twice the width once
    assert full["link_bound_below"] == pytest.approx(forward["link_bound_below"] / 2, rel=0.01)


def test_what_no_scheme_can_do_is_one_line() -> None:
    result = theory(f"--seq 4095 --devices 7,13 {H100}")
    assert (result.exit_code, result.output) == (2, "attnbench: 4095 tokens can't be cut in 14 equal chunks\n")


HERE = Ceilings("cpu", 2, {"float32": 1e11, "bfloat16": 2e11}, 2e10)


@pytest.mark.parametrize(
    ("ceilings", "given", "says"),
    [
        (HERE, "--link 3G", "each device: 200 GFLOP/s, reads 20 GB/s, sends 3 GB/s"),
        (HERE, "--link 3G --peak 1T", "each device: 1.00 TFLOP/s, reads 20 GB/s, sends 3 GB/s"),
        (HERE, "", "a device's link is not known: give --link 450GB/s\n"),
        (None, "--bandwidth 1T", "a device's peak and link are not known: give --peak 989TFLOP/s --link 450GB/s; att"),
    ],
)
def test_rates_that_are_not_given_are_this_machines(
    ceilings: Ceilings | None, given: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(theory_devices, "_ceilings", lambda: ceilings)
    assert says in theory(f"--seq 4096 --devices 2 {given}").output


@pytest.mark.parametrize(
    ("text", "example", "rate"),
    [("450GB/s", "1GB/s", 450e9), ("3.35TB/s", "1GB/s", 3.35e12), ("2GiB", "1GB/s", 2**31), (" 1g ", "1GB/s", 1e9),
     ("989TFLOP/s", "1TFLOP/s", 989e12), ("1.5 tflops", "1TFLOP/s", 1.5e12), ("989T", "1TFLOP/s", 989e12)],
)  # fmt: skip
def test_rates(text: str, example: str, rate: float) -> None:
    assert parse_rate(text, "link", example) == rate


@pytest.mark.parametrize(("text", "example"), [("", "1GB/s"), ("3e9", "1GB/s"), ("1TB/s", "1TFLOP/s"), ("0", "1GB/s")])
def test_what_is_no_rate(text: str, example: str) -> None:
    with pytest.raises(AttnbenchError, match="is no rate; write 1"):
        parse_rate(text, "link", example)
