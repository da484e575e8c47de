"""Limit of the memory that a process may allocate: an allocation beyond it fails, instead of the whole process.

Without it, Linux grants more memory than there is, and ends a process once the memory is used.
"""

from __future__ import annotations

import re
import resource
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
    found = re.search(r"^MemTotal: +(\d+) kB$", (root / "proc/meminfo").read_text(), re.M)
    assert found is not None, "Linux names the machine's memory"
    sizes = [int(found[1]) << 10]
    groups, own = root / "sys/fs/cgroup", re.search(r"^0::/(.*)$", _text(root / "proc/self/cgroup"), re.M)
    folder = groups / (own[1] if own else "")
    while folder.is_relative_to(groups):
        if (limit := _text(folder / "memory.max").strip()).isdecimal():
            sizes.append(int(limit))
        folder = folder.parent
    return min(sizes)


def _text(file: Path) -> str:
    """Return the text of a file; empty without one."""
    try:
        return file.read_text()
    except OSError:
        return ""
