"""Limit of the memory that a process may allocate: an allocation beyond it fails, instead of the whole process.

Without it, Linux grants more memory than there is, and ends a process once the memory is used.
"""

from __future__ import annotations

import re
import resource
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/")

# Thread stacks, and memory that is reserved and not used, count: some 500 MiB of an infer process.
_LEAST_BYTES = 2 << 30


def limit_memory(size: int | None, root: Path = _ROOT) -> None:
    """Limit the private memory of this process, and of each that it starts, to `size` bytes.

    None: three quarters of the memory of the machine or container, and 2 GiB at least; no limit where `root` has an
    NVIDIA GPU, whose driver reserves addresses beyond the memory. A lower limit stays as it is.
    """
    if size is None:
        if (root / "dev/nvidiactl").exists():
            return
        size = max(memory_bytes(root) // 4 * 3, _LEAST_BYTES)
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limits = [each for each in (size, soft, hard) if each != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min(limits), hard))


def memory_bytes(root: Path = _ROOT) -> int:
    """Return the memory of the machine, or the limit of the control groups that this process is in; `root` has /proc.

    Format: https://docs.kernel.org/admin-guide/cgroup-v2.html, memory.max.
    """
    return min([_of_machine("MemTotal", root), *(limit for _, limit in _limited_groups("self", root))])


def available(process: int | str = "self", root: Path = _ROOT) -> tuple[int, int]:
    """Return the bytes of a memory, and those of them that are available.

    It is the one with the least share left: the machine's, or that of a control group that the process is in.
    """
    found = [(_of_machine("MemTotal", root), _of_machine("MemAvailable", root))]
    for group, limit in _limited_groups(process, root):
        used, stat = _text(group / "memory.current").strip(), _text(group / "memory.stat")
        # Pages of files that were not used lately are freed at need, as MemAvailable counts them.
        cached = re.search(r"^inactive_file (\d+)$", stat, re.M)
        if used.isdecimal():
            found.append((limit, max(0, limit - int(used) + (int(cached[1]) if cached else 0))))
    return min(found, key=lambda each: each[1] / each[0])


def _of_machine(name: str, root: Path) -> int:
    found = re.search(rf"^{name}: +(\d+) kB$", (root / "proc/meminfo").read_text(), re.M)
    assert found is not None, f"Linux names {name}"
    return int(found[1]) << 10


def _limited_groups(process: int | str, root: Path) -> Iterator[tuple[Path, int]]:
    """Yield the control groups of a process that have a limit, and the limit in bytes."""
    groups, own = root / "sys/fs/cgroup", re.search(r"^0::/(.*)$", _text(root / f"proc/{process}/cgroup"), re.M)
    folder = groups / (own[1] if own else "")
    while folder.is_relative_to(groups):
        if (limit := _text(folder / "memory.max").strip()).isdecimal() and int(limit):
            yield folder, int(limit)
        folder = folder.parent


def _text(file: Path) -> str:
    """Return the text of a file; empty without one."""
    try:
        return file.read_text()
    except OSError:
        return ""
