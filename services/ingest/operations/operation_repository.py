"""Operations in MongoDB: started, read and aborted by clients, carried out by the leader.

job_operations  {_id, tenant, action, state, selection: {...}, reason, caller, position, matched, changed, skipped,
                 started_at, updated_at, ended_at: missing while it runs}
"""

from __future__ import annotations

import builtins
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

from bson import Binary
from pymongo import ASCENDING, DESCENDING, IndexModel, ReturnDocument
from pymongo.asynchronous.collection import AsyncCollection
from pymongo.errors import ExecutionTimeout

from mesh.mongo import Document, translated
from mesh.mongo_clock import Clock
from mesh.process.tasks import uninterrupted
from mesh.rpc.tenant_scope import EVERY_TENANT, TenantScope
from mesh.rpc.tenant_turns import WAIT_S, TenantTurns
from services.ingest.job import State
from services.ingest.operations.operation import Action, Operation, OperationState, Selection
from services.ingest.queries.filters import JobFilter
from shoal.errors import NotFound, ResourceExhausted

JOB_OPERATIONS = "job_operations"
KEEP = timedelta(days=7)
"""Time for which ended operations are kept."""
KEPT = 100
"""Ended operations of one tenant that are kept."""
RUNNING_TOGETHER = 64
"""Operations that run, of all tenants: the leader carries out a page of each in turn."""
RUNNING_OF_TENANT = 8
"""Operations of one tenant that run."""
COUNTED = 1_000_000
"""Jobs that a preview counts, for COUNT_MS at most: MongoDB reads each document where no index has the filter."""
COUNT_MS = 5_000
COUNTS_AT_ONCE = 4
"""Counts that run at a time: each has a core of MongoDB for itself meanwhile."""
CALLS_AT_ONCE = 6
"""Other calls of clients that one instance serves at a time."""
LISTED = 1_000

INDEXES = (
    IndexModel(
        [("tenant", ASCENDING), ("_id", ASCENDING)],
        name="running",
        partialFilterExpression={"state": str(OperationState.RUNNING)},
    ),
    IndexModel([("tenant", ASCENDING), ("_id", DESCENDING)], name="by_tenant"),
    IndexModel([("ended_at", ASCENDING)], name="ended", expireAfterSeconds=int(KEEP.total_seconds())),
)
VALIDATOR: Mapping[str, Any] = {
    "$jsonSchema": {
        "bsonType": "object",
        "required": ["_id", "tenant", "action", "state", "selection", "position", "started_at"],
        "properties": {
            "_id": {"bsonType": "string"},
            "tenant": {"bsonType": "string"},
            "action": {"enum": [*map(str, Action)]},
            "state": {"enum": [*map(str, OperationState)]},
            "position": {"bsonType": "string"},
            "started_at": {"bsonType": "date"},
        },
    }
}
_RUNNING = {"state": str(OperationState.RUNNING)}


