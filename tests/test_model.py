"""`attnbench model`: perplexity, divergence, needles and embeddings of models whose answers are known, and the command."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tiny_models import LETTERS, decoder, encoder, gemma

from attnbench import Workload, registry
from attnbench.commands import main
from attnbench.errors import Failed
from attnbench.models.needles import needles
from attnbench.models.text import documents
from attnbench.plugin import Plugin, expand_kv, visible
from attnbench.stats.clusters import clustered_mean
from attnbench.sweep.model import _numbers
from attnbench.sweep.scored import Room
from attnbench.workers.about_models import AskModel, JudgeModel, ModelJudged
from attnbench.workers.model import facts, judge

pytest.importorskip("transformers", reason="could not import 'transformers'")
pytest.importorskip("safetensors", reason="could not import 'safetensors'")


class Plain(Plugin):
    """Softmax over what the mask shows; subclasses do it wrong."""

    def build(self, workload: Workload) -> Any:
        def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            key, value = (expand_kv(x, workload.heads) for x in (key, value))
            seen = self.seen(workload, torch.arange(query.shape[2])[:, None], torch.arange(key.shape[2]))
            scores = (query @ key.mT * self.scale(workload)).masked_fill(~seen, -torch.inf)
            return scores.softmax(-1) @ value

        return attend

    def seen(self, workload: Workload, rows: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return visible(workload, rows, keys)

    def scale(self, workload: Workload) -> float:
        return workload.scale


class Peeking(Plain):
    def seen(self, workload: Workload, rows: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return keys <= rows + workload.offset + 1


class Cooler(Plain):
    def scale(self, workload: Workload) -> float:
        return 0.9 * workload.scale


class Empty(Plugin):
    def build(self, workload: Workload) -> Any:
        return lambda query, key, value: query * math.nan


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    """A worker sets threads and gradients for itself."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_grad_enabled(True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    decoder(path / "llama"), decoder(path / "flat", spread=0.0), gemma(path / "gemma"), encoder(path / "bert")
    return path


def judged(model: Path, plugin: Plugin, seq: int, windows: int = 3) -> tuple[ModelJudged, dict[str, Any]]:
    """What the worker says, and the row's numbers that are made of it."""
    of = facts(AskModel(str(model), [], [seq]))
    w = Workload(
        seq=seq, kv_seq=seq, heads=of.heads, kv_heads=of.kv_heads, head_dim=of.head_dim, value_dim=of.head_dim,
        mask="full" if of.encoder else "causal",
    )  # fmt: skip
    answer = judge(plugin, JudgeModel(str(model), [], w, "", {}, windows, 60.0, [0.0, 1.0], 4))
    return answer, _numbers(answer)


def test_a_model_that_knows_nothing_is_as_perplexed_as_it_has_words(folder: Path) -> None:
    answer, row = judged(folder / "flat", Plain(), 32)
    assert row["perplexity"] == pytest.approx(len(LETTERS), rel=1e-5)
    assert row["perplexity_ratio"] == pytest.approx(1, abs=1e-6)
    assert row["tokens"] == 3 * 31
    assert answer.windows[0].document != answer.windows[1].document


@pytest.mark.parametrize(
    ("plugin", "kl", "agreement"),
    [
        pytest.param(Plain(), (0, 1e-6), 1.0, id="right"),
        pytest.param(Cooler(), (1e-4, 1), None, id="scale"),
        pytest.param(Peeking(), (1e-2, 10), None, id="mask"),
    ],
)
def test_what_is_wrong_with_an_attention_shows_in_what_the_model_says(
    folder: Path, plugin: Plugin, kl: tuple[float, float], agreement: float | None
) -> None:
    answer, row = judged(folder / "llama", plugin, 96)
    assert kl[0] <= row["kl_mean"] <= kl[1]
    assert row["kl_p99"] >= row["kl_mean"]
    assert row["top1_agreement"] == agreement if agreement else row["top1_agreement"] < 1
    assert len(answer.prefill_s) == len(answer.exact_prefill_s) == 2  # the first window warms up
    assert len(answer.token_s) == len(answer.exact_token_s) == 3
    assert row["exact_perplexity"] == pytest.approx(judged(folder / "llama", Plain(), 96)[1]["perplexity"], rel=1e-5)


def test_layers_with_a_window_attend_exactly_where_the_variant_can_not(folder: Path) -> None:
    narrow, row = judged(folder / "gemma", Cooler(), 96)
    assert narrow.layers == 1
    assert "in 1 of 2 layers" in row["note"]
    assert row["kl_mean"] > 1e-7
    whole, row = judged(folder / "gemma", registry.create("naive"), 96)
    assert (whole.layers, row["note"]) == (2, "")
    assert row["kl_mean"] < 1e-6


def test_an_encoder_is_judged_by_its_embeddings(folder: Path) -> None:
    _, same = judged(folder / "bert", Plain(), 48, windows=9)
    _, off = judged(folder / "bert", Cooler(), 48, windows=9)
    assert same["cosine"] == pytest.approx(1, abs=1e-6)
    assert same["rank_correlation"] == pytest.approx(1, abs=1e-3)
    assert off["cosine"] < same["cosine"] - 1e-6
    assert same["perplexity"] is None


