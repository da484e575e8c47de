"""Temporary folder that one process locks while it uses it; an unlocked one is left by a process that was killed.

    create: remove unlocked folders of the same kind ──> make PREFIX-XXXXXXXX (mode 0700) ──> lock
    close:  remove ──> unlock

systemd-tmpfiles spares a locked folder and everything below it, however old its files are (tmpfiles.d(5)).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from pathlib import Path
from types import TracebackType


class PrivateFolder:
    """A new folder in `base`, locked until `close`. Every folder of its `prefix` must be made by this class."""

    def __init__(self, prefix: str, base: str | Path | None = None) -> None:
        """Create the folder; first remove the folders of the same prefix that no process has locked.

        Args:
            base: None: the machine's temporary folder.
        """
        within = Path(base or tempfile.gettempdir())
        sweep(prefix, within)
        self.path, self._lock = _locked(prefix, within)
        self._is_open = True

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Remove the folder. A second call does nothing."""
        if self._is_open:
            self._is_open = False
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)


def sweep(prefix: str, base: Path) -> None:
    """Remove this user's folders in `base` whose name begins with `prefix` and that no process has locked."""
    for path in base.glob(f"{prefix}*"):
        _remove_abandoned(path)


def _locked(prefix: str, base: Path) -> tuple[Path, int]:
    """Return a new folder in `base`, and the descriptor that holds its lock."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=prefix, dir=base))
        # Until the folder is locked, another process that starts now may remove it as abandoned.
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if path.exists():
                return path, descriptor
            os.close(descriptor)


def _remove_abandoned(path: Path) -> None:
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            status = os.fstat(descriptor)
            if status.st_uid == os.getuid() and stat.S_IMODE(status.st_mode) == 0o700:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(descriptor)
