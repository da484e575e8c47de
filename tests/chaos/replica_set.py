"""Three mongods as one replica set, whose members a test kills and brings back."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from pymongo import MongoClient
from pymongo.errors import PyMongoError

from shoal.node import processes
from tests.breakable import Process, until
from tests.free_ports import free_port


class ReplicaSet:
    """Used as `with`; `uri` names all members.

    Only the first `voters` members elect the primary, and are elected. `oplog_mib`: the size of the oplog.
    """

    def __init__(self, folder: Path, members: int = 3, *, voters: int = 3, oplog_mib: int | None = None) -> None:
        self._ports = [free_port() for _ in range(members)]
        self._members = [_member(folder, port, oplog_mib) for port in self._ports]
        self._voters = voters
        self._stack = ExitStack()
        hosts = ",".join(f"127.0.0.1:{port}" for port in self._ports)
        self.uri = f"mongodb://{hosts}/?replicaSet=rs0"

    def __enter__(self) -> ReplicaSet:
        for member in self._members:
            self._stack.enter_context(member)
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()

    async def until_ready(self) -> None:
        """Initiates the set and waits for its primary."""
        await until(self._initiated, "the set is initiated", every_s=0.2)
        await self.until_primary()

    async def until_primary(self, other_than: int | None = None) -> int:
        """Waits for a primary; returns its number."""

        found: int | None = None

        def is_there() -> bool:
            nonlocal found
            found = self.primary()
            return found not in (None, other_than)

        await until(is_there, "a primary", within_s=60, every_s=0.2)
        assert found is not None
        return found

    async def until_whole(self) -> None:
        """Waits until every member is primary or secondary."""
        await until(self._is_whole, "every member has caught up", within_s=60, every_s=0.2)

    def primary(self) -> int | None:
        """The number of the member that is primary."""
        return next((n for n in range(len(self._members)) if self._hello(n).get("isWritablePrimary")), None)

    def address(self, number: int) -> str:
        return f"127.0.0.1:{self._ports[number]}"

    def kill(self, number: int) -> None:
        self._members[number].kill()

    def bring_back(self, number: int) -> None:
        self._members[number].start()

    def _is_whole(self) -> bool:
        states = [self._hello(n) for n in range(len(self._members))]
        return all(state.get("isWritablePrimary") or state.get("secondary") for state in states)

    def _initiated(self) -> bool:
        members: list[dict[str, Any]] = [{"_id": n, "host": self.address(n)} for n in range(len(self._ports))]
        for member in members[self._voters :]:
            member |= {"votes": 0, "priority": 0}
        settings = {"electionTimeoutMillis": 2000, "heartbeatIntervalMillis": 500}
        config = {"_id": "rs0", "members": members, "settings": settings}
        try:
            if not all(self._hello(n) for n in range(len(self._ports))):
                return False
            if not self._hello(0).get("setName"):
                with _client(self._ports[0]) as client:
                    client.admin.command("replSetInitiate", config)
        except PyMongoError:
            return False
        return True

    def _hello(self, number: int) -> dict[str, Any]:
        if not self._members[number].is_running():
            return {}
        try:
            with _client(self._ports[number]) as client:
                return dict(client.admin.command("hello"))
        except PyMongoError:
            return {}


def _client(port: int) -> MongoClient[dict[str, Any]]:
    return MongoClient(f"mongodb://127.0.0.1:{port}", directConnection=True, serverSelectionTimeoutMS=1000)


def _member(folder: Path, port: int, oplog_mib: int | None) -> Process:
    data = folder / f"mongod-{port}"
    data.mkdir()
    part = processes.mongod(data, f"127.0.0.1:{port}")
    argv = list(part.argv)
    argv[argv.index("--wiredTigerCacheSizeGB") + 1] = "0.25"
    if oplog_mib is not None:
        argv[argv.index("--oplogSize") + 1] = str(oplog_mib)
        argv[argv.index("--oplogMinRetentionHours") + 1] = "0"
    return Process(argv, folder / f"mongod-{port}.log", part.env)
