"""Reports on connectors: each instance writes the progress of its own, and any instance lists all.

Collection `connectors`: a document for each connector of each instance, rewritten every few seconds. A document that is
no longer rewritten is listed as stale for a day, so that operators see that its instance stopped.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any

from pymongo import ASCENDING, IndexModel
from pymongo.asynchronous.collection import AsyncCollection

from mesh.mongo import Document, translated
from mesh.mongo_clock import Clock
from mesh.process.tasks import Background
from services.ingest.connectors.progress import ConnectorProgress, PartitionProgress, Phase
from shoal.errors import ShoalError

log = logging.getLogger(__name__)

CONNECTORS = "connectors"
_KEPT_S = 86_400
INDEXES = (IndexModel([("updated_at", ASCENDING)], name="forgotten", expireAfterSeconds=_KEPT_S),)
VALIDATOR: Mapping[str, Any] = {
    "$jsonSchema": {
        "bsonType": "object",
        "required": ["_id", "name", "instance", "phase", "updated_at"],
        "properties": {"phase": {"enum": [str(phase) for phase in Phase]}, "updated_at": {"bsonType": "date"}},
    }
}
_EVERY_S = 2.0
_STALE = timedelta(seconds=10)
# Limit on the partitions of one report, so that its document stays far below MongoDB's limit.
_MAX_PARTITIONS = 1_000


@dataclass(frozen=True, slots=True)
class ConnectorInfo:
    """Configuration of a connector, as reports show it."""

    name: str
    source: str
    sink: str
    dead_letters: str
    model_name: str
    model_version: str
    tenant: str


@dataclass(frozen=True, slots=True)
class Report:
    """Progress of a connector at one instance."""

    info: ConnectorInfo
    instance: str
    phase: Phase
    messages: int
    answered: int
    dead: int
    in_flight: int
    updated_at: datetime
    is_stale: bool = False
    """True when the instance has not written for a while."""
    lag: int | None = None
    lag_ms: int | None = None
    error: str = ""
    error_at: datetime | None = None
    partitions: tuple[PartitionProgress, ...] = ()


class Reports(Background):
    """Writer of this instance's reports until its block ends, and reader of all reports."""

    def __init__(
        self,
        collection: AsyncCollection[Document],
        own: Callable[[], Mapping[str, tuple[ConnectorInfo, ConnectorProgress]]],
        *,
        instance: str,
        clock: Clock,
        ready: asyncio.Event,
    ) -> None:
        self._collection = collection
        self._own = own
        self._instance = instance
        self._clock = clock
        self._ready = ready

    async def all(self, name: str = "") -> list[Report]:
        """Return the reports sorted by name and instance; `name` selects one connector.

        Raises:
            Unavailable: MongoDB is unavailable.
        """
        with translated("reading the reports on connectors"):
            found = await self._collection.find({"name": name} if name else {}).to_list()
        now = self._clock()
        return sorted((_report(each, now) for each in found), key=lambda each: (each.info.name, each.instance))

    async def _run(self) -> None:
        await self._ready.wait()
        while True:
            try:
                await self._write()
            except ShoalError as err:
                log.warning(
                    "cannot write the reports on connectors: %(error)s",
                    {"event": "connector.reports_not_written", "error": err},
                )
            await asyncio.sleep(_EVERY_S)

    async def _write(self) -> None:
        documents = [
            _document(self._instance, info, progress, self._clock()) for info, progress in self._own().values()
        ]
        with translated("writing the reports on connectors"):
            ids = [document["_id"] for document in documents]
            # Connectors of an earlier process of this instance that are no longer configured.
            await self._collection.delete_many({"instance": self._instance, "_id": {"$nin": ids}})
            for document in documents:
                await self._collection.replace_one({"_id": document["_id"]}, document, upsert=True)


def _document(instance: str, info: ConnectorInfo, progress: ConnectorProgress, now: datetime) -> Document:
    status = progress.status()
    return {
        "_id": f"{instance}/{info.name}",
        "instance": instance,
        "phase": str(progress.phase),
        "messages": progress.messages,
        "answered": progress.answered,
        "dead": progress.dead,
        "in_flight": progress.in_flight,
        "updated_at": now,
        "lag": status.lag,
        "lag_ms": status.lag_ms,
        "error": status.problem or progress.error,
        "error_at": now if status.problem else progress.error_at,
        "lanes": [
            {"lane": partition.name, "committed": partition.committed, "lag": partition.lag}
            for partition in status.partitions[:_MAX_PARTITIONS]
        ],
        **asdict(info),
    }


def _report(document: Document, now: datetime) -> Report:
    return Report(
        info=ConnectorInfo(**{name: document[name] for name in ConnectorInfo.__slots__}),
        instance=document["instance"],
        phase=Phase(document["phase"]),
        messages=document["messages"],
        answered=document["answered"],
        dead=document["dead"],
        in_flight=document["in_flight"],
        updated_at=document["updated_at"],
        is_stale=now - document["updated_at"] > _STALE,
        lag=document["lag"],
        lag_ms=document["lag_ms"],
        error=document["error"],
        error_at=document["error_at"],
        partitions=tuple(PartitionProgress(lane["lane"], lane["committed"], lane["lag"]) for lane in document["lanes"]),
    )
