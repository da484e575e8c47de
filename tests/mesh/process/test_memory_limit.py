"""Memory of a machine or container, and the limit that a process sets itself."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from mesh.process.memory_limit import available, memory_bytes

MIB = 1 << 20


@pytest.mark.parametrize(
    ("limits", "mib"),
    [
        ({}, 4096),
        ({"": "max", "a": "max", "a/b": f"{512 * MIB}"}, 512),
        ({"a": f"{256 * MIB}", "a/b": "max"}, 256),
        ({"": f"{1024 * MIB}\n", "a/b": f"{2048 * MIB}\n", "a/c": f"{16 * MIB}\n"}, 1024),
    ],
)
def test_the_smallest_limit_of_machine_and_control_groups_counts(limits: dict[str, str], mib: int, tmp_path: Path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal:        4194304 kB\nMemFree:          1024 kB\n")
    (tmp_path / "proc/self/cgroup").write_text("0::/a/b\n")
    for group, limit in limits.items():
        (tmp_path / "sys/fs/cgroup" / group).mkdir(parents=True, exist_ok=True)
        (tmp_path / "sys/fs/cgroup" / group / "memory.max").write_text(limit)
    assert memory_bytes(tmp_path) == mib * MIB


@pytest.mark.parametrize(
    ("used", "inactive", "expected"),
    # A group with a smaller share left than the machine, and one with a larger share.
    [(1000, 0, (1024, 24)), (1000, 900, (4096, 2048))],
)
def test_the_memory_with_the_least_share_left_is_that_of_the_processs_group_or_of_the_machine(
    used: int, inactive: int, expected: tuple[int, int], tmp_path: Path
) -> None:
    (tmp_path / "proc/7").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal:        4194304 kB\nMemAvailable:    2097152 kB\n")
    (tmp_path / "proc/7/cgroup").write_text("0::/a/b\n")
    (group := tmp_path / "sys/fs/cgroup/a/b").mkdir(parents=True)
    (group / "memory.max").write_text(f"{1024 * MIB}\n")
    (group / "memory.current").write_text(f"{used * MIB}\n")
    (group / "memory.stat").write_text(f"file 1\ninactive_file {inactive * MIB}\n")
    assert available(7, tmp_path) == (expected[0] * MIB, expected[1] * MIB)


def test_a_machine_without_control_groups_has_its_memory(tmp_path: Path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal:        1024 kB\n")
    assert memory_bytes(tmp_path) == MIB


def test_an_allocation_beyond_the_limit_fails_and_the_process_goes_on(tmp_path: Path):
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidiactl").touch()
    text = f"""
        from pathlib import Path
        from mesh.process.memory_limit import limit_memory, resource
        limit_memory(None, Path({str(tmp_path)!r}))
        assert resource.getrlimit(resource.RLIMIT_DATA)[0] == resource.RLIM_INFINITY
        limit_memory(1 << 30)
        limit_memory(None)
        try:
            bytearray(2 << 30)
        except MemoryError:
            print(len(bytearray({MIB})))
    """
    command = [sys.executable, "-c", textwrap.dedent(text)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout == f"{MIB}\n"
