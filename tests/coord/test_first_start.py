"""The policy that a cluster begins with: from etcd, its history, or the copies of its nodes. etcd is in memory."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mesh.cluster.etcd import Created, Delete, Entry, Listing, Modified, Outcome, Put
from mesh.cluster.mirror import Copy
from mesh.process.watched import Watched
from services.coord.access_rpc import AccessParts
from services.coord.enforcement import Enforcement
from services.coord.first_start import FirstStart
from services.coord.policies import FIRST, Applied, Policies
from services.coord.policy_copy import PolicyCopy, Saved
from shoal.access import cluster
from shoal.errors import Aborted, FailedPrecondition, InvalidArgument
from tests.breakable import until

CLOSED = FIRST + "  # closed\n"


class Store:
    """An etcd in memory, and a mirror of it that is never behind."""

    def __init__(self) -> None:
        self.seen = Watched(Copy(revision=50, stale=False))
        self.faster: Applied | None = None
        """Copy with which another coord restores the policy, a moment before the next transaction."""

    @property
    def copy(self) -> Copy:
        return self.seen.value

    def follow(self) -> AsyncIterator[Copy]:
        return self.seen.follow()

    async def get(self, key: bytes) -> Entry | None:
        return self.copy.entries.get(key)

    async def list(self, prefix: bytes) -> Listing:
        found = sorted(key for key in self.copy.entries if key.startswith(prefix))
        return Listing(tuple(self.copy.entries[key] for key in found), self.copy.revision)

    async def transact(self, when: list[Created | Modified], then: list[Put | Delete]) -> Outcome:
        faster, self.faster = self.faster, None
        if faster is not None:
            await self.policies(now=90).begin(faster)
        entries, revision = dict(self.copy.entries), self.copy.revision + 1
        for one in when:
            found = entries.get(one.key)
            is_wanted = found is None if isinstance(one, Created) else found is not None
            if not is_wanted or (
                isinstance(one, Modified) and found is not None and found.mod_revision != one.revision
            ):
                return Outcome(False, self.copy.revision)
        for change in then:
            if isinstance(change, Put):
                entries[change.key] = Entry(change.key, change.value, revision, revision, 0)
            else:
                entries.pop(change.key, None)
        self.seen.set(Copy(entries, revision, stale=False))
        return Outcome(True, revision)

    @property
    def version(self) -> int:
        return cluster.version_of({key: entry.value for key, entry in self.copy.entries.items()})

    async def document(self) -> str:
        return (await self.policies().get()).document

    def policies(self, now: float = 100.0) -> Policies:
        etcd: Any = self
        return Policies(etcd, etcd, Enforcement(etcd), lambda: now)

    def start(self, copy: PolicyCopy | None) -> FirstStart:
        mirror: Any = self
        keys: Any = Keys()
        return FirstStart(AccessParts(self.policies(), keys), mirror, copy)


class Keys:
    """The signer and the revoked keys, which are not looked at."""

    trouble = ""

    async def begin(self, revoked: Mapping[str, float]) -> None:
        pass


def saved(version: int, document: str = CLOSED, by: str = "eve") -> Applied:
    return Applied(version, float(version), by, document=document, files={})


async def test_a_stop_asks_etcd_for_nothing_more() -> None:
    class Waiting(Keys):
        async def begin(self, revoked: Mapping[str, float]) -> None:
            begun.set()
            await asyncio.Event().wait()

    begun, store = asyncio.Event(), Store()
    keys: Any = Waiting()
    mirror: Any = store
    async with FirstStart(AccessParts(store.policies(), keys), mirror):
        await begun.wait()
    assert store.copy.entries == {}


async def test_a_copy_does_not_follow_a_policy_with_which_another_coord_has_begun_anew(tmp_path: Path) -> None:
    copy, store = PolicyCopy(tmp_path / "policy.json"), Store()
    copy.write(Saved(saved(4), {}))
    async with store.start(copy):

        def is_kept(version: int) -> bool:
            found = copy.read()
            return store.version == version and found is not None and found.applied.version == version

        await until(lambda: is_kept(5), "the policy is restored")
        # etcd is emptied, and this coord sees it only after another one has made the first policy.
        emptied = Store()
        await emptied.policies().begin()
        store.seen.set(replace(emptied.copy, revision=2))
        await until(lambda: is_kept(6), "the first policy is replaced")
        assert await store.document() == CLOSED


async def test_the_policy_of_an_older_copy_is_replaced_by_a_later_one_until_somebody_applies_another() -> None:
    store = Store()
    await store.policies(now=50).begin(saved(4, FIRST))
    assert (store.version, await store.document()) == (5, FIRST)
    # The node with the older copy starts again: nothing changes.
    for same in (saved(4, FIRST), await store.policies().get()):
        await store.policies(now=60).begin(same)
        assert store.version == 5
    await store.policies(now=70).begin(saved(7))
    assert (store.version, await store.document()) == (8, CLOSED)
    await store.policies(now=80).begin(saved(4, FIRST))
    assert store.version == 8
    await store.policies().apply(FIRST, {}, None, [], force=True)
    await store.policies(now=90).begin(saved(20))
    assert (store.version, await store.document()) == (9, FIRST)


async def test_a_later_copy_is_restored_over_an_older_one_with_which_another_coord_was_faster(tmp_path: Path) -> None:
    copy, store = PolicyCopy(tmp_path / "policy.json"), Store()
    copy.write(Saved(saved(7), {}))
    store.faster = saved(4, FIRST)
    async with store.start(copy):
        await until(lambda: store.version == 8, "the later copy is restored")
    assert await store.document() == CLOSED
    assert [one.rolled_back_to for one in await store.policies().history()] == [7, 4]


async def test_a_policy_in_place_of_a_lost_one_is_not_said_to_be_applied_when_a_coord_has_restored_that() -> None:
    store = Store()
    store.faster = saved(4)
    with pytest.raises(Aborted, match="another policy was applied meanwhile"):
        await store.policies().apply(FIRST, {}, None, [], force=True)
    assert (store.version, await store.document()) == (5, CLOSED)
    assert (await store.policies().apply(FIRST, {}, None, [], force=True))[0].version == 6


async def test_a_first_version_that_somebody_has_applied_is_restored_over_the_first_policy() -> None:
    store = Store()
    await store.policies().begin()
    await store.policies().begin(saved(1, FIRST, by="the first start"))
    assert (store.version, await store.document()) == (1, FIRST)
    await store.policies().begin(saved(1, by="the node's user"))
    assert (store.version, await store.document()) == (2, CLOSED)


async def test_a_policy_in_place_of_a_lost_one_continues_the_history() -> None:
    store = Store()
    await store.policies().begin(saved(4))
    await store.transact([], [Delete(cluster.POLICY)])
    await store.policies().apply(FIRST, {}, None, [], force=True)
    assert [one.version for one in await store.policies().history()] == [6, 5]
    assert store.version == 6


async def test_a_lost_policy_with_a_name_that_a_new_one_may_not_have_is_restored() -> None:
    store, long = Store(), FIRST.replace("tenants: [local]", f"tenants: [local, {'a' * 65}]")
    with pytest.raises(InvalidArgument, match="a tenant has at most 64 characters"):
        await store.policies().apply(long, {}, None, [])
    await store.policies().begin(saved(4, long))
    assert await store.document() == long


async def test_a_copy_that_cannot_be_read_is_made_anew_from_a_policy_that_was_applied(tmp_path: Path) -> None:
    copy, store = PolicyCopy(tmp_path / "policy.json"), Store()
    await store.policies().begin(saved(4))
    copy.path.write_text('{"applied": {}}')
    async with store.start(copy):
        await until(lambda: '"version": 5' in copy.path.read_text(), "the copy is made anew")


async def test_a_copy_that_cannot_be_read_is_not_replaced_by_the_first_policy(tmp_path: Path) -> None:
    copy, store = PolicyCopy(tmp_path / "policy.json"), Store()
    await store.policies().begin()
    copy.path.write_text('{"applied": {}}')
    with pytest.raises(FailedPrecondition, match="cannot be read"):
        await store.start(copy)._begin()
    assert copy.path.read_text() == '{"applied": {}}'


@pytest.mark.parametrize(
    "wrong",
    [
        {"version": "five"},
        {"document": None},
        {"files": ["keys.json"]},
        {"files": {"keys.json": 1}},
        {"applied_at": []},
    ],
)
def test_a_copy_that_was_mended_wrongly_is_said_to_be_no_copy(tmp_path: Path, wrong: dict[str, Any]) -> None:
    copy = PolicyCopy(tmp_path / "policy.json")
    copy.write(Saved(saved(4), {"stolen": 5.0}))
    assert copy.read() == Saved(saved(4), {"stolen": 5.0})
    text = json.loads(copy.path.read_text())
    copy.path.write_text(json.dumps({**text, "applied": {**text["applied"], **wrong}}))
    with pytest.raises(FailedPrecondition, match="cannot be read"):
        copy.read()
    copy.path.write_text(json.dumps({**text, "revoked": None}))
    with pytest.raises(FailedPrecondition, match="cannot be read"):
        copy.read()
