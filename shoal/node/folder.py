"""The folders of a node: its data, which one node at a time may use, and a short-lived one for its sockets.

DATA_DIR/node.lock     held while a node runs; says which process holds it
         node.json     the node's ready file, while it is ready
         ports.json    the private ports, so that the next start can have the same
         logs/         a log for each process
         etcd/ mongo/ blobs/ cache/models/
RUN_DIR/*.sock, envoy.json     /tmp/shoal-XXXXXXXX: short, since a socket's path ends at 107 bytes
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from shoal.errors import FailedPrecondition, InvalidArgument

_SUBFOLDERS = ("logs", "etcd", "mongo", "blobs", "cache/models")
_RUN_PREFIX = "shoal-"
_PRIVATE_PREFIX = "shoal-serve-"
# What is left of 107 after `/shoal-serve-XXXXXXXX/` and the longest name of a socket.
_BASE_BYTES = 70


@contextlib.contextmanager
def held(data_dir: Path) -> Iterator[None]:
    """Makes the data folder, and holds it for this process until the block ends.

    Raises:
        InvalidArgument: it cannot be made or written to.
        FailedPrecondition: another node holds it.
    """
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in _SUBFOLDERS:
            (data_dir / name).mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(data_dir / "node.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as err:
        raise InvalidArgument(
            f"--data-dir {data_dir}: cannot be used: {err.strerror}: give a folder that you may write to"
        ) from err
    with os.fdopen(descriptor, "r+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as err:
            raise FailedPrecondition(
                f"{data_dir} is in use by another node ({_holder(data_dir)}): stop that one first, "
                "or give this one another folder with --data-dir"
            ) from err
        _sweep(_noted(data_dir).get("run_dir"))
        _note(data_dir, {"pid": os.getpid()})
        try:
            yield
        finally:
            _note(data_dir, {})


@contextlib.contextmanager
def run_dir(data_dir: Path, environ: Mapping[str, str]) -> Iterator[Path]:
    """A fresh folder for sockets, which goes when the block ends, or at the next start on `data_dir` after a kill."""
    path = Path(tempfile.mkdtemp(prefix=_RUN_PREFIX, dir=_base(environ)))
    _note(data_dir, {"pid": os.getpid(), "run_dir": str(path)})
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def private(environ: Mapping[str, str]) -> Iterator[Path]:
    """Make a fresh private folder with a short path, and remove it when the block ends.

    This process holds a lock on it. A folder without a holder is of a process that was killed: it is removed here.
    """
    base = Path(_base(environ))
    for left in base.glob(f"{_PRIVATE_PREFIX}*"):
        _remove_abandoned(left)
    path, lock = _locked(base)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _locked(base: Path) -> tuple[Path, int]:
    """Return a fresh folder in `base`, and the descriptor that holds its lock."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=_PRIVATE_PREFIX, dir=base))
        # Another process that starts now may take the folder for an abandoned one, until it is locked.
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(lock, fcntl.LOCK_EX)
            if path.exists():
                return path, lock
            os.close(lock)


def _remove_abandoned(path: Path) -> None:
    """Remove a private folder that no process holds."""
    with contextlib.suppress(OSError):
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            status = os.fstat(lock)
            if status.st_uid == os.getuid() and stat.S_IMODE(status.st_mode) == 0o700:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(lock)


def remembered_ports(data_dir: Path) -> dict[str, int]:
    """The private ports of the last run; none when there was none, or what it wrote cannot be read."""
    try:
        found = json.loads((data_dir / "ports.json").read_text())
        return {str(name): int(port) for name, port in found.items() if 0 < int(port) < 65536}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def remember_ports(data_dir: Path, ports: Mapping[str, int]) -> None:
    write_whole(data_dir / "ports.json", json.dumps(dict(ports), indent=2))


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that a reader sees the old text or the new one, never a part."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fresh.write_text(text)
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


def _base(environ: Mapping[str, str]) -> str:
    runtime = environ.get("XDG_RUNTIME_DIR", "")
    for folder in (runtime, tempfile.gettempdir()):
        if folder and len(os.fsencode(folder)) <= _BASE_BYTES and os.access(folder, os.W_OK | os.X_OK):
            return folder
    return "/tmp"


def _noted(data_dir: Path) -> dict[str, object]:
    try:
        found = json.loads((data_dir / "node.lock").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _note(data_dir: Path, note: Mapping[str, object]) -> None:
    # In place: a file put in its place would not be the one that is locked.
    (data_dir / "node.lock").write_text(json.dumps(note))


def _holder(data_dir: Path) -> str:
    pid = _noted(data_dir).get("pid")
    return f"pid {pid}" if pid else "it has just started"


def _sweep(run_dir: object) -> None:
    """Removes the sockets of a node that was killed. Only what can be nothing else is touched."""
    if not isinstance(run_dir, str) or not Path(run_dir).name.startswith(_RUN_PREFIX):
        return
    with contextlib.suppress(OSError):
        status = os.lstat(run_dir)
        if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and stat.S_IMODE(status.st_mode) == 0o700:
            shutil.rmtree(run_dir, ignore_errors=True)
