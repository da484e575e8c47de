"""An audit log over a real MongoDB and a folder of blobs, with a clock that moves when it is told to."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import timedelta

import pytest

from services.store.audit.anchors import Anchors
from services.store.audit.chain import AuditChain
from services.store.audit.rounds import AuditRounds
from services.store.audit.verification import AuditVerification, Problem
from shoal.access.audit import Event
from tests.store.garbage.conftest import Parts, parts, threads

__all__ = ["parts", "threads"]

KEEP = timedelta(days=30)


def act(number: int, **fields: object) -> Event:
    return Event(**{"kind": "act", "subject": "ann", "rpc": "/s/SetQuota", "target": f"tenant-{number}", **fields})


@dataclass
class Audit:
    parts: Parts
    chain: AuditChain
    anchors: Anchors
    rounds: AuditRounds
    verification: AuditVerification

    @property
    def entries(self) -> object:
        return self.parts.collections.audit

    async def record(self, count: int) -> None:
        for number in range(count):
            await self.chain.record([act(number)])

    async def problems(self) -> list[Problem]:
        return [problem async for checked in self.verification.verify() for problem in checked.problems]

    async def counts(self) -> tuple[int, int]:
        """Entries and anchors that verification has seen."""
        checked = [one async for one in self.verification.verify()]
        return sum(one.entries for one in checked), sum(one.anchors for one in checked)

    def id(self, number: int) -> str:
        return f"{self.chain.writer}/{number:012d}"


def audit_of(parts: Parts, instance: str = "store-0") -> Audit:
    chain = AuditChain(parts.collections, parts.clock, instance)
    anchors = Anchors(parts.collections, parts.blobs, parts.clock)
    # The tests call the rounds, and no lease is asked.
    rounds = AuditRounds(parts.collections, anchors, None, parts.clock, every_s=300, keep=KEEP)
    return Audit(parts, chain, anchors, rounds, AuditVerification(parts.collections, anchors, chain))


@pytest.fixture
async def audit(parts: Parts) -> AsyncIterator[Audit]:
    one = audit_of(parts)
    async with one.chain:
        yield one
