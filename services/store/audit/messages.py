"""Translation of the audit log's messages."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from services.store.audit.chain import AuditChain
from services.store.audit.entries import Entry
from services.store.audit.reading import AuditFilter, read
from services.store.audit.verification import AuditVerification
from services.store.documents import Collections
from shoal.access.audit import EVENT_FIELDS, Event
from shoal.errors import InvalidArgument
from shoal.store.v1 import store_pb2 as pb

MAX_EVENTS = 500
"""Events of one RecordAudit."""


async def record(chain: AuditChain, request: pb.RecordAuditRequest) -> pb.RecordAuditResponse:
    """Write the events of a request. Raises as `AuditChain.record` does, and InvalidArgument for too many events."""
    if not 1 <= len(request.events) <= MAX_EVENTS:
        raise InvalidArgument(f"events: expected 1 to {MAX_EVENTS} of them, got {len(request.events)}")
    return pb.RecordAuditResponse(ids=await chain.record([_event(message) for message in request.events]))


async def stream(
    collections: Collections, request: pb.StreamAuditRequest
) -> AsyncGenerator[pb.StreamAuditResponse, None]:
    """Yield the entries that a request asks for. Raises as `reading.read` does."""
    wanted = AuditFilter(
        kinds=tuple(request.kinds),
        tenant=request.tenant,
        subject=request.subject,
        since=_time(request, "since"),
        until=_time(request, "until"),
        newest_first=request.newest_first,
        limit=request.limit,
    )
    async for entries in read(collections, wanted):
        yield pb.StreamAuditResponse(entries=map(_entry, entries))


async def verify(verification: AuditVerification) -> AsyncGenerator[pb.VerifyAuditResponse, None]:
    """Yield the progress of a verification, and its problems."""
    entries = anchors = 0
    async for checked in verification.verify():
        entries += checked.entries
        anchors += checked.anchors
        problems = [pb.VerifyAuditResponse.Problem(**asdict(problem)) for problem in checked.problems]
        yield pb.VerifyAuditResponse(entries=entries, anchors=anchors, problems=problems)
    yield pb.VerifyAuditResponse(entries=entries, anchors=anchors, complete=True)


def _event(message: pb.AuditEvent) -> Event:
    event = Event(**{name: getattr(message, name) for name in EVENT_FIELDS})
    return replace(event, count=event.count or 1)


def _entry(entry: Entry) -> pb.AuditEntry:
    at = Timestamp()
    at.FromMilliseconds(entry.at_ms)
    fields: dict[str, Any] = asdict(entry.event)
    return pb.AuditEntry(id=entry.id, at=at, event=pb.AuditEvent(**fields), hash=entry.hash)


def _time(request: pb.StreamAuditRequest, field: str) -> datetime | None:
    if not request.HasField(field):
        return None
    try:
        found: datetime = getattr(request, field).ToDatetime(UTC)
    except (ValueError, OverflowError) as err:
        raise InvalidArgument(f"{field}: not a time: {err}") from err
    return found
