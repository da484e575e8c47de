"""A mongod for one test, which the test may kill, freeze or fill."""

from __future__ import annotations

from pathlib import Path

from shoal.node import processes
from tests.breakable import Process, until
from tests.free_ports import free_port


class MongoProcess(Process):
    """A one-member replica set. `arguments` are added to a node's mongod command, and override its options."""

    def __init__(self, folder: Path, *arguments: str, oplog_mib: int = 256) -> None:
        port = free_port()
        data = folder / "mongod"
        data.mkdir()
        self.address = f"127.0.0.1:{port}"
        self._spec = processes.mongod(data, self.address)
        argv = list(self._spec.argv)
        argv[argv.index("--oplogSize") + 1] = str(oplog_mib)
        argv[argv.index("--oplogMinRetentionHours") + 1] = "0"
        super().__init__([*argv, *arguments], folder / "mongod.log", self._spec.env)
        self.uri = f"mongodb://{self.address}/?replicaSet=rs0"

    async def until_ready(self) -> None:
        await until(self._spec.ready, "mongod is primary")
