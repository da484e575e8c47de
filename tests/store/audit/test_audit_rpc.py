"""RecordAudit, StreamAudit and VerifyAudit of a running store."""

from __future__ import annotations

import grpc
import pytest

from shoal.store.v1 import store_pb2 as pb
from tests.store.conftest import Store, on_shared_loop, refused, shared_store

__all__ = ["shared_store"]


def event(number: int, **fields: object) -> pb.AuditEvent:
    return pb.AuditEvent(**{"kind": "act", "subject": "ann", "target": f"model-{number}", **fields})


async def entries(store: Store, **wanted: object) -> list[pb.AuditEntry]:
    pages = [page async for page in store.stub.StreamAudit(pb.StreamAuditRequest(**wanted))]
    assert all(len(page.entries) <= 500 for page in pages)
    return [entry for page in pages for entry in page.entries]


@on_shared_loop
async def test_recorded_events_are_streamed_and_verified(shared_store: Store) -> None:
    events = [event(n, tenant="t-recorded", code=7, count=n) for n in range(500)]
    recorded = await shared_store.stub.RecordAudit(pb.RecordAuditRequest(events=events))
    await shared_store.stub.RecordAudit(pb.RecordAuditRequest(events=events))

    found = await entries(shared_store, tenant="t-recorded")
    assert [entry.id for entry in found[:500]] == list(recorded.ids)
    # A count of 0 is one event.
    assert [entry.event.count for entry in found[:3]] == [1, 1, 2]
    assert len(found) == 1_000
    newest = await entries(shared_store, tenant="t-recorded", newest_first=True, limit=2)
    assert newest == found[:-3:-1]
    steps = [step async for step in shared_store.stub.VerifyAudit(pb.VerifyAuditRequest())]
    assert steps[-1].complete
    assert steps[-1].entries >= 1_001
    assert not [problem for step in steps for problem in step.problems]


@on_shared_loop
async def test_bad_requests_are_refused_and_nothing_is_written(shared_store: Store) -> None:
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    stub, many = shared_store.stub, [event(1, tenant="t-bad")] * 501
    await refused(stub.RecordAudit(pb.RecordAuditRequest()), invalid, "events", "500")
    await refused(stub.RecordAudit(pb.RecordAuditRequest(events=many)), invalid, "events", "500")
    made_up = [event(1, tenant="t-bad"), event(2, tenant="t-bad", kind="chain")]
    await refused(stub.RecordAudit(pb.RecordAuditRequest(events=made_up)), invalid, "kind")
    await refused(stub.StreamAudit(pb.StreamAuditRequest(kinds=["acts"])), invalid, "kinds", "acts")
    await refused(stub.StreamAudit(pb.StreamAuditRequest(limit=-1)), invalid, "limit")
    nonsense = pb.StreamAuditRequest()
    nonsense.since.seconds = 1 << 60
    await refused(stub.StreamAudit(nonsense), invalid, "since")

    assert await entries(shared_store, tenant="t-bad") == []


@pytest.mark.parametrize("field", ["subject", "target", "reason", "trace_id"])
@on_shared_loop
async def test_long_texts_are_cut(shared_store: Store, field: str) -> None:
    tenant = f"t-long-{field}"
    await shared_store.stub.RecordAudit(
        pb.RecordAuditRequest(events=[event(1, **{"tenant": tenant, field: "x" * 100_000})])
    )

    (found,) = await entries(shared_store, tenant=tenant)
    assert len(getattr(found.event, field)) <= 512
    assert getattr(found.event, field).endswith("…")
