"""Sweeps on a Ray cluster: a real one of two nodes, one of which is killed, and the driver's decisions on nodes that
answer in this process.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

import attnbench
from attnbench import commands
from attnbench.errors import AttnbenchError
from attnbench.records.machines import name_of
from attnbench.records.run import Run, read_meta, rows
from attnbench.records.schema import Row, key
from attnbench.sweep import on_ray, spread
from attnbench.sweep.cell import Cell
from attnbench.sweep.members import Members, devices_of
from attnbench.sweep.on_ray import Lost, Node
from attnbench.sweep.remote import Done, Job, Refused, Seen
from attnbench.sweep.session import Unwatched
from attnbench.sweep.settings import Asked
from attnbench.workers.messages import Found

MACHINES = [
    {"cpu": cpu, "hardware_threads": 2, "memory_bytes": 1 << 30, "gpu": None, "libraries": {"torch": "2.13.0"}}
    for cpu in ("A", "B")
]
FACTS = {"threads_at_once": None, "unmeasured": {}}
NODES = [Node(id=letter * 8, name=f"host {letter}", cpus=1, gpus=0, memory=1 << 30) for letter in "ab"]
DEVICES = {"cpu": Found(missing=None), "cuda": Found(missing="no CUDA device")}


class Near(on_ray.Cluster):
    """A cluster whose tasks are done here, one at a time, as they are asked for. answers: what a look at a node gives."""

    def __init__(self, answers: dict[str, Any], away: Sequence[str] = ()) -> None:
        self.answers, self.away, self.here = answers, set(away), list(NODES)
        self.sent: list[tuple[Any, Node, Sequence[Any], int, int]] = []
        self.ended_now: Callable[[Any], bool] = lambda task: True

    def nodes(self) -> list[Node]:
        return self.here

    def send(self, call: Callable[..., Any], given: Sequence[Any], node: Node, cpus: int, gpus: int) -> Any:
        self.sent.append((call, node, given, cpus, gpus))
        return len(self.sent) - 1

    def ended(self, tasks: Sequence[Any], seconds: float) -> list[Any]:
        return [task for task in tasks if self.ended_now(task)]

    def result(self, task: Any) -> Any:
        call, node, given, _, _ = self.sent[task]
        if node.id in self.away or node not in self.here:
            raise Lost("NodeDiedError: it is gone", ran=False)
        return self.answers[node.id] if call.__name__ == "look" else call(*given)

    def cancel(self, task: Any) -> None: ...


def seen(machine: int, torch: str = "2.13.0", dtype: str = "float32") -> Seen:
    devices = DEVICES | {"cpu": Found(missing=None, dtype=dtype)}
    return Seen(MACHINES[machine] | FACTS, devices, {"attnbench": "1", "torch": torch})


def asked(seq: str = "16,32,64,128", budget: float = 100.0, **more: Any) -> Asked:
    given = Asked.of(plugins="sdpa", seq=seq, scope="attention", budget=budget, precision="2%", **more)
    return spread.at_large(given, None)


def plan(cluster: Near, what: Asked, tell: Callable[[str], object] = lambda line: None) -> spread.Spread:
    members = Members(cluster, what, tell)
    members.first()
    here = replace(members.asked, sweep=replace(members.asked.sweep, threads=1), memory=1 << 30)
    cells = [
        Cell(name, name, "attnbench 0.1.0", f"x:{name}", w) for w in here.sweep.workloads() for name in ("sdpa", "int8")
    ]
    return spread.Spread(here, cells, "sdpa", dict(MACHINES[0] | FACTS), seen(0), cluster, members, tell)


def measured(job: Job) -> Done:
    own = job.workload.as_dict()
    told = [{"plugin": name, "variant": name, "family": "exact", **own, "status": "ok"} for name in ("sdpa", "int8")]
    return Done(told, took=2.0, calls=1.0, compilation=0.5)


def driven(ready: spread.Spread, path: Path, call: Callable[[Job], Done | Refused] = measured) -> list[Row]:
    with Run.create(path, "run", spread.meta(ready, ["a test"])) as run:
        return spread.measure(ready, run, Unwatched(), time.monotonic(), call)


def test_every_cell_is_journaled_once_the_longest_first(tmp_path: Path) -> None:
    cluster = Near({"a" * 8: seen(0), "b" * 8: seen(1)})
    found = driven(plan(cluster, asked()), tmp_path)
    kept = rows(next(tmp_path.iterdir()))
    assert found == kept
    assert Counter(map(key, kept)).most_common(1)[0][1] == 1
    jobs = [given[0] for call, _, given, *_ in cluster.sent if call is measured]
    assert [job.workload.seq for job in jobs] == [128, 64, 32, 16]
    assert {row["node"]: row["machine"] for row in kept} == {"host a": "A, 2 threads", "host b": "B, 2 threads"}
    meta = read_meta(next(tmp_path.iterdir()))
    assert meta["machine"]["cpu"] == "A"
    assert {name: facts["cpu"] for name, facts in meta["machines"].items()} == {
        "A, 2 threads": "A",
        "B, 2 threads": "B",
    }
    assert meta["ceilings_of"] == dict.fromkeys(meta["machines"])
    assert meta["seconds"]["tasks"] == 8.0
    assert meta["seconds"]["elsewhere"] == 2.0


def test_time_goes_half_evenly_and_half_by_operations(tmp_path: Path) -> None:
    cluster = Near({"a" * 8: seen(0), "b" * 8: seen(1)})
    driven(plan(cluster, asked(budget=100.0)), tmp_path)
    jobs = [given[0] for call, _, given, *_ in cluster.sent if call is measured]
    operations = [128**2, 64**2, 32**2, 16**2]  # of masks that are causal, all alike
    share = 0.5 / 4 + 0.5 * operations[0] / sum(operations)
    assert jobs[0].budget == pytest.approx(min(100, 2 * 100 * share), rel=0.05)
    assert all(job.budget <= 100 for job in jobs)
    # The first left all of its part, so that the last has what is left of the run.
    assert jobs[-1].budget == pytest.approx(100, rel=0.05)
    assert {job.whole for job in jobs} == {100.0}


def test_a_lost_task_is_sent_again_and_its_node_only_once_it_answers(tmp_path: Path) -> None:
    cluster, told = Near({"a" * 8: seen(0), "b" * 8: seen(1)}), list[str]()
    ready = plan(cluster, asked(), told.append)
    first = len(cluster.sent)

    def die(task: Any) -> bool:
        if len([1 for call, *_ in cluster.sent if call is measured]) > 1:
            cluster.away.add("b" * 8)
        return True

    cluster.ended_now = die
    found = driven(ready, tmp_path)
    assert Counter(map(key, found)) == Counter(map(key, rows(next(tmp_path.iterdir()))))
    assert {row["status"] for row in found} == {"ok"}
    assert len(found) == 8
    assert {row["node"] for row in found} == {"host a"}
    to_b = [call.__name__ for call, node, *_ in cluster.sent[first:] if node.id == "b" * 8]
    assert to_b[0] == "measured"
    assert set(to_b[1:]) <= {"look"}  # it gets no work before it answers
    assert sum("it is sent again" in line for line in told) == 1


def test_what_no_node_can_bring_to_an_end_has_crashed(tmp_path: Path) -> None:
    def call(job: Job) -> Done | Refused:
        return Refused("no room") if job.workload.seq == 64 else measured(job)

    found = driven(plan(Near({"a" * 8: seen(0), "b" * 8: seen(1)}), asked()), tmp_path, call)
    crashed = [row for row in found if row["status"] == "crashed"]
    assert {row["seq"] for row in crashed} == {64}
    assert len(crashed) == 2
    assert {row["reason"] for row in crashed} == {"its task came to nothing 3 times, at last: no room"}
    assert len(found) == 8


def test_what_no_time_is_left_for_is_skipped(tmp_path: Path) -> None:
    def call(job: Job) -> Done:
        time.sleep(0.3)
        return measured(job)

    found = driven(plan(Near({"a" * 8: seen(0), "b" * 8: seen(1)}), asked(budget=0.2)), tmp_path, call)
    assert len(found) == 8
    skipped = [row for row in found if row["status"] == "skipped"]
    assert {row["seq"] for row in skipped} == {16, 32}
    assert "the budget of 0 s was over before its turn; --budget 10 would do" in skipped[0]["reason"]


def test_a_run_goes_on_where_it_was_cut_off_whatever_threads_its_nodes_have(tmp_path: Path) -> None:
    cluster = Near({"a" * 8: seen(0), "b" * 8: seen(1)})
    ready = plan(cluster, asked())
    with Run.create(tmp_path, "run", spread.meta(ready, ["a test"])) as run:
        done = [
            row | {"threads": 3, "machine": "A, 2 threads"}
            for w in {cell.workload for cell in ready.cells if cell.workload.seq > 32}
            for row in measured(Job(ready.asked, w, 1, 1, ready.members.ready[0].share)).rows
        ]
        for seq in (64, 128):
            run.append([row for row in done if row["seq"] == seq])
    with Run.open(next(tmp_path.iterdir())) as run:
        spread.check_same(ready, run)
        found = spread.measure(ready, run, Unwatched(), time.monotonic(), measured)
    assert sorted((row["seq"], row["threads"]) for row in found if row["plugin"] == "sdpa") == [
        (16, 1), (32, 1), (64, 3), (128, 3)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("answers", "says", "left"),
    [
        ((seen(0), seen(1, torch="2.12.0")), "node host b is left out: torch is 2.12.0 there, 2.13.0 on the other", 1),
        ((seen(0), Refused("no plugin is called 'x'")), "node host b is left out: no plugin is called 'x'", 1),
        ((seen(0), seen(1)), "", 2),
    ],
)
def test_a_node_that_is_not_like_the_others_is_left_out(answers: tuple[Any, Any], says: str, left: int) -> None:
    told: list[str] = []
    members = Members(Near(dict(zip(["a" * 8, "b" * 8], answers, strict=True))), asked(), told.append)
    assert len(members.first()) == left
    assert says in "\n".join(told)
    assert len(told) == (left == 1)


def test_it_is_the_odd_one_that_is_left_out_whoever_answers_first() -> None:
    cluster, told = Near({"a" * 8: seen(0, torch="2.12.0"), "b" * 8: seen(1), "c" * 8: seen(1)}), list[str]()
    cluster.here = [*NODES, replace(NODES[0], id="c" * 8, name="host c")]
    assert [device.node.name for device in Members(cluster, asked(), told.append).first()] == ["host b", "host c"]
    assert told == ["node host a is left out: torch is 2.12.0 there, 2.13.0 on the other nodes"]


@pytest.mark.parametrize(
    ("dtypes", "settled"), [(("bfloat16", "bfloat16"), "bfloat16"), (("bfloat16", "float32"), "float32")]
)
def test_all_rows_have_one_device_and_dtype(dtypes: tuple[str, str], settled: str) -> None:
    answers = {letter * 8: seen(i, dtype=dtypes[i]) for i, letter in enumerate("ab")}
    members = Members(Near(answers), asked(), print)
    members.first()
    assert members.asked.sweep.dtype == (settled,)
    assert members.asked.sweep.device == "cpu"


def test_a_gpu_anywhere_is_what_is_measured_on() -> None:
    cluster = Near(
        {"a" * 8: seen(0), "b" * 8: replace(seen(1), devices={"cuda": Found(missing=None, dtype="bfloat16")})}
    )
    cluster.here = [NODES[0], replace(NODES[1], cpus=8, gpus=2)]
    members = Members(cluster, asked(), print)
    ready = members.first()
    assert [(device.node.name, device.gpus, device.share.cpus) for device in ready] == [("host b", 1, 4)] * 2
    assert members.asked.sweep.device == "cuda"
    with pytest.raises(AttnbenchError, match="--device cuda: no node of the cluster gives one out; use --device cpu"):
        Members(Near({}), asked(device="cuda"), print).first()


def test_a_node_without_cpus_measures_nothing() -> None:
    assert devices_of(replace(NODES[0], cpus=0), "cpu", 0) == []


def test_more_threads_than_a_node_gives_are_not_had_there() -> None:
    members = Members(
        Near({"a" * 8: seen(0), "b" * 8: seen(1)}), replace(asked(), sweep=replace(asked().sweep, threads=2)), print
    )
    with pytest.raises(AttnbenchError, match="it gives out 1 CPU, and --threads asks for 2"):
        members.first()


@pytest.mark.parametrize("on", ["rays", "ray=", "slurm"])
def test_what_is_no_cluster_is_one_line(on: str) -> None:
    with pytest.raises(AttnbenchError, match=r"must be ray or ray=ADDRESS"):
        attnbench.run("sdpa", 16, on=on)


def test_without_the_extra_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_ray, "find_spec", lambda name: None)
    with pytest.raises(AttnbenchError, match=re.escape("pip install 'attnbench[ray]'")):
        attnbench.run("sdpa", 16, on="ray")


def test_one_module_alone_imports_ray() -> None:
    package = Path(attnbench.__file__).parent
    found = [
        path.name for path in package.rglob("*.py") if re.search(r"^\s*(import|from) ray\b", path.read_text(), re.M)
    ]
    assert found == ["on_ray.py"]


# Several machines in one run


def test_machines_that_differ_have_names_that_differ() -> None:
    known: dict[str, Any] = {}
    more = [
        {"cpu": "C"},
        {"memory_bytes": 2 << 30},
        {"libraries": {"torch": "2.14.0"}},
        {"gpu": "H200"},
        {},
        {"environment": {"OMP_PLACES": "cores"}},
        {"memory_bytes": (2 << 30) + 1},
        {"memory_bytes": (2 << 30) + 2},
    ]
    for machine in [MACHINES[0] | each for each in [{}, *more]]:
        known.setdefault(name_of(machine, known), machine)
    assert list(known) == [
        "A, 2 threads", "C, 2 threads", "A, 2 threads, 2 GiB", "A, 2 threads, torch 2.14.0", "H200, A, 2 threads",
        "A, 2 threads, OMP_PLACES=cores", "A, 2 threads, 2 GiB, torch 2.13.0", "A, 2 threads, #2",
    ]  # fmt: skip


# The manifest for KubeRay

KNOWN = {  # of ray.io/v1, as KubeRay's types have them (raycluster_types.go, rayjob_types.go), those that are of use here
    "RayCluster": {"rayVersion", "headGroupSpec", "workerGroupSpecs", "enableInTreeAutoscaling", "autoscalerOptions"},
    "RayJob": {
        "entrypoint", "clusterSelector", "rayClusterSpec", "runtimeEnvYAML", "submissionMode", "backoffLimit",
        "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "activeDeadlineSeconds", "entrypointNumCpus",
    },
}  # fmt: skip
WORKERS = {"groupName", "replicas", "minReplicas", "maxReplicas", "numOfHosts", "rayStartParams", "template"}


def test_the_manifest_has_the_fields_that_kuberay_documents() -> None:
    yaml = pytest.importorskip("yaml")
    text = (Path(__file__).parents[1] / "docs/kuberay/attnbench.yaml").read_text()
    parts = {part["kind"]: part for part in yaml.safe_load_all(text)}
    cluster, job = parts["RayCluster"], parts["RayJob"]
    for kind, part in (("RayCluster", cluster), ("RayJob", job)):
        assert part["apiVersion"] == "ray.io/v1"
        assert part["spec"].keys() <= KNOWN[kind]
    assert job["spec"]["clusterSelector"] == {"ray.io/cluster": cluster["metadata"]["name"]}
    assert not job["spec"].get("shutdownAfterJobFinishes")  # which is for a cluster of its own
    head, groups = cluster["spec"]["headGroupSpec"], cluster["spec"]["workerGroupSpecs"]
    assert head.keys() == {"rayStartParams", "template"}
    assert head["rayStartParams"] == {"num-cpus": "0"}
    for group in groups:
        assert {"groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"} <= group.keys() <= WORKERS
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
    (claim,) = (volume["persistentVolumeClaim"]["claimName"] for volume in head["template"]["spec"]["volumes"])
    assert claim == parts["PersistentVolumeClaim"]["metadata"]["name"]
    for spec in [head["template"]["spec"], *(group["template"]["spec"] for group in groups)]:
        (container,) = spec["containers"]
        assert {"name", "image", "resources"} <= container.keys()
        assert (
            container["resources"]["limits"] == container["resources"]["requests"]
        )  # else its CPUs are no one's alone
        assert container["resources"]["limits"]["cpu"].isdigit()
    words = job["spec"]["entrypoint"].split()
    given = commands.find(words[1]).make_context(words[1], words[2:]).params
    mounted = head["template"]["spec"]["containers"][0]["volumeMounts"][0]["mountPath"]
    assert (given["on"], str(given["out"])) == ("ray", mounted)


# A real cluster

# A node that is gone counts as such after seconds, not after half a minute.
SOON = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 1000, "health_check_failure_threshold": 4}
SMALL = {"include_dashboard": False, "object_store_memory": 80 << 20}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes of a CPU each, and a head with none; afterwards no process of it is left."""
    cluster_utils = pytest.importorskip("ray.cluster_utils", reason="Ray is not installed")
    mark = uuid.uuid4().hex
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("ATTNBENCH_TEST_MARK", mark)
        made = cluster_utils.Cluster(
            initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": SOON, **SMALL}
        )
        try:
            for _ in range(2):
                made.add_node(num_cpus=1, **SMALL)
            yield made
        finally:
            made.shutdown()
    end = time.monotonic() + 20
    while (left := list(_marked(mark))) and time.monotonic() < end:
        time.sleep(0.2)
    assert [process.cmdline() for process in left] == []


