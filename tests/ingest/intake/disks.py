"""A disk that a test may fill: a filesystem in memory, of a size of its own.

Mounted where that is allowed, else in a user namespace of a process that lives as long as the disk; its files are then
reached through that process' root.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

BALLAST = "ballast"


class SmallDisk:
    """What is on it lies in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def free(self) -> int:
        return shutil.disk_usage(self.folder).free

    def fill(self, left: int) -> None:
        """Takes space until `left` bytes are free."""
        with (self.folder / BALLAST).open("ab") as file:
            if (more := self.free - left) > 0:
                os.posix_fallocate(file.fileno(), file.tell(), more)

    def clear(self) -> None:
        """Gives that space back."""
        (self.folder / BALLAST).unlink(missing_ok=True)


@contextmanager
def small_disk(folder: Path, nbytes: int) -> Iterator[SmallDisk]:
    """A disk of `nbytes`, at `folder`, which must be there."""
    mounting = ["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", str(folder)]
    if os.geteuid() == 0 and subprocess.run(mounting, check=False).returncode == 0:
        try:
            yield SmallDisk(folder)
        finally:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
        return
    script = f"{' '.join(mounting)} && echo mounted && exec sleep infinity"
    with subprocess.Popen(["unshare", "-Urm", "sh", "-c", script], stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout is not None
            if holder.stdout.readline() != b"mounted\n":
                pytest.skip("this machine lets nobody mount a filesystem: no disk to fill")
            yield SmallDisk(Path(f"/proc/{holder.pid}/root{folder}"))
        finally:
            holder.kill()
