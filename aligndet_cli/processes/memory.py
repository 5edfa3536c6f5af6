"""Measure free and used memory, and set how this process keeps the memory it frees. Free of torch."""

import ctypes
import os
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")
# Files of a cgroup: a limit, the use that counts against it, and the part of the use that can be dropped. Version 2
# first, then version 1.
_LIMITS = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.high", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # malloc.h


@dataclass(frozen=True)
class Room:
    """Bytes that processes may still take; None if nothing limits them.

    Attributes:
        shared: in the machine or the container, for all processes together.
        own: in the address space of this process (`ulimit -v`, `ulimit -d`).
    """

    shared: int | None
    own: int | None


@dataclass(frozen=True)
class Usage:
    """Bytes that a process uses.

    Attributes:
        resident: in memory, without pages that belong to files.
        mapped: in its address space.
        mapped_peak: largest `mapped` so far.
        data: private and writable in its address space.
    """

    resident: int
    mapped: int
    mapped_peak: int
    data: int


def free_room(root: Path = ROOT) -> Room:
    """Return the memory that is free now in the machine, in its container, and under the limits of this process.

    Args:
        root: folder with `proc` and the cgroups.
    """
    limits = [_available(root), *(_free_in(folder) for folder in _cgroups(root))]
    own = []
    usage = process_usage(root=root)
    if usage is not None:
        for kind, used in ((resource.RLIMIT_AS, usage.mapped), (resource.RLIMIT_DATA, usage.data)):
            limit = resource.getrlimit(kind)[0]
            if limit != resource.RLIM_INFINITY:
                own.append(max(limit - used, 0))
    return Room(min((limit for limit in limits if limit is not None), default=None), min(own, default=None))


def process_usage(pid: int | None = None, root: Path = ROOT) -> Usage | None:
    """Return the use of a process, by default this one; None if it is gone, or the system is not Linux."""
    content = _read(root / f"proc/{'self' if pid is None else pid}/status")
    kilobytes = {line.split(":")[0]: line.split()[1] for line in content.splitlines() if line.endswith(" kB")}
    keys = ("RssAnon", "VmSize", "VmPeak", "VmData")
    if any(key not in kilobytes for key in keys):
        return None
    return Usage(*(int(kilobytes[key]) << 10 for key in keys))


def limit_growth(room: int | None) -> None:
    """Let this process take `room` more bytes and fail when it asks for more; None sets no limit."""
    usage = process_usage()
    if room is None or usage is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = usage.data + room
    resource.setrlimit(resource.RLIMIT_DATA, (limit if soft == resource.RLIM_INFINITY else min(limit, soft), hard))


def peak_resident() -> int:
    """Return the largest number of bytes that this process ever had in memory."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _available(root: Path) -> int | None:
    """Return the bytes that Linux can give without swapping; on other systems, all memory of the machine."""
    for line in _read(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    if root != ROOT or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cgroups(root: Path) -> list[Path]:
    """Return the folders of this process's groups that count memory, each followed by the groups around it."""
    of_kind = {}
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, kinds, path = line.split(":", 2)
        if number == "0" or "memory" in kinds.split(","):
            of_kind["cgroup2" if number == "0" else "cgroup"] = path
    folders: list[Path] = []
    for line in _read(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        shown, mount = before.split()[3:5]  # the group that is seen at the mount point
        kind, _, options = after.split(maxsplit=2)
        if kind not in of_kind or (kind == "cgroup" and "memory" not in options.split(",")):
            continue
        top, group, seen = root / mount.lstrip("/"), Path(of_kind[kind]), Path(shown)
        # In a container the path may be the one outside of it.
        inside = group.relative_to(seen) if group.is_relative_to(seen) else Path()
        folders += [top / inside, *(top / parent for parent in inside.parents)]
    return folders


def _free_in(folder: Path) -> int | None:
    """Return the bytes that the limits of one group leave; file pages that can be dropped count as free."""
    found = []
    for limit_name, usage_name, cache in _LIMITS:
        limit, used = _read(folder / limit_name), _read(folder / usage_name)
        if limit in ("", "max") or not used:
            continue
        counts = dict(line.split() for line in _read(folder / "memory.stat").splitlines())
        found.append(max(int(limit) - int(used) + int(counts.get(cache, 0)), 0))
    return min(found, default=None)


def _read(file: Path) -> str:
    """Return the text of a file; empty if it is not there, or belongs to a process that is gone."""
    try:
        return file.read_text().strip()
    except OSError:
        return ""


def keep_freed_memory() -> None:
    """Let this process keep the memory it frees, for the next step to use.

    By default the C library gives large blocks back to the system at once, and a training step on the CPU spends a
    fifth of its time asking for them again. Does nothing if the library has no such settings.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(_M_MMAP_MAX, 0)
        library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def keep_few_primitives() -> None:
    """Let oneDNN keep 64 of its compiled operations instead of 1024, if it has not begun yet.

    There is one for every size of an image. They lie among the large blocks of a step, so each change of sizes leaves
    more gaps that are too small for the next blocks.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")


def give_back_freed_memory() -> None:
    """Let this process give back the memory it frees at once, which is slow, so that it holds only what it needs."""
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(_M_MMAP_MAX, 65_536)
        library.mallopt(_M_MMAP_THRESHOLD, 2**20)
        library.mallopt(_M_TRIM_THRESHOLD, 2**17)