def _marked(mark: str) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get("ATTNBENCH_TEST_MARK") == mark:
                yield process
        except psutil.Error:
            continue


def begun(cluster: Any, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "attnbench", "run", "--on", f"ray={cluster.address}", "--budget", "90", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def journaled(out: Path) -> int:
    return sum(path.read_text().count("\n") for path in out.glob("*/cells.jsonl"))


def wait_for(out: Path, lines: int, process: subprocess.Popen[str]) -> None:
    while journaled(out) < lines:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_killed_driver_and_a_killed_node_lose_nothing(
    cluster: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import ray_kill

    # The long one is sent first, and still measured when the node beside it has done a short one.
    words = ["--plugins", "sdpa,naive", "--seq", "16,32,64,2048", "--scope", "attention", "--dtype", "float32"]
    first = begun(cluster, *words, "--precision", "50%", "--out", str(tmp_path))
    wait_for(tmp_path, 1, first)
    first.send_signal(signal.SIGKILL)
    first.wait()
    (path,) = tmp_path.iterdir()
    before = rows(path)
    assert 2 <= len(before) < 8

    second = begun(cluster, "--resume", str(path))
    wait_for(tmp_path, len(before) // 2 + 1, second)
    ended_on = rows(path)[-1]["node"]
    (other,) = (node for node in cluster.worker_nodes if node.node_id[:8] not in ended_on)
    ray_kill.kill(cluster, other)  # while it measures what is left
    told = second.communicate(timeout=150)[0]
    assert second.returncode == 0, told
    found = rows(path)
    assert Counter((row["plugin"], row["seq"]) for row in found) == Counter(
        {(plugin, seq): 1 for plugin in ("sdpa:backend=auto", "naive") for seq in (16, 32, 64, 2048)}
    )
    assert Counter(row["status"] for row in found) == {"ok": 8}, told
    assert [row["samples"] for row in found[: len(before)]] == [row["samples"] for row in before]
    lines = [json.loads(line)["cells"] for line in (path / "cells.jsonl").read_text().splitlines()]
    assert len(lines) == 4
    assert all(len({row["node"] for row in line}) == 1 for line in lines)
    assert "it is sent again" in told
    assert {row["threads"] for row in found} == {1}
