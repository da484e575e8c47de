"""Folders of a node: the data folder, which one node at a time may use, and a temporary folder for its sockets.

DATA_DIR/node.lock     locked while a node runs; contains the pid of that process
         node.json     the node's ready file, while it is ready
         master.key    with --auth: master key of the keyring, where no other one is given
         admin.key     with --auth: key of the node's user
         policy.json   with --auth: copy of the last policy, for an etcd that has lost it
         logs/         a log for each process
         log_levels.json  levels of `shoal logs --set-level`
         etcd/ mongo/ blobs/ cache/models/
         envoy.json    Envoy's bootstrap file
         prometheus.json  the address of the node's metrics, for Prometheus' file_sd_configs
RUN_DIR/*.sock         /tmp/shoal-up-XXXXXXXX: short, since a socket's path has at most 107 bytes. Locked while the node
                       runs, so that no cleaner of old files removes it. Not in XDG_RUNTIME_DIR, which goes with the
                       user's last login: a node outlives the login that started it.
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

from mesh.process.private_folder import PrivateFolder
from shoal.errors import FailedPrecondition, InvalidArgument

POLICY_COPY = "policy.json"
"""Name of the copy of the last policy."""
LOG_LEVELS = "log_levels.json"
"""Name of the file of levels that differ for a time (mesh.process.log_levels)."""
_SUBFOLDERS = ("logs", "etcd", "mongo", "blobs", "cache/models")
_RUN_PREFIX = "shoal-up-"
# Earlier versions used this prefix alone.
_ANY_RUN_PREFIX = "shoal-"
_PRIVATE_PREFIX = "shoal-serve-"
# Bytes left of 107 after `/shoal-serve-XXXXXXXX/` and the longest name of a socket.
_BASE_BYTES = 70


@contextlib.contextmanager
def lock(data_dir: Path) -> Iterator[None]:
    """Create the data folder, and lock it for this process until the block ends.

    Raises:
        InvalidArgument: the folder cannot be created or written to.
        FailedPrecondition: another node uses the folder.
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
    with os.fdopen(descriptor, "r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as err:
            raise FailedPrecondition(
                f"{data_dir} is in use by another node ({_holder_text(data_dir)}): stop that node first, "
                "or give this node another folder with --data-dir"
            ) from err
        _remove_run_dir(_read_holder(data_dir).get("run_dir"))
        _write_holder(data_dir, {"pid": os.getpid()})
        try:
            yield
        finally:
            _write_holder(data_dir, {})


@contextlib.contextmanager
def run_dir(data_dir: Path, environ: Mapping[str, str]) -> Iterator[Path]:
    """Create a folder for sockets. It is removed when the block ends, or, after a kill, at the next start."""
    with PrivateFolder(_RUN_PREFIX, _base(environ)) as path:
        _write_holder(data_dir, {"pid": os.getpid(), "run_dir": str(path)})
        yield path


def running_in(data_dir: Path) -> Path:
    """Return the folder with the sockets of the node that runs on `data_dir`.

    Raises:
        FailedPrecondition: none runs on it, or it is another user's.
    """
    run_dir = _read_holder(data_dir).get("run_dir")
    if not isinstance(run_dir, str) or not os.access(run_dir, os.X_OK):
        raise FailedPrecondition(f"no node of yours runs on {data_dir}: start it, or give its folder")
    return Path(run_dir)


def private(environ: Mapping[str, str]) -> PrivateFolder:
    """Return a new private folder with a short path. Its end as a context manager removes it."""
    return PrivateFolder(_PRIVATE_PREFIX, _base(environ))


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, the file `lock` in it. Waits while another process holds it. Raises OSError."""
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _base(environ: Mapping[str, str]) -> str:
    for folder in (environ.get("TMPDIR", ""), tempfile.gettempdir()):
        # pymongo takes the address of a replica set's member for a host name: it lower-cases it, and splits it at ":".
        # mongod splits the addresses that it listens at at ",". A relative path is another one for the command line.
        is_a_member_name = folder == folder.lower() and not {":", ","} & set(folder) and os.path.isabs(folder)
        is_short = len(os.fsencode(folder)) <= _BASE_BYTES
        if folder and is_a_member_name and is_short and os.access(folder, os.W_OK | os.X_OK):
            return folder
    return "/tmp"


def ready_document(data_dir: Path) -> dict[str, object]:
    """Return the ready file of the node on a data folder; empty when none is ready."""
    return _read(data_dir / "node.json")


def _read_holder(data_dir: Path) -> dict[str, object]:
    return _read(data_dir / "node.lock")


def _read(path: Path) -> dict[str, object]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write_holder(data_dir: Path, holder: Mapping[str, object]) -> None:
    # Written in place: a file that replaced it would not be locked.
    (data_dir / "node.lock").write_text(json.dumps(holder))


def _holder_text(data_dir: Path) -> str:
    pid = _read_holder(data_dir).get("pid")
    return f"pid {pid}" if pid else "it has just started"


def _remove_run_dir(run_dir: object) -> None:
    """Remove the run folder of a node that was killed. A folder that may be anything else is left alone."""
    if not isinstance(run_dir, str) or not Path(run_dir).name.startswith(_ANY_RUN_PREFIX):
        return
    with contextlib.suppress(OSError):
        status = os.lstat(run_dir)
        if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and stat.S_IMODE(status.st_mode) == 0o700:
            shutil.rmtree(run_dir, ignore_errors=True)