class OperationRepository:
    """Storage of operations."""

    def __init__(self, operations: AsyncCollection[Document], jobs: AsyncCollection[Document], clock: Clock) -> None:
        self._operations = operations
        self._jobs = jobs
        self._clock = clock
        self._count_turns = TenantTurns(COUNTS_AT_ONCE, leaves_room=True, wait_s=WAIT_S)
        self._call_turns = TenantTurns(CALLS_AT_ONCE, leaves_room=True, wait_s=WAIT_S)
        # One at a time: between the count of those that run and its insert, no other may start.
        self._start_turns = TenantTurns(1, wait_s=WAIT_S)

    def now(self) -> datetime:
        """Return the current time."""
        return self._clock()

    async def count(self, selection: Selection, now: datetime) -> tuple[int, bool]:
        """Return the number of selected jobs, and True when there may be more.

        Raises:
            Unavailable: MongoDB is unavailable, or too many counts wait.
        """
        with translated("counting jobs"):
            async with self._count_turns.take(selection.matching.tenant):
                # MongoDB counts on when a client has left.
                counting = self._jobs.count_documents(selection.query(now), limit=COUNTED, maxTimeMS=COUNT_MS)
                try:
                    found = await uninterrupted(counting)
                except ExecutionTimeout:
                    return 0, True
        return found, found == COUNTED

    async def start(self, operation: Operation) -> None:
        """Store an operation that runs, and remove the oldest ended ones of its tenant.

        Raises:
            ResourceExhausted: too many operations run. Unavailable: MongoDB is unavailable.
        """
        with translated("starting an operation"):
            async with self._start_turns.take(operation.tenant):
                await uninterrupted(self._start(operation))

    async def _start(self, operation: Operation) -> None:
        for field, most, whose in (
            ({"tenant": operation.tenant}, RUNNING_OF_TENANT, "of this tenant "),
            ({}, RUNNING_TOGETHER, ""),
        ):
            if await self._operations.count_documents({**_RUNNING, **field}, limit=most) >= most:
                raise ResourceExhausted(
                    f"{most} operations {whose}run already, which is the limit: wait for one, or abort one"
                )
        await self._operations.insert_one(_document_of(operation))
        ended = {"tenant": operation.tenant, "ended_at": {"$exists": True}}
        old = self._operations.find(ended, {"_id": 1}).sort("_id", DESCENDING).skip(KEPT)
        if ids := [document["_id"] async for document in old]:
            await self._operations.delete_many({"_id": {"$in": ids}})

    async def get(self, operation_id: str, scope: TenantScope = EVERY_TENANT) -> Operation:
        """Return an operation of the scope.

        Raises:
            NotFound: no such operation. Unavailable: MongoDB is unavailable.
        """
        with translated("reading an operation"):
            async with self._call_turns.take(scope.tenant or ""):
                found = self._operations.find_one({"_id": operation_id, **scope.condition})
                document = await uninterrupted(found)
        return _operation_of(_found(document, operation_id))

    async def list(self, tenant: str) -> list[Operation]:
        """Return the operations of a tenant (empty: of all), newest first.

        Raises:
            Unavailable: MongoDB is unavailable.
        """
        with translated("listing operations"):
            cursor = self._operations.find({"tenant": tenant} if tenant else {}).sort("_id", DESCENDING).limit(LISTED)
            async with self._call_turns.take(tenant):
                return [_operation_of(document) for document in await uninterrupted(cursor.to_list())]

    async def abort(self, operation_id: str, scope: TenantScope = EVERY_TENANT) -> Operation:
        """End an operation of the scope that runs; return it. One that has ended does not change.

        Raises:
            NotFound: no such operation. Unavailable: MongoDB is unavailable.
        """
        with translated("aborting an operation"):
            async with self._call_turns.take(scope.tenant or ""):
                ending = self._operations.find_one_and_update(
                    {"_id": operation_id, **scope.condition, **_RUNNING},
                    {"$set": _ended(OperationState.ABORTED, self._clock())},
                    return_document=ReturnDocument.AFTER,
                )
                document = await uninterrupted(ending)
        return await self.get(operation_id, scope) if document is None else _operation_of(document)

    async def running(self) -> builtins.list[Operation]:
        """Return the operations that run, oldest first.

        Raises:
            Unavailable: MongoDB is unavailable.
        """
        with translated("reading the operations that run"):
            return [_operation_of(document) async for document in self._operations.find(_RUNNING).sort("_id", 1)]

    async def advance(self, operation: Operation, position: str, changed: int, skipped: int, *, ends: bool) -> None:
        """Record a page of an operation. A page that another leader has recorded is not recorded again.

        Raises:
            Unavailable: MongoDB is unavailable.
        """
        now = self._clock()
        fields: Document = {"position": position, "updated_at": now}
        with translated("recording the progress of an operation"):
            progress: Document = {"$set": fields, "$inc": {"changed": changed, "skipped": skipped}}
            await self._operations.update_one({"_id": operation.id, "position": operation.position}, progress)
            if ends:
                end = {"$set": _ended(OperationState.SUCCEEDED, now)}
                await self._operations.update_one({"_id": operation.id, "position": position, **_RUNNING}, end)


def _ended(state: OperationState, now: datetime) -> Document:
    return {"state": str(state), "updated_at": now, "ended_at": now}


def _found(document: Document | None, operation_id: str) -> Document:
    if document is None:
        raise NotFound(f"there is no operation {operation_id[:64]!r}: ended ones are kept for {KEEP.days} days")
    return document


def _document_of(operation: Operation) -> Document:
    chosen = operation.selection
    return {
        "_id": operation.id,
        "tenant": operation.tenant,
        "action": str(operation.action),
        "state": str(operation.state),
        "selection": {
            "states": sorted(map(str, chosen.matching.states)),
            "model_name": chosen.matching.model_name,
            "labels": [list(pair) for pair in chosen.matching.labels],
            "code": chosen.code,
            "updated_before": chosen.updated_before,
        },
        "reason": operation.reason,
        "caller": Binary(operation.caller),
        "started_at": operation.started_at,
        "updated_at": operation.updated_at,
        "position": operation.position,
        "matched": operation.matched,
        "matched_at_least": operation.matched_at_least,
        "changed": operation.changed,
        "skipped": operation.skipped,
    }


def _operation_of(document: Mapping[str, Any]) -> Operation:
    chosen = document["selection"]
    matching = JobFilter(
        states=frozenset(map(State, chosen["states"])),
        model_name=chosen["model_name"],
        tenant=document["tenant"],
        labels=tuple((key, value) for key, value in chosen["labels"]),
    )
    return Operation(
        id=document["_id"],
        tenant=document["tenant"],
        action=Action(document["action"]),
        selection=Selection(matching, chosen["code"], chosen["updated_before"]),
        reason=document["reason"],
        caller=bytes(document["caller"]),
        started_at=document["started_at"],
        updated_at=document["updated_at"],
        state=OperationState(document["state"]),
        position=document["position"],
        matched=document["matched"],
        matched_at_least=document["matched_at_least"],
        changed=document["changed"],
        skipped=document["skipped"],
    )
