"""The owners of a server's models, found and started by the infer processes that share them. A private folder:

    alive         a pipe that every infer process holds open: when none does, the kernel ends all owners
    KEY.lock      held while an owner is looked for, started, or about to leave: so nobody meets one that is leaving
    KEY.sock      where it listens; KEY.pid says its number
    KEY.end       how the last one ended, written by the infer process that started it

KEY stands for a model, its version, its content and how it is to be run: other content is another owner.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import socket
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from services.infer.model_process.process import Program
from shoal.errors import FailedPrecondition

ALIVE = "alive"

_BACKLOG = 4096
_KEY_BYTES = 6
# A socket's path ends at 107 bytes: a short name leaves more of them to the folder.
_TOLD_S = 0.5
# How long it may take until is written how an owner has ended.


@dataclass(frozen=True)
class Joined:
    """A connection to an owner."""

    sock: socket.socket
    pidfd: int
    pid: int
    is_new: bool
    """It was started for this connection."""


class Owners:
    """Finds owners, or starts them. Any thread may use it. Use as `with`, or let it end with the process."""

    def __init__(self, folder: Path | None = None) -> None:
        """`folder` is shared with other infer processes; without one, models are shared with nobody.

        Raises:
            FailedPrecondition: others than this user may write to the folder, or there is none.
        """
        if folder is not None:
            _check(folder)
        self._folder = folder
        self._own: tempfile.TemporaryDirectory[str] | None = None
        self._alive: int | None = None
        self._opening = threading.Lock()

    def __enter__(self) -> Owners:
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None) -> None:
        if self._alive is not None:
            os.close(self._alive)
            self._alive = None
        if self._own is not None:
            self._own.cleanup()

    def join(self, key: str, program: Program) -> Joined:
        """A connection to the owner that `key` stands for, which `program` starts if there is none. Raises OSError."""
        folder = self._opened()
        with locked(folder / f"{key}.lock"):
            return _found(folder, key) or _started(folder, key, program)

    def ending(self, key: str, pid: int) -> int | None:
        """How the owner `pid` ended: its exit status, or minus the signal; None when nobody says."""
        until = time.monotonic() + _TOLD_S
        while True:
            with contextlib.suppress(OSError, ValueError):
                ended, code = (self._opened() / f"{key}.end").read_text().split()
                if int(ended) == pid:
                    return int(code)
            if time.monotonic() > until:
                return None
            time.sleep(0.005)

    def _opened(self) -> Path:
        with self._opening:
            if self._folder is None:
                self._own = tempfile.TemporaryDirectory(prefix="shoal-")
                self._folder = Path(self._own.name)
            if self._alive is None:
                with contextlib.suppress(FileExistsError):
                    os.mkfifo(self._folder / ALIVE, 0o600)
                # For both directions: to open it for writing alone, somebody would have to read it.
                self._alive = os.open(self._folder / ALIVE, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
            return self._folder


def key_of(load: Mapping[str, Any], digest: str) -> str:
    """What stands for what is loaded: its header, and `digest`, of its content; without one, what the file is now."""
    if digest:
        # Where it lies does not matter: each infer process of a node has links of its own to the files.
        load = {**load, "file": Path(load["file"]).name, "folder": ""}
    else:
        file = os.stat(load["file"])
        digest = f"{file.st_dev} {file.st_ino} {file.st_size} {file.st_mtime_ns}"
    text = json.dumps([load, digest], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=_KEY_BYTES).hexdigest()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock `path`, which the kernel gives back if the process dies."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _check(folder: Path) -> None:
    try:
        status = os.lstat(folder)
    except OSError as err:
        raise FailedPrecondition(f"shared_dir {folder}: {err.strerror}") from err
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise FailedPrecondition(f"shared_dir {folder}: expected a folder of this user's that no other can use (0700)")


def _found(folder: Path, key: str) -> Joined | None:
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.connect(str(folder / f"{key}.sock"))
        pid = int((folder / f"{key}.pid").read_text())
        return Joined(sock, os.pidfd_open(pid), pid, is_new=False)
    except (OSError, ValueError):  # Nobody listens; or it has just died.
        sock.close()
        return None


def _started(folder: Path, key: str, program: Program) -> Joined:
    path = folder / f"{key}.sock"
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen(_BACKLOG)  # From now on it can be joined, though it only starts.
        popen = subprocess.Popen(
            [*program.argv, str(listening.fileno()), str(folder), key],
            stdin=subprocess.DEVNULL,
            # It outlives this process: what it says goes where this process says things, not through it.
            stdout=2,
            stderr=2,
            env=dict(program.environment),
            cwd=program.folder,
            pass_fds=(listening.fileno(),),
            start_new_session=True,
        )
    threading.Thread(target=_reap, args=(popen, folder / f"{key}.end"), name=f"owner {key}", daemon=True).start()
    pidfd = os.pidfd_open(popen.pid)
    sock = socket.socket(socket.AF_UNIX)
    try:
        (folder / f"{key}.pid").write_text(str(popen.pid))
        sock.connect(str(path))
    except BaseException:
        sock.close()
        os.close(pidfd)
        popen.kill()
        raise
    return Joined(sock, pidfd, popen.pid, is_new=True)


def _reap(popen: subprocess.Popen[bytes], told: Path) -> None:
    code = popen.wait()
    fresh = told.with_suffix(f".end.{popen.pid}")
    with contextlib.suppress(OSError):  # The server is on its way out, and the folder gone.
        fresh.write_text(f"{popen.pid} {code}")
        fresh.replace(told)
