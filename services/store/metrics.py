"""Metrics of the store: results, retention, and the audit log."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from mesh.metrics.families import Family, Kind, Reading
from mesh.mongo import Document
from mesh.mongo_clock import DatabaseClock
from mesh.mongo_lease import LeaderLease
from mesh.removal_guard import RemovalGuard
from services.store.artifact_rpc import ArtifactRpc
from services.store.audit.chain import AuditChain
from services.store.replica_set import ReplicaSet
from services.store.retention.sweep import Sweep
from services.store.usage.totals import UsageTotals

C, G = Kind.COUNTER, Kind.GAUGE
RECORDED = Family("shoal.store.results.recorded", C, "{result}", "Results that the instance has recorded.")
REMOVED = Family("shoal.store.retention.removed", C, "{document}", "Results and answers removed by retention.")
LEADS = Family("shoal.store.leader", G, "", "1: the instance leads the store: retention and anchors run there.")
AUDITED = Family("shoal.store.audit.written", C, "{entry}", "Entries of the audit log that were written.")
AUDIT_FAILED = Family(
    "shoal.store.audit.failed", C, "{entry}", "Entries that could not be written; acts among them were refused."
)
AUDIT_WAITING = Family("shoal.store.audit.waiting", G, "{entry}", "Entries that wait to be written.")
BLOBS_READ = Family("shoal.store.artifacts.read", C, "By", "Bytes of artifacts that were sent to clients.")
BLOBS_WRITTEN = Family("shoal.store.artifacts.stored", C, "By", "Bytes of artifacts that were stored, as new ones.")
KEPT = Family(
    "shoal.store.kept",
    G,
    "{document}",
    "Results and payloads of jobs that the store keeps, of all tenants and instances.",
    ("kind",),
)
KEPT_SIZE = Family(
    "shoal.store.kept.size",
    G,
    "By",
    "Bytes of results and payloads of jobs that the store keeps, of all tenants and instances.",
    ("kind",),
)
TENANT_SIZE = Family(
    "shoal.store.tenant.size", G, "By", "Bytes of results and payloads of the 20 tenants with the most.", ("tenant",)
)
MONGO_TRIP = Family("shoal.store.mongo.round_trip", G, "s", "Time of the last small read of MongoDB's primary.")
CLOCK_AHEAD = Family(
    "shoal.store.mongo.clock_ahead", G, "s", "Time by which this machine's clock is ahead of MongoDB's, which is used."
)
MEMBER_UP = Family("shoal.store.mongo.member_up", G, "", "1: the member of MongoDB's set answers.", ("member",))
OPLOG_WINDOW = Family("shoal.store.mongo.oplog_window", G, "s", "Time that MongoDB's oplog reaches back; -1: unknown.")
OPLOG_USED = Family("shoal.store.mongo.oplog_used", G, "", "Share of the oplog's size in use; from 1 on, it is cut.")
STOPPED = Family(
    "shoal.store.retention.stopped", G, "", "1: results past their retention stay until the clock is confirmed."
)
FAMILIES = (
    *(BLOBS_READ, BLOBS_WRITTEN, MONGO_TRIP, RECORDED, REMOVED, LEADS, AUDITED, AUDIT_FAILED, AUDIT_WAITING),
    *(KEPT, KEPT_SIZE, TENANT_SIZE),
    *(CLOCK_AHEAD, MEMBER_UP, OPLOG_WINDOW, OPLOG_USED, STOPPED),
)


class RecordedCount:
    """Count of recorded results, on their way to the counters of usage."""

    def __init__(self, then: Callable[[Iterable[Document], Collection[str]], None]) -> None:
        self._then = then
        self.count = 0

    def __call__(self, docs: Iterable[Document], replacing: Collection[str] = ()) -> None:
        recorded = list(docs)
        self.count += len(recorded)
        self._then(recorded, replacing)


class StoreMetrics:
    """Readings of one instance."""

    def __init__(
        self,
        recorded: RecordedCount,
        sweep: Sweep,
        lease: LeaderLease,
        chain: AuditChain,
        artifacts: ArtifactRpc,
        clock: DatabaseClock,
        guard: RemovalGuard,
        replica_set: ReplicaSet,
        totals: UsageTotals,
    ) -> None:
        self._totals = totals
        self._guard = guard
        self._replica_set = replica_set
        self._artifacts = artifacts
        self._clock = clock
        self._recorded = recorded
        self._sweep = sweep
        self._lease = lease
        self._chain = chain

    def read(self) -> Iterable[Reading]:
        yield BLOBS_READ, (), self._artifacts.read_bytes
        yield BLOBS_WRITTEN, (), self._artifacts.stored_bytes
        yield MONGO_TRIP, (), self._clock.round_trip_s
        if sums := self._totals.sums:
            yield KEPT, ("results",), sums["results"]
            yield KEPT, ("payloads",), sums["payloads"]
            yield KEPT_SIZE, ("results",), sums["bytes"] - sums["payload_bytes"]
            yield KEPT_SIZE, ("payloads",), sums["payload_bytes"]
        for tenant, size in self._totals.largest.items():
            yield TENANT_SIZE, (tenant,), size
        yield RECORDED, (), self._recorded.count
        yield REMOVED, (), self._sweep.removed
        yield LEADS, (), int(self._lease.is_held)
        yield AUDITED, (), self._chain.written
        yield AUDIT_FAILED, (), self._chain.failed
        yield AUDIT_WAITING, (), self._chain.waiting_count
        yield CLOCK_AHEAD, (), self._clock.ahead_s
        for member, is_up in sorted(self._replica_set.members.items()):
            yield MEMBER_UP, (member,), int(is_up)
        yield OPLOG_WINDOW, (), self._replica_set.oplog_window_s
        yield OPLOG_USED, (), self._replica_set.oplog_used
        # An instance that does not lead removes nothing, and its last check may be old.
        yield STOPPED, (), int(self._guard.is_stopped and self._lease.is_held)
