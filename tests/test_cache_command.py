"""`attnbench cache`: rows, claims and files of a run over a model of a few thousand weights."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from attnbench import AttnbenchError
from attnbench.commands import main
from attnbench.registry import CACHES, find, select
from attnbench.report.figures.caches import caches as draw
from attnbench.sweep import caches
from attnbench.workers.about_caches import CacheInstance, CacheJudged
from attnbench.workers.about_models import ModelFacts, NeedleScore, WindowScore

FACTS = ModelFacts("tiny", "", "", "", False, 4, 2, 16, 2, 1024, None, 9, {64: 5, 512: 1})

FAULTY = """
import os, signal
import torch
from attnbench.cache import Kept, KVCache

class Broken(KVCache):
    def start(self, key, value): return key, value
    def append(self, state, key, value): return torch.cat((state[0], key), 2), torch.cat((state[1], value), 2)
    def read(self, state): return Kept(*state)

class Dies(Broken):
    def append(self, state, key, value): os.kill(os.getpid(), signal.SIGSEGV)

class NotANumber(Broken):
    def read(self, state): return Kept(state[0], state[1] * float("nan"))
"""


@pytest.fixture
def faulty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package beside attnbench that offers caches which fail."""
    folder = tmp_path / "offered"
    info = folder / "faulty-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "faulty_caches.py").write_text(FAULTY)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: faulty\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[attnbench.caches]\ndies = faulty_caches:Dies\nnot-a-number = faulty_caches:NotANumber\nnone = faulty_caches:os\n"
    )
    monkeypatch.syspath_prepend(str(folder))
    return folder


