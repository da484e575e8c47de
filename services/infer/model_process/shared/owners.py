"""Registry of the owners of shared models: infer processes find owners in a private folder, or start them.

    alive         a pipe that every infer process holds open: when none does, the kernel ends all owners
    KEY.lock      held while an owner is looked up, started or exits, so that no process joins an exiting owner
    KEY.sock      the owner's listening socket; KEY.pid has its process id
    KEY.end       exit status of the last owner, written by the infer process that started it

KEY is a digest of a model's load request and content: changed content gets another owner.
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
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from mesh.process.private_folder import PrivateFolder
from services.infer.model_process.process import Program
from shoal.errors import FailedPrecondition

ALIVE = "alive"

_BACKLOG = 4096
# The path of a unix socket has at most 107 bytes: a short name leaves more of them to the folder.
_KEY_BYTES = 6
# Longest wait for the file with an owner's exit status.
_END_FILE_S = 0.5


@dataclass(frozen=True)
class OwnerConnection:
    """An open connection to an owner. The receiver closes `sock` and `pidfd`."""

    sock: socket.socket
    pidfd: int
    pid: int
    is_new: bool
    """True when the owner was started for this connection."""


class Owners:
    """Registry of owners. Any thread may use it. A context manager; without `with` it ends with the process."""

    def __init__(self, folder: Path | None = None) -> None:
        """Check `folder`, which infer processes share. None: a temporary folder of this infer process only.

        Raises:
            FailedPrecondition: the folder does not exist, or users other than this one have access to it.
        """
        if folder is not None:
            _check(folder)
        self._folder = folder
        self._own: PrivateFolder | None = None
        self._alive: int | None = None
        self._opening = threading.Lock()

    def __enter__(self) -> Owners:
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None) -> None:
        if self._alive is not None:
            os.close(self._alive)
            self._alive = None
        if self._own is not None:
            self._own.close()

    def join(self, key: str, program: Program) -> OwnerConnection:
        """Connect to the owner with this `key`; start `program` as the owner when there is none. Raises OSError."""
        folder = self._open_folder()
        with locked(folder / f"{key}.lock"):
            return _connect(folder, key) or _start(folder, key, program)

    def ending(self, key: str, pid: int) -> int | None:
        """Return the exit status of the owner `pid`, or minus the signal; None when the status is unknown."""
        until = time.monotonic() + _END_FILE_S
        while True:
            with contextlib.suppress(OSError, ValueError):
                ended, code = (self._open_folder() / f"{key}.end").read_text().split()
                if int(ended) == pid:
                    return int(code)
            if time.monotonic() > until:
                return None
            time.sleep(0.005)

    def _open_folder(self) -> Path:
        with self._opening:
            if self._folder is None:
                self._own = PrivateFolder("shoal-tmp-owners-")
                self._folder = self._own.path
            if self._alive is None:
                with contextlib.suppress(FileExistsError):
                    os.mkfifo(self._folder / ALIVE, 0o600)
                # Read and write: a pipe opens for writing alone only when it has a reader.
                self._alive = os.open(self._folder / ALIVE, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
            return self._folder


def key_of(load: Mapping[str, Any], digest: str) -> str:
    """Return the key of an owner: a digest of the load request and of the model's content.

    Args:
        digest: of the content; empty: the file's device, inode, size and modification time are used.
    """
    if digest:
        # The paths are left out: each infer process of a node has links of its own to the files.
        load = {**load, "file": Path(load["file"]).name, "folder": ""}
    else:
        file = os.stat(load["file"])
        digest = f"{file.st_dev} {file.st_ino} {file.st_size} {file.st_mtime_ns}"
    text = json.dumps([load, digest], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=_KEY_BYTES).hexdigest()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`; the kernel releases the lock when the process dies."""
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
        raise FailedPrecondition(f"shared_dir {folder}: expected a folder that belongs to this user, with mode 0700")


def _connect(folder: Path, key: str) -> OwnerConnection | None:
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.connect(str(folder / f"{key}.sock"))
        pid = int((folder / f"{key}.pid").read_text())
        return OwnerConnection(sock, os.pidfd_open(pid), pid, is_new=False)
    # There is no owner, or it has just died.
    except (OSError, ValueError):
        sock.close()
        return None


def _start(folder: Path, key: str, program: Program) -> OwnerConnection:
    path = folder / f"{key}.sock"
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        # The socket accepts connections before the owner has started.
        listening.listen(_BACKLOG)
        popen = subprocess.Popen(
            [*program.argv, str(listening.fileno()), str(folder), key],
            stdin=subprocess.DEVNULL,
            # The owner may outlive this process, so it inherits standard error rather than a pipe to this process.
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
    return OwnerConnection(sock, pidfd, popen.pid, is_new=True)


def _reap(popen: subprocess.Popen[bytes], end_file: Path) -> None:
    code = popen.wait()
    temporary = end_file.with_suffix(f".end.{popen.pid}")
    # The folder is deleted when the server shuts down.
    with contextlib.suppress(OSError):
        temporary.write_text(f"{popen.pid} {code}")
        temporary.replace(end_file)
