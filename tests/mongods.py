"""A mongod of the test's own, to be killed, frozen or filled."""

from __future__ import annotations

from pathlib import Path

from shoal.node import processes
from tests.breakable import Process, until


class MongoProcess(Process):
    """A one-member replica set. `arguments` are added to those of a node's own mongod; of two, the last counts."""

    def __init__(self, folder: Path, *arguments: str, oplog_mib: int = 256) -> None:
        port = processes.free_port()
        data = folder / "mongod"
        data.mkdir()
        self._part = processes.mongod(data, port)
        argv = list(self._part.argv)
        argv[argv.index("--oplogSize") + 1] = str(oplog_mib)
        super().__init__([*argv, *arguments], folder / "mongod.log", self._part.env)
        self.address = f"127.0.0.1:{port}"
        self.uri = f"mongodb://{self.address}/?replicaSet=rs0"

    async def until_ready(self) -> None:
        await until(self._part.ready, "mongod is primary")
