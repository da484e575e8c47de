"""State of MongoDB's replica set: the members that answer, and the time that its oplog reaches back."""

from __future__ import annotations

import logging

from pymongo import ASCENDING, DESCENDING, AsyncMongoClient

from mesh.mongo import Document, translated
from mesh.process.tasks import Background, for_ever

log = logging.getLogger(__name__)

READ_S = 10.0
"""Interval at which the oplog is read: its two ends and its size."""


class ReplicaSet(Background):
    """State of the set behind a client. Used as `async with`."""

    def __init__(self, client: AsyncMongoClient[Document]) -> None:
        self._client = client
        self.oplog_window_s = -1.0
        """Seconds between the oldest and the newest entry; -1: not read, or this user may not read it."""
        self.oplog_used = 0.0
        """Share of the oplog's size that its entries take. MongoDB removes the oldest ones at some time after 1."""

    @property
    def members(self) -> dict[str, bool]:
        """Members of the set by address, as this client's monitors see them: True for one that answers."""
        found = self._client.topology_description.server_descriptions()
        return {
            host if port is None else f"{host}:{port}": description.server_type_name != "Unknown"
            for (host, port), description in found.items()
        }

    async def _run(self) -> None:
        # A user of one database may not read it, and then nothing is known.
        await for_ever("read the oplog", self._read, away_s=READ_S, log=log, level=logging.DEBUG)

    async def _read(self) -> float:
        local = self._client["local"]
        with translated("reading the oplog"):
            first, last = [
                await local["oplog.rs"].find_one({}, {"ts": 1}, sort=[("$natural", order)])
                for order in (ASCENDING, DESCENDING)
            ]
            size = await local.command("collStats", "oplog.rs")
        if first is not None and last is not None and size.get("maxSize"):
            self.oplog_window_s = float(last["ts"].time - first["ts"].time)
            self.oplog_used = size["size"] / size["maxSize"]
        return READ_S
