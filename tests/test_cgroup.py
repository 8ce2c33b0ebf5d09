"""What a container or a job scheduler lets this process use, read from folders made as the kernel makes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from attnbench.commands.options import warn_of_threads
from attnbench.devices import cgroup, machine

GIB = 1 << 30


def folder(root: Path, name: str, **files: str) -> None:
    """A cgroup's folder; `cpu_max` stands for the file cpu.max."""
    (root / name).mkdir(parents=True, exist_ok=True)
    for file, text in files.items():
        (root / name / file.replace("_", ".", 1)).write_text(text)


def place(root: Path, own: str = "0::/\n") -> dict[str, Path]:
    root.mkdir(exist_ok=True)
    (root / "own").write_text(own)
    return {"root": root, "own": root / "own"}


@pytest.mark.parametrize(
    ("text", "cpus"),
    [("100000 100000", 1.0), ("150000 100000", 1.5), ("max 100000", None), ("", None), ("nonsense", None)],
)
def test_a_quota_is_so_many_cpus(text: str, cpus: float | None, tmp_path: Path) -> None:
    folder(tmp_path, "", cpu_max=text)
    assert cgroup.cpus(**place(tmp_path)) == cpus


def test_without_a_cgroup_nothing_limits(tmp_path: Path) -> None:
    where = {"root": tmp_path / "none", "own": tmp_path / "none"}
    assert (cgroup.cpus(**where), cgroup.free_bytes(**where), cgroup.oom_kills(**where)) == (None, None, 0)


def test_the_tightest_limit_above_holds(tmp_path: Path) -> None:
    folder(tmp_path, "slice", cpu_max="50000 100000", memory_max=str(2 * GIB), memory_current=str(GIB))
    folder(tmp_path, "slice/job", cpu_max="400000 100000", memory_max=str(8 * GIB), memory_current=str(GIB // 2))
    folder(tmp_path, "another", cpu_max="10000 100000", memory_max="1", memory_current="1")
    where = place(tmp_path, "0::/slice/job\n")
    assert cgroup.cpus(**where) == 0.5
    assert cgroup.free_bytes(**where) == GIB
    assert cgroup.memory_bytes(**where) == 2 * GIB


def test_file_cache_is_not_in_use(tmp_path: Path) -> None:
    stat = f"anon {GIB}\ninactive_file {2 * GIB}\nactive_file {GIB // 2}\nslab_reclaimable 5\n"
    folder(tmp_path, "", memory_max=str(4 * GIB), memory_current=str(4 * GIB - 5), memory_stat=stat)
    assert cgroup.free_bytes(**place(tmp_path)) == 2 * GIB + GIB // 2 + 5


def test_the_first_version_says_the_same_in_its_own_words(tmp_path: Path) -> None:
    own = "4:memory:/job\n2:cpu,cpuacct:/job\n0::/\n"
    folder(tmp_path, "memory/job")
    (tmp_path / "memory/job/memory.limit_in_bytes").write_text(str(4 * GIB))
    (tmp_path / "memory/job/memory.usage_in_bytes").write_text(str(3 * GIB))
    (tmp_path / "memory/job/memory.stat").write_text(f"inactive_file 1\ntotal_inactive_file {GIB}\n")
    (tmp_path / "memory/job/memory.oom_control").write_text("under_oom 0\noom_kill 3\n")
    (tmp_path / "memory/memory.limit_in_bytes").write_text(str((1 << 63) - 4096))  # no limit
    folder(tmp_path, "cpu,cpuacct/job")
    (tmp_path / "cpu,cpuacct/job/cpu.cfs_quota_us").write_text("250000")
    (tmp_path / "cpu,cpuacct/job/cpu.cfs_period_us").write_text("100000")
    where = place(tmp_path, own)
    assert cgroup.cpus(**where) == 2.5
    assert cgroup.free_bytes(**where) == 2 * GIB
    assert cgroup.memory_bytes(**where) == 4 * GIB
    assert cgroup.oom_kills(**where) == 3


@pytest.mark.parametrize(
    ("cores", "quota", "threads"), [(2, 1.0, 1), (8, 2.5, 2), (8, 0.3, 1), (2, 9.0, 2), (4, None, 4)]
)
def test_by_default_no_thread_is_halted(
    cores: int, quota: float | None, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "usable_cores", lambda: cores)
    monkeypatch.setattr(cgroup, "cpus", lambda: quota)
    assert machine.default_threads() == threads


@pytest.mark.parametrize(("quota", "said"), [(None, ""), (1.0, ""), (0.5, "1 thread the time of 0.5 cores")])
def test_threads_that_will_be_throttled_are_said(
    quota: float | None, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cgroup, "cpus", lambda: quota)
    warn_of_threads(1)
    err = capsys.readouterr().err
    assert said in err
    assert len(err.splitlines()) == bool(said)
