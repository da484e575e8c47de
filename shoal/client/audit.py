"""`client.audit`: the node's audit log."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from shoal.client.transport import methods
from shoal.client.transport.calls import Caller
from shoal.store.v1 import store_pb2 as store

READ_S = 24 * 3_600.0
"""Timeout of a read or a verification of the whole log."""


@dataclass(frozen=True)
class AuditEntry:
    """One entry: who did what, or was refused. Empty texts are unknown."""

    id: str
    """Name of the chain, `/`, and the number of the entry in it."""
    at: datetime
    kind: str
    """`act` (an administrative act, before it is done), `outcome` (its end), `refusal`, `read`, `sign-in` (the first
    call of a key or token from an address) or `chain`."""
    tenant: str
    subject: str
    key: str
    """Id of the caller's key or token."""
    role: str
    address: str
    rpc: str
    """Path of the RPC: /package.Service/Method."""
    target: str
    """Model, job, tenant or key that the act is about; of an outcome, what was made."""
    code: int
    """gRPC status code of an outcome or a refusal."""
    reason: str
    """Rule that decided, or message of the error; of an act on keys or policy, what it asks for."""
    count: int
    """Equal events within one second that the entry stands for."""
    trace_id: str
    origin: str
    """Instance that reported the event."""
    of: str
    """For an outcome: id of the act's entry."""
    hash: str


@dataclass(frozen=True)
class AuditProblem:
    """Thing that is not as it was written."""

    where: str
    """Id of an entry, name of a chain, or `anchor N`."""
    message: str


@dataclass(frozen=True)
class AuditVerified:
    """Progress of a verification."""

    entries: int
    anchors: int
    problems: tuple[AuditProblem, ...]
    """Problems found since the last step."""
    complete: bool
    """True in the last step only."""


class AsyncAudit:
    """`client.audit`: read and verify the audit log."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    async def list(
        self,
        *,
        kinds: Sequence[str] = (),
        tenant: str = "",
        subject: str = "",
        since: datetime | None = None,
        until: datetime | None = None,
        newest_first: bool = False,
        limit: int = 0,
        timeout: float | None = READ_S,
    ) -> AsyncGenerator[AuditEntry, None]:
        """Yield the entries that match, in the order of their times.

        Args:
            since, until: from this time on, and before that time.
            limit: most entries to yield; 0: all.

        Raises:
            InvalidArgument: a kind is unknown.
            DataLoss: a document of the log is no entry: `verify` names it.
            Unavailable: MongoDB is unavailable, or the stream broke: start again.
        """
        request = store.StreamAuditRequest(
            kinds=kinds, tenant=tenant, subject=subject, newest_first=newest_first, limit=limit
        )
        if since is not None:
            request.since.FromDatetime(since)
        if until is not None:
            request.until.FromDatetime(until)
        pages = self._caller.stream(methods.STREAM_AUDIT, request, timeout_s=timeout, doing="read the audit log")
        async for page in pages:
            for message in page.entries:
                yield _entry(message)

    async def verify(self, *, timeout: float | None = READ_S) -> AsyncGenerator[AuditVerified, None]:
        """Verify every entry and anchor, and yield the progress. Without a `complete` step, not all was verified.

        Raises:
            Unavailable: MongoDB or the blobs are unavailable, or the stream broke: start again.
        """
        steps = self._caller.stream(
            methods.VERIFY_AUDIT, store.VerifyAuditRequest(), timeout_s=timeout, doing="verify the audit log"
        )
        async for step in steps:
            problems = tuple(AuditProblem(one.where, one.message) for one in step.problems)
            yield AuditVerified(step.entries, step.anchors, problems, step.complete)


def _entry(message: store.AuditEntry) -> AuditEntry:
    event = message.event
    fields = {field.name: getattr(event, field.name) for field in event.DESCRIPTOR.fields if field.name in _FIELDS}
    return AuditEntry(id=message.id, at=message.at.ToDatetime(tzinfo=UTC), hash=message.hash, **fields)


_FIELDS = frozenset(AuditEntry.__dataclass_fields__) - {"id", "at", "hash"}