def test_nan_is_wrong(folder: Path) -> None:
    with pytest.raises(Failed, match="not finite"):
        judged(folder / "llama", Empty(), 32)


def test_a_needle_stands_at_its_depth_and_the_text_ends_with_the_answer(folder: Path) -> None:
    from attnbench.models.loading import load

    tokenizer = load(str(folder / "llama")).tokenizer
    found = needles(tokenizer, documents(), 600, [0.0, 0.5, 1.0])
    for needle, depth in zip(found, (0.0, 0.5, 1.0), strict=True):
        text = "".join(tokenizer.convert_ids_to_tokens(needle.ids[0].tolist()))
        assert needle.ids.shape == (1, 600)
        answer = text[-needle.answer :]
        assert answer.strip().isdigit()
        assert text.count(answer) == 2
        assert text.index(answer) / 600 == pytest.approx(depth, abs=0.3)
    assert needles(tokenizer, documents(), 80, [0.0]) == []


def test_an_interval_over_documents_is_students_of_their_means() -> None:
    means = np.array([1.0, 2.0, 4.0])
    found = clustered_mean(list(np.repeat(means, 2) * 10), [10] * 6, [0, 0, 1, 1, 2, 2])
    half = 4.302653 * means.std(ddof=1) / 3**0.5  # t of two degrees of freedom
    assert found.mean == pytest.approx(means.mean())
    assert (found.low, found.high) == pytest.approx((means.mean() - half, means.mean() + half), rel=1e-6)
    assert clustered_mean([1.0], [1], [0]).low is None
    assert clustered_mean([1.0, 3.0], [1, 1], [5, 5]).low is not None  # windows of the only document


def test_each_cell_has_its_part_of_the_budget() -> None:
    room, key = Room(100.0, monotonic(), left=4, most=64), ("a", 64)
    assert room.seconds(key) == pytest.approx(0.7 * 25, rel=0.01)  # exact attention
    room.took[key] = 20.0
    assert room.seconds(key) == pytest.approx(30)
    room.took[key] = 90.0
    assert room.seconds(key) == pytest.approx(100, rel=0.01)  # all that there is
    room.took[key] = 101.0
    assert room.seconds(key) is None


def run(*arguments: str) -> Any:
    return CliRunner().invoke(main, ["model", "--threads", "1", *arguments])


def test_the_command_ends_every_cell_with_a_row(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fatal.py").write_text(
        "import os\nfrom attnbench import Plugin\nclass Fatal(Plugin):\n    def build(self, workload):\n        os.abort()\n"
    )
    info = tmp_path / "fatal-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fatal\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[attnbench.plugins]\nfatal = fatal:Fatal\n")
    monkeypatch.syspath_prepend(tmp_path)
    out = tmp_path / "out"
    asked = (
        "--model",
        str(folder / "llama"),
        "--plugins",
        "naive,retention,fatal",
        "--seq",
        "64,512",
        "--windows",
        "2",
    )
    result = run(*asked, "--json", "--out", str(out))
    assert result.exit_code == 1, result.output  # something crashed
    found = json.loads(result.stdout)
    assert {row["variant"]: row["status"] for row in found["rows"]} == {
        "sdpa": "ok", "naive": "ok", "retention": "unsupported", "fatal": "crashed",
    }  # fmt: skip
    assert "recurrence" in next(row["reason"] for row in found["rows"] if row["variant"] == "retention")
    assert found["refused"] == ["llama was made for 256 tokens at most: not judged at 512"]
    (path,) = out.iterdir()
    content = json.loads((path / "model.json").read_text())
    assert content["rows"] == found["rows"]
    assert {"heads", "head_dim", "dtype", "seq", "prefill_speedup"} <= set(content["rows"][0])
    assert (path / "model.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--model", "nothing"), "none of smollm2, gemma3, minilm"),
        (("--model", ","), "names no model"),
        (("--plugins", "nothing"), "no plugin is called"),
        (("--seq", "64k"), "64k"),
        (("--model", "{llama}", "--seq", "512"), "made for 256 tokens at most"),
        (("--model", "{llama}", "--seq", "64", "--text", "{llama}/absent.txt"), "can't read"),
    ],
)
def test_bad_usage_is_one_line(folder: Path, arguments: tuple[str, ...], said: str, tmp_path: Path) -> None:
    result = run(*(a.format(llama=folder / "llama") for a in arguments), "--out", str(tmp_path / "out"))
    assert result.exit_code == 2, result.output
    assert said in result.output.splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_int8_keeps_smollm2_and_linear_wrecks_it(tmp_path: Path) -> None:
    from attnbench.models.known import KNOWN

    if missing := KNOWN["smollm2"].missing:
        pytest.skip(f"could not import SmolLM2: {missing}")
    asked = ("--plugins", "int8,linear", "--seq", "256", "--windows", "2", "--json", "--out", str(tmp_path))
    result = run(*asked)
    assert result.exit_code == 0, result.output
    exact, int8, linear = json.loads(result.stdout)["rows"]
    assert exact["perplexity_ratio"] == 1
    assert exact["needle"] >= 0.6
    assert 0.99 < int8["perplexity_ratio"] < 1.01
    assert linear["perplexity_ratio"] > 10
    assert linear["needle"] == 0
