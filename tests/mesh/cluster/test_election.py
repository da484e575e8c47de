"""Elections over a real etcd: one leader at a time, by its own clock too; a successor within seconds of a kill."""

from __future__ import annotations

import sys
import uuid
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from mesh.cluster import election
from mesh.cluster.election import Election, Leader, leader_of, predecessor
from mesh.cluster.etcd import Entry, Etcd, LeaseLost, Put
from mesh.cluster.mirror import Copy, Mirror
from tests.breakable import EtcdProcess, Process, until

pytestmark = pytest.mark.etcd

CANDIDATE = """
import asyncio, sys
from mesh.cluster.election import Election
from mesh.cluster.etcd import Etcd

async def main():
    async with Etcd(sys.argv[1]) as etcd, Election(etcd, sys.argv[2].encode(), sys.argv[3]):
        await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.fixture
def prefix() -> bytes:
    return f"/test/{uuid.uuid4().hex}/".encode()


@pytest.fixture
def long_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    """No term of this process ends by itself, even if it stands still for seconds."""
    monkeypatch.setattr(election, "TTL_S", 600)


def entry(key: bytes, created: int, value: bytes = b"") -> Entry:
    return Entry(key, value, created, created + 100, 1)


def test_each_waits_for_the_one_before():
    queue = (entry(b"c", 5), entry(b"a", 9), entry(b"b", 7))
    assert predecessor(queue, b"c") is None
    assert predecessor(queue, b"b") == queue[0]
    assert predecessor(queue, b"a") == queue[2]
    with pytest.raises(LeaseLost):
        predecessor(queue, b"d")


def test_the_leader_is_the_readable_candidate_that_came_first():
    entries = [
        entry(b"x", 1, b"junk"),
        entry(b"z", 4, b'{"name": "local/coord-1", "since": 2}'),
        entry(b"y", 3, b'{"name": "local/coord-0", "since": 1}'),
    ]
    assert leader_of(Copy({e.key: e for e in entries})) == Leader("local/coord-0", 3, 1.0)
    assert leader_of(Copy()) is None


async def test_one_leads_and_the_next_takes_over_when_it_resigns(etcd_address, prefix, long_leases):
    async with Etcd(etcd_address) as etcd, Mirror(etcd, prefix) as mirror, AsyncExitStack() as first:
        a = await first.enter_async_context(Election(etcd, prefix, "a"))
        await until(lambda: a.is_leader)
        async with Election(etcd, prefix, "b") as b:
            await until(lambda: len(mirror.copy.entries) == 2)
            assert not b.is_leader
            assert leader_of(mirror.copy).name == "a"
            term = a.term
            await first.aclose()
            assert not term.is_current()
            await until(lambda: b.is_leader)
            assert b.term.token > term.token
            await until(lambda: leader_of(mirror.copy) is not None and leader_of(mirror.copy).name == "b")
            assert leader_of(mirror.copy).token == b.term.token


async def test_what_only_the_leader_may_do_fails_once_its_term_is_over(etcd_address, prefix, long_leases):
    async with Etcd(etcd_address) as etcd:
        async with Election(etcd, prefix, "a") as a:
            await until(lambda: a.is_leader)
            fence = a.term.fence
            assert (await etcd.transact([fence], [Put(prefix + b"act", b"1")])).succeeded
        assert not (await etcd.transact([fence], [Put(prefix + b"act", b"2")])).succeeded


async def test_a_successor_leads_soon_after_the_leader_is_killed(etcd_address, prefix, long_leases, tmp_path: Path):
    leader = Process([sys.executable, "-c", CANDIDATE, etcd_address, prefix.decode(), "doomed"], tmp_path / "log")
    async with Etcd(etcd_address) as etcd, Mirror(etcd, prefix) as mirror:
        with leader:
            await until(lambda: (found := leader_of(mirror.copy)) is not None and found.name == "doomed")
            async with Election(etcd, prefix, "heir") as heir:
                await until(lambda: len(mirror.copy.entries) == 2)
                old = leader_of(mirror.copy)
                leader.kill()
                await until(lambda: heir.is_leader, "succession")
                assert heir.term.token > old.token


async def test_a_frozen_leader_knows_that_it_leads_no_more(etcd_address, prefix, long_leases, tmp_path: Path):
    """Frozen past its lease, it is succeeded; awake again, it stands in line."""
    frozen = Process([sys.executable, "-c", CANDIDATE, etcd_address, prefix.decode(), "frozen"], tmp_path / "log")
    async with Etcd(etcd_address) as etcd, Mirror(etcd, prefix) as mirror:
        with frozen:
            await until(lambda: (found := leader_of(mirror.copy)) is not None and found.name == "frozen")
            async with Election(etcd, prefix, "heir") as heir:
                frozen.freeze()
                await until(lambda: heir.is_leader, "succession")
                frozen.thaw()
                await until(lambda: len(mirror.copy.entries) == 2, "a new candidacy")
                assert heir.is_leader
                assert leader_of(mirror.copy).name == "heir"


@pytest.mark.parametrize("outage", ["frozen", "killed"])
async def test_a_leader_without_etcd_steps_down_by_its_own_clock_and_leads_again_later(tmp_path, prefix, outage):
    with EtcdProcess(tmp_path) as own:
        await own.until_ready()
        async with Etcd(own.address, timeout_s=0.5) as etcd, Election(etcd, prefix, "a") as a:
            await until(lambda: a.is_leader)
            term = a.term
            own.freeze() if outage == "frozen" else own.kill()
            await until(lambda: not a.is_leader, "stepping down")
            assert not term.is_current()
            own.thaw() if outage == "frozen" else own.start()
            await until(lambda: a.is_leader, "leading again")
            assert a.term.token > term.token


async def test_a_leader_whose_key_was_deleted_stands_again(etcd_address, prefix, long_leases):
    async with Etcd(etcd_address) as etcd, Election(etcd, prefix, "a") as a:
        await until(lambda: a.is_leader)
        term = a.term
        await etcd.delete(term.key)
        await until(lambda: a.term is not None and a.term.token > term.token, "a new term")


async def test_each_own_term_is_announced(etcd_address, prefix, long_leases):
    async with Etcd(etcd_address) as etcd, Election(etcd, prefix, "a") as a:
        async for term in a.terms():
            assert term.is_current()
            assert term == a.term
            break
