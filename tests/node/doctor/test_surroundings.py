"""Causes in the surroundings of a node that does not run: the machine's memory and disks, in a mount namespace."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.node

DOCTOR = f"exec {sys.executable} -m shoal.cli.main doctor --json --data-dir"
MEMINFO = "MemTotal: 16000000 kB\nMemFree: 100000 kB\nMemAvailable: {available} kB\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data folder."""
    (tmp_path / "data" / "logs").mkdir(parents=True)
    return tmp_path / "data"


def found(folder: Path, before: str) -> dict[str, dict[str, str]]:
    """Return the findings by check, in a namespace in which the commands `before` have run."""
    script = f"set -e; {before}; {DOCTOR} {folder}"
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, timeout=60)
    if "unshare: " in done.stderr:
        pytest.skip(f"needs a mount namespace: {done.stderr.strip()}")
    # The node does not run, which is an error.
    assert done.returncode == 2, done.stderr
    return {finding["check"]: finding for finding in json.loads(done.stdout)["findings"]}


@pytest.mark.parametrize(("available", "is_low"), [(700_000, True), (900_000, False)])
def test_memory_is_low_below_a_twentieth(folder: Path, tmp_path: Path, available: int, is_low: bool) -> None:
    (tmp_path / "meminfo").write_text(MEMINFO.format(available=available))
    findings = found(folder, f"mount --bind {tmp_path}/meminfo /proc/meminfo")
    assert ("memory-low" in findings) is is_low
    if is_low:
        assert findings["memory-low"]["what"].startswith("684 MiB of 15625 MiB of memory are available")


def test_a_small_disk_without_files_and_a_small_shared_memory_are_found(folder: Path) -> None:
    # With the root and logs, these are ten.
    files = " ".join(f"{folder}/{n}" for n in range(8))
    disk = f"mount -t tmpfs -o size=100m,nr_inodes=10 none {folder}; mkdir {folder}/logs; touch {files}"
    findings = found(folder, f"{disk}; mount -t tmpfs -o size=1m none /dev/shm")
    assert findings["disk-full"]["what"] == f"100 MiB of 100 MiB are free at {folder}: submits are refused"
    assert findings["inodes-full"]["what"].startswith("0 of 10 files can still be made")
    assert findings["shared-memory-low"]["what"].startswith("1 MiB are free in /dev/shm")
    for check in ("disk-full", "inodes-full", "shared-memory-low"):
        assert subprocess.run(findings[check]["command"], shell=True, capture_output=True).returncode == 0
