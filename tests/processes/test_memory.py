"""Free and used memory, read from copies of the kernel's folders."""

import resource
from pathlib import Path

import pytest

from aligndet_cli.processes import memory
from aligndet_cli.processes.memory import free_room, process_usage

GB = 10**9
STATUS = "VmPeak:\t 5000 kB\nVmSize:\t 4000 kB\nVmData:\t 1500 kB\nRssAnon:\t 1000 kB\nRssFile:\t 300 kB\n"
V2 = "29 23 0:26 / /sys/fs/cgroup rw,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "30 23 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
    "31 23 0:28 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
)


def write(root: Path, files: dict[str, object]) -> Path:
    for name, content in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{content}\n")
    return root


def machine(root: Path, groups: str = "0::/", mounts: str = V2, available_kb: int = 9_000_000) -> Path:
    meminfo = f"MemTotal: 16000000 kB\nMemFree: 100 kB\nMemAvailable: {available_kb} kB"
    files = {"meminfo": meminfo, "self/status": STATUS, "self/cgroup": groups, "self/mountinfo": mounts}
    return write(root / "proc", files).parent


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """Limits of the process by kind; what is not in it is unlimited."""
    chosen: dict[int, int] = {}
    monkeypatch.setattr(
        memory.resource, "getrlimit", lambda kind: (chosen.get(kind, resource.RLIM_INFINITY), resource.RLIM_INFINITY)
    )
    return chosen


def test_without_limits_it_is_what_the_machine_can_give(tmp_path: Path, limits: dict[int, int]) -> None:
    room = free_room(machine(tmp_path))
    assert (room.shared, room.own) == (9_000_000 * 1024, None)


def test_the_tightest_group_counts_and_files_in_the_cache_do_not(tmp_path: Path, limits: dict[int, int]) -> None:
    root = machine(tmp_path, groups="0::/slice/job")
    write(
        root / "sys/fs/cgroup",
        {
            "slice/job/memory.max": "max",
            "slice/job/memory.high": 6 * GB,
            "slice/job/memory.current": 2 * GB,
            "slice/job/memory.stat": "anon 5\ninactive_file 500000000\nactive_file 7",
            "slice/memory.max": 8 * GB,
            "slice/memory.high": "max",
            "slice/memory.current": 5 * GB,
            "slice/memory.stat": "inactive_file 1000000000",
        },
    )
    # The job: 6 - 2 + 0.5 = 4.5; the slice around it: 8 - 5 + 1 = 4.
    assert free_room(root).shared == 4 * GB


def test_groups_of_the_first_version(tmp_path: Path, limits: dict[int, int]) -> None:
    root = machine(tmp_path, groups="5:cpu:/elsewhere\n4:memory:/box", mounts=V1)
    folder = "sys/fs/cgroup/memory"
    write(
        root,
        {
            f"{folder}/memory.limit_in_bytes": 9223372036854771712,
            f"{folder}/memory.usage_in_bytes": GB,
            f"{folder}/box/memory.limit_in_bytes": 3 * GB,
            f"{folder}/box/memory.usage_in_bytes": 2 * GB,
            f"{folder}/box/memory.stat": "inactive_file 1\ntotal_inactive_file 250000000",
        },
    )
    assert free_room(root).shared == GB + 250_000_000


def test_a_container_sees_its_own_group_at_the_mount_point(tmp_path: Path, limits: dict[int, int]) -> None:
    mounts = "29 23 0:26 /docker/abc /sys/fs/cgroup ro - cgroup2 cgroup2 rw\n"
    root = machine(tmp_path, groups="0::/docker/abc", mounts=mounts)
    write(root / "sys/fs/cgroup", {"memory.max": 2 * GB, "memory.current": 3 * GB, "memory.stat": "inactive_file 0"})
    assert free_room(root).shared == 0  # above its limit for a moment: nothing, not less


def test_limits_of_the_process(tmp_path: Path, limits: dict[int, int]) -> None:
    root = machine(tmp_path)
    limits[resource.RLIMIT_AS] = 10_000 * 1024
    assert free_room(root).own == 6_000 * 1024  # 4,000 kB are mapped
    limits[resource.RLIMIT_DATA] = 2_000 * 1024
    assert free_room(root).own == 500 * 1024  # of 1,500 kB of data


def test_other_systems_have_what_is_built_in(
    tmp_path: Path, limits: dict[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "ROOT", tmp_path)
    monkeypatch.setattr(memory.os, "sysconf", {"SC_PHYS_PAGES": 2_000_000, "SC_PAGE_SIZE": 4096}.__getitem__)
    room = free_room(tmp_path)
    assert (room.shared, room.own) == (2_000_000 * 4096, None) and process_usage(root=tmp_path) is None


def test_usage_of_processes(tmp_path: Path) -> None:
    usage = process_usage(root=machine(tmp_path))
    assert usage is not None
    assert (usage.resident, usage.mapped, usage.mapped_peak, usage.data) == tuple(
        1024 * number for number in (1000, 4000, 5000, 1500)
    )
    assert process_usage(pid=2**22 + 1) is None  # there is none of that number
