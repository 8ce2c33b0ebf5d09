"""What of a speedup is left in a block and in a model: runs and what `attnbench model` wrote, joined."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from click.testing import CliRunner
from test_report import BASELINE, RUN, Page, read, rows

from attnbench.analysis.frames import as_rows
from attnbench.analysis.levels import levels
from attnbench.commands.report import command
from attnbench.errors import AttnbenchError
from attnbench.records.judged import CACHE, MODEL
from attnbench.records.run import Run
from attnbench.report.page import write_report
from attnbench.report.prepare import prepared

ROW: dict[str, Any] = {
    "model": "tiny", "plugin": "int8", "variant": "int8", "family": "quantized", "seq": 1024, "dtype": "float32",
    "heads": 8, "kv_heads": 8, "head_dim": 64, "threads": 2, "mask": "full", "status": "ok", "prefill_speedup": 1.1,
    "prefill_speedup_low": 1.05, "prefill_speedup_high": 1.15, "perplexity_ratio": 1.004, "perplexity_ratio_low": 1.001,
    "perplexity_ratio_high": 1.007, "kl_mean": 0.002, "top1_agreement": 0.97,
}  # fmt: skip
FRAME = rows("sdpa:backend=auto", "int8", "naive")


def joined(frame: pd.DataFrame = FRAME, **changes: Any) -> list[dict[str, Any]]:
    machine = changes.pop("machine", RUN["machine"])
    found = levels(prepared(frame, [RUN]), [RUN], [ROW | changes | {"machine": machine}])
    return [{str(name): value for name, value in row.items()} for row in as_rows(found)]


def test_the_three_levels_stand_side_by_side() -> None:
    (row,) = joined()
    alone = FRAME[(FRAME.plugin == "int8") & (FRAME.seq == 1024) & (FRAME.scope == "attention")].speedup.item()
    assert (row["attention"], row["whole"], row["whole_low"]) == (alone, 1.1, 1.05)
    assert row["block"] == alone  # the frame's rows have the same in either scope
    assert (row["perplexity_ratio"], row["kl_mean"]) == (1.004, 0.002)


def test_a_block_in_a_models_style_counts_before_a_classic_one() -> None:
    blocks = FRAME[FRAME.scope == "block"]
    both = pd.concat([blocks.assign(style="llama", speedup=2.5), FRAME], ignore_index=True)
    (row,) = joined(both)
    assert (row["block"], row["attention"]) == (2.5, joined()[0]["attention"])


@pytest.mark.parametrize(
    "changes",
    [
        {"status": "skipped"},
        {"plugin": BASELINE, "variant": "sdpa"},
        {"plugin": "tiled"},
        {"seq": 1000},
        {"kv_heads": 4},
        {"threads": 1},
        {"dtype": "bfloat16"},
        {"mask": "causal"},
        {"machine": RUN["machine"] | {"cpu": "Another CPU"}},
    ],
    ids=str,
)
def test_what_is_not_the_same_problem_is_not_set_beside(changes: dict[str, Any]) -> None:
    assert joined(**changes) == []


@pytest.mark.parametrize(
    "changes", [{"phase": "train"}, {"batch": 2}, {"inputs": "outlier"}, {"baseline": "naive"}], ids=str
)
def test_a_run_of_another_problem_gives_no_level(changes: dict[str, Any]) -> None:
    assert joined(FRAME.assign(**changes)) == []


def test_a_level_that_was_not_measured_is_a_dash_and_the_page_has_the_rest(tmp_path: Path) -> None:
    frame = rows("sdpa:backend=auto", "int8", scope="attention")
    index = write_report(frame, [RUN], tmp_path, [ROW | {"machine": RUN["machine"]}])
    seen: Page = read(index)
    assert "From the kernel to the model" in seen.text
    assert {"tiny", "1.10x [1.05, 1.15]", "1.004x [1.001, 1.007]"} <= set(seen.cells)
    assert (
        "in the block" not in seen.text.partition("Measured beside predicted")[0].partition("became of the model's")[2]
    )
    assert (tmp_path / "figures" / "levels.svg").exists()
    assert "1.004x" in (tmp_path / "report.md").read_text()
    write_report(frame, [RUN], tmp_path)
    assert not (tmp_path / "figures" / "levels.svg").exists()
    assert "From the kernel" not in read(index).text


def test_the_command_takes_what_model_wrote_among_the_runs(tmp_path: Path) -> None:
    run = Run.create(tmp_path, "cpu", {name: value for name, value in RUN.items() if name not in ("schema", "name")})
    run.append([{name: value for name, value in row.items() if name != "run"} for row in as_rows(FRAME)])
    folder = tmp_path / "tiny"
    folder.mkdir()
    written = {"machine": RUN["machine"], "rows": [ROW]}
    (folder / MODEL.file).write_text(json.dumps(written))
    done = CliRunner().invoke(command, [str(run.path), str(folder), "--out", str(tmp_path / "page")])
    assert done.exit_code == 0, done.output
    assert "From the kernel to the model" in (tmp_path / "page" / "index.html").read_text()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is no JSON"),
        ("[]", "it has no rows"),
        (json.dumps({"rows": []}), "or no machine"),
        (json.dumps({"rows": [{"model": "a"}], "machine": {}}), "row 1 of .* has no plugin"),
        (json.dumps({"rows": [3], "machine": {}}), "row 1 of .* has no model"),
    ],
)
def test_a_broken_one_gets_a_line(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / MODEL.file).write_text(text)
    with pytest.raises(AttnbenchError, match=said):
        MODEL.read(tmp_path)


CACHES = Path(__file__).parents[1] / "results" / "2026-11-29-kv-cache"


def test_what_the_cache_command_wrote_gets_a_figure_and_a_table_with_its_claims(tmp_path: Path) -> None:
    judged = CACHE.read(CACHES)
    page = write_report(FRAME, [RUN], tmp_path, kv_caches=[judged])
    seen, markdown = read(page), (tmp_path / "report.md").read_text()
    assert (tmp_path / "figures" / "kv-caches.svg").stat().st_size > 10_000
    for row in judged["rows"]:
        assert (f"| {row['cache']} |" in markdown) == (row["status"] == "ok")
    for claim in judged["claims"]:
        assert claim["sentence"] in seen.text


def test_without_a_cache_the_page_has_nothing_of_it(tmp_path: Path) -> None:
    assert "KV cache" not in write_report(FRAME, [RUN], tmp_path).read_text()