@pytest.fixture(scope="module")
def model_and_text(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    pytest.importorskip("transformers", reason="could not import 'transformers'")
    pytest.importorskip("safetensors", reason="could not import 'safetensors'")
    from tiny_models import decoder

    folder = tmp_path_factory.mktemp("tiny")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog.\n" * 12)
    return decoder(folder / "tiny"), folder / "text.txt"


def test_a_run_over_a_tiny_model(faulty: Path, model_and_text: tuple[Path, Path], tmp_path: Path) -> None:
    """Rows of what ran and of what failed, a claim, bits as they are kept, and the files."""
    model, text = model_and_text
    asked = [
        "--model",
        str(model),
        "--text",
        str(text),
        "--seq",
        "64",
        "--windows",
        "3",
        "--threads",
        "1",
        "--chunk",
        "16",
    ]
    specs = "int4:keys=false,int4:values=false,dies,not-a-number,none"
    result = CliRunner().invoke(main, ["cache", *asked, "--caches", specs, "--out", str(tmp_path / "results")])
    assert result.exit_code == 1, result.output
    (folder,) = (tmp_path / "results").iterdir()
    assert (folder / "cache.png").stat().st_size > 1000
    content = json.loads((folder / "cache.json").read_text())
    found = {row["cache"]: row for row in content["rows"]}
    assert {name: row["status"] for name, row in found.items()} == {
        "exact": "ok", "int4:keys=false": "ok", "int4:values=false": "ok", "dies": "crashed", "not-a-number": "wrong",
        "none": "error",
    }  # fmt: skip
    assert "SIGSEGV" in found["dies"]["reason"]
    assert "no subclass" in found["none"]["reason"]
    exact, values = found["exact"], found["int4:keys=false"]
    assert (exact["bits_per_value"], values["bits_per_value"]) == (32, (16 + 4 + 16 / 16) / 2)  # heads of 16
    assert exact["perplexity_ratio"] == pytest.approx(1, abs=1e-5)
    assert exact["kl_mean"] < 1e-6 < values["kl_mean"] <= values["kl_p99"]
    assert exact["top1_agreement"] == 1 > values["top1_agreement"]
    assert exact["bytes"] == 2 * 2 * 2 * 64 * 16 * 4  # keys and values, layers, heads, tokens, dims, float32
    assert exact["step_s"] > 0 < exact["baseline_step_s"]
    assert values["step_s"] is None
    assert "one side" in values["no_step"]
    (claim,) = content["claims"]
    assert (claim["first"], claim["second"], claim["windows"]) == ("int4:values=false", "int4:keys=false", 3)
    for shown in ("bits", "int4:keys=false", "dies: crashed", "no time of a step", "Are keys more fragile"):
        assert shown in result.output


def test_an_interrupt_keeps_what_was_judged(model_and_text: tuple[Path, Path]) -> None:
    model, text = model_and_text

    def interrupt(line: str) -> None:
        if line.startswith("[1/"):
            raise KeyboardInterrupt

    kept: list[str] = []
    asked = caches.Asked(model=str(model), caches="bf16,int8", seq=64, texts=[str(text)], windows=2, rounds=1)
    with pytest.raises(KeyboardInterrupt):
        caches.judge(asked, interrupt, lambda found: kept.extend(row["cache"] for row in found.rows))
    assert kept == ["exact"]


@pytest.mark.slow
def test_int8_keeps_smollm2_and_its_keys_do_not_stand_4_bits(tmp_path: Path) -> None:
    from attnbench.models.known import KNOWN

    if missing := KNOWN["smollm2"].missing:
        pytest.skip(f"could not import SmolLM2: {missing}")
    specs = "int8,int4:values=false,int4:keys=false"
    asked = ("--caches", specs, "--seq", "256", "--windows", "2", "--threads", "1", "--json", "--out", str(tmp_path))
    result = CliRunner().invoke(main, ["cache", *asked])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    exact, int8, keys, values = found["rows"]
    assert [row["bits_per_value"] for row in found["rows"]] == [32, 8.25, 10.125, 10.125]
    assert exact["needle"] == int8["needle"] == 1
    assert exact["kl_mean"] < 1e-5 < int8["kl_mean"] < 0.005 < values["kl_mean"] < 0.05 < keys["kl_mean"]
    assert 0.98 < int8["perplexity_ratio"] < 1.02 < 1.1 < keys["perplexity_ratio"]
    assert keys["kl_mean"] > 5 * values["kl_mean"]


REFUSED = (
    (["--caches", "int5"], "no cache is called 'int5'"),
    (["--caches", "kivi:bits=5"], "expected one of 2, 3, 4, 8"),
    (["--caches", "kivi:group=48"], "must be a multiple"),
    (["--model", "nothing"], "--model 'nothing' is none of"),
    (["--seq", "1"], "--seq"),
)


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=[" ".join(row[0]) for row in REFUSED])
def test_bad_usage_is_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["cache", *arguments, "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert message in result.output
    assert len(result.output.splitlines()) == 1
    assert not list(tmp_path.iterdir())


LACKS = (
    (FACTS, 512, "no two windows of 512"),
    (msgspec.structs.replace(FACTS, longest=32), 64, "32 tokens at most"),
    (msgspec.structs.replace(FACTS, encoder=True), 64, "keeps no cache"),
)


@pytest.mark.parametrize(("facts", "seq", "message"), LACKS, ids=[row[2] for row in LACKS])
def test_a_model_that_can_not_be_judged(facts: ModelFacts, seq: int, message: str) -> None:
    with pytest.raises(AttnbenchError, match=message):
        caches._check(facts, seq)


def test_all_names_every_cache_and_what_claims_are_about(faulty: Path) -> None:
    offered = find(kind=CACHES)
    specs = caches._spelled_out("all,int4:group=32", offered).split(",")
    assert {spec.split(":")[0] for spec in specs} == set(offered) - {"exact"}
    assert {"none", "dies", "int4:group=32"} < set(specs)
    assert {spec for _, *pair in caches.CLAIMS for spec in pair} <= set(specs)
    assert len(select(",".join(specs), offered, CACHES)) == len(specs)


def judged(spec: str, ratios: list[float], documents: list[int]) -> caches.Judged:
    """A cache whose perplexity is so many times exact's, 20, in windows of 10 tokens."""
    exact = 10 * math.log(20)
    windows = [
        WindowScore(document, 10, exact + 10 * math.log(ratio), exact, 0.5, 9)
        for ratio, document in zip(ratios, documents, strict=True)
    ]
    needles = [NeedleScore(0.0, True, 0.1), NeedleScore(1.0, False, 3.0)]
    answer = CacheJudged(windows, 0.2, needles, 300, 400, "so", "", [2.0] * 9, [4.0] * 9, 1.0)
    return caches.Judged(CacheInstance(spec, "a:B", {}), "quantized", answer=answer)


ASKED = caches.Asked(model="tiny", caches="all", seq=64)


def test_an_exact_cache_that_changes_the_model_is_no_reference() -> None:
    exact = judged("exact", [1.0, 1.0], [0, 1])  # with a KL of 0.05 a token
    caches.check_exact(dataclasses.replace(ASKED, dtype="bfloat16"), exact)
    with pytest.raises(AttnbenchError, match=r"tiny can't be judged: .* diverge by 5.0e-02 nats"):
        caches.check_exact(ASKED, exact)


def test_a_row_has_what_was_measured() -> None:
    row = caches.row(judged("int4", [1.1, 1.3, 1.1, 1.3], [0, 0, 1, 1]), ASKED, FACTS)
    ratio = math.sqrt(1.1 * 1.3)  # both documents say so
    for name, value in {
        "bits_per_value": 6, "bytes": 300, "exact_perplexity": 20, "perplexity": 20 * ratio, "perplexity_ratio": ratio,
        "perplexity_ratio_low": ratio, "perplexity_ratio_high": ratio, "kl_mean": 0.05, "top1_agreement": 0.9,
        "needle": 0.5, "step_s": 2.0, "step_speedup": 2.0, "windows": 4, "documents": 2, "tokens": 40,
    }.items():  # fmt: skip
        assert row[name] == pytest.approx(value), name
    skipped = caches.row(caches.Judged(CacheInstance("int4", "a:B", {}), "", "skipped", "why"), ASKED, FACTS)
    assert skipped.keys() == row.keys()
    assert (skipped["status"], skipped["reason"], skipped["perplexity"]) == ("skipped", "why", None)


def test_a_claim_is_answered_by_pairs() -> None:
    """Windows differ far more than caches do: only their pairs tell the two apart."""
    windows, documents = [1.0, 2.0, 4.0, 8.0], [0, 1, 2, 3]
    plain, rotated = (
        judged("int4", windows, documents),
        judged("int4:rotate=true", [0.9 * w for w in windows], documents),
    )
    for closer, less in (("first", 0.1), ("second", -0.2), (None, 0.0)):
        assert rotated.answer
        kl = [w.kl - 10 * less for w in plain.windows]
        scores = [msgspec.structs.replace(w, kl=x) for w, x in zip(rotated.answer.windows, kl, strict=True)]
        rotated.answer = msgspec.structs.replace(rotated.answer, windows=scores)
        (claim,) = caches.answers([plain, rotated])
        assert [claim[f"perplexity_ratio{end}"] for end in ("", "_low", "_high")] == pytest.approx([0.9] * 3)
        assert [claim[f"kl_difference{end}"] for end in ("", "_low", "_high")] == pytest.approx([-less] * 3)
        assert claim["closer"] == closer
    assert "int4:rotate=true can't be told from int4: KL -0 nats" in claim["sentence"].replace("+0", "-0")
    assert caches.answers([plain]) == []


@pytest.mark.parametrize("ratios", [[[1.0, 1.0]], [[1.0, 1.0], [0.9999, 1.01], [1.5, 40.0]]], ids=["one", "several"])
def test_the_figure_is_drawn_of_any_rows(ratios: list[list[float]]) -> None:
    found = [caches.row(judged(f"int8:group={i}", each, [0, 1]), ASKED, FACTS) for i, each in enumerate(ratios)]
    for ax in draw(found).axes:
        assert {text.get_text() for text in ax.texts} == {f"int8 group={i}" for i in range(len(ratios))}
