"""How much memory there is, how much a process uses, and how it keeps it. Free of torch."""

import ctypes
import os
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")
# Of a cgroup: a limit, what counts against it, and what of that can be dropped; the second version's, then the first's.
_LIMITS = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.high", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # malloc.h


@dataclass(frozen=True)
class Room:
    """Bytes that processes may still take; None where nothing limits them.

    Attributes:
        shared: of the machine or the container, for all processes together.
        own: of the address space of this process (`ulimit -v`, `ulimit -d`).
    """

    shared: int | None
    own: int | None


@dataclass(frozen=True)
class Usage:
    """Bytes of a process.

    Attributes:
        resident: in memory, without what it shares with files.
        mapped: of its address space.
        mapped_peak: the most there ever were.
        data: of its address space, what only this process can write to.
    """

    resident: int
    mapped: int
    mapped_peak: int
    data: int


def free_room(root: Path = ROOT) -> Room:
    """What is free now: of the machine, of the container it may be, and under this process's own limits.

    Args:
        root: where `proc` and the cgroups' folders are found.
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
    """What a process uses, by default this one; None where the system does not tell (only Linux does) or it is gone."""
    content = _read(root / f"proc/{'self' if pid is None else pid}/status")
    kilobytes = {line.split(":")[0]: line.split()[1] for line in content.splitlines() if line.endswith(" kB")}
    keys = ("RssAnon", "VmSize", "VmPeak", "VmData")
    if any(key not in kilobytes for key in keys):
        return None
    return Usage(*(int(kilobytes[key]) << 10 for key in keys))


def limit_growth(room: int | None) -> None:
    """Let this process take that many more bytes, and fail when it asks for more; None: as many as it likes."""
    usage = process_usage()
    if room is None or usage is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = usage.data + room
    resource.setrlimit(resource.RLIMIT_DATA, (limit if soft == resource.RLIM_INFINITY else min(limit, soft), hard))


def peak_resident() -> int:
    """Most bytes this process ever had in memory."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _available(root: Path) -> int | None:
    """Of the machine: what Linux can give without swapping, elsewhere all it has."""
    for line in _read(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    if root != ROOT or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cgroups(root: Path) -> list[Path]:
    """Folders of the groups this process is in whose memory is counted, each followed by those around it."""
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
        # In a container the path may be told as it is seen from outside of it.
        inside = group.relative_to(seen) if group.is_relative_to(seen) else Path()
        folders += [top / inside, *(top / parent for parent in inside.parents)]
    return folders


def _free_in(folder: Path) -> int | None:
    """What the limits of one group leave; pages of files that can be dropped count as free."""
    found = []
    for limit_name, usage_name, cache in _LIMITS:
        limit, used = _read(folder / limit_name), _read(folder / usage_name)
        if limit in ("", "max") or not used:
            continue
        counts = dict(line.split() for line in _read(folder / "memory.stat").splitlines())
        found.append(max(int(limit) - int(used) + int(counts.get(cache, 0)), 0))
    return min(found, default=None)


def _read(file: Path) -> str:
    """What it says; nothing where it is not there, or belongs to a process that is gone."""
    try:
        return file.read_text().strip()
    except OSError:
        return ""


def keep_freed_memory() -> None:
    """Let this process keep the memory it frees, for the next step to use.

    The C library gives large blocks back to the system at once, and a training step on the CPU asks for the same
    ones again: a fifth of its time. Does nothing where the library has no such settings.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(_M_MMAP_MAX, 0)
        library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def keep_few_primitives() -> None:
    """Let oneDNN keep few of its compiled operations, if it has not begun yet; by default it keeps 1024.

    There is one for every size of an image. They lie where the large blocks of a step should, and each change of sizes
    leaves more gaps that are too small for the next ones.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")


def give_back_freed_memory() -> None:
    """Let this process give back what it frees, at once, so that what it has is what it needs; slow."""
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(_M_MMAP_MAX, 65_536)
        library.mallopt(_M_MMAP_THRESHOLD, 2**20)
        library.mallopt(_M_TRIM_THRESHOLD, 2**17)
