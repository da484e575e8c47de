"""A policy that etcd has lost: coord and etcd are real processes. The first policy never stands in its place."""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from mesh import keyring
from mesh.cluster.etcd import Delete, Etcd
from mesh.rpc.channel import connect
from shoal.access import cluster
from shoal.access.policy import Policy
from shoal.coord.v1 import access_pb2 as pb
from tests.breakable import EtcdProcess, until
from tests.coord.conftest import Coord
from tests.coord.test_coord_access import LAUNCHED, Access, document, refusal

CLOSED = document('[{name: only-health, models: ["*"], deny: [infer]}, {name: own, models: ["*"]}]')


class Place:
    """An etcd and the data folder of a node."""

    def __init__(self, folder: Path, etcd: EtcdProcess) -> None:
        self.folder = folder
        self.etcd = etcd
        self.copy = folder / "policy.json"
        self.new_master_key()

    def new_master_key(self) -> None:
        master = self.folder / "master.key"
        master.write_text(keyring.new_master())
        master.chmod(0o600)

    async def empty_etcd(self) -> None:
        """Restart etcd at the same address, without its data."""
        self.etcd.kill()
        shutil.rmtree(self.folder / "etcd")
        self.etcd.start()
        await self.etcd.until_ready()

    @asynccontextmanager
    async def coord(self, number: int = 0, *, has_copy: bool = True) -> AsyncIterator[Access]:
        settings = {"AUTH": "true", "MASTER_KEY": str(self.folder / "master.key")}
        if has_copy:
            settings["POLICY_COPY"] = str(self.copy)
        with Coord(self.folder, number, self.etcd.address, **settings) as one:
            await one.until_ready()
            async with Etcd(self.etcd.address) as etcd, connect(f"unix:{one.socket}") as channel:
                yield Access(channel, etcd, self.folder / "master.key")

    async def apply_and_revoke(self, access: Access) -> int:
        """Apply CLOSED and revoke a key; return the version that the copy has."""
        await access.begin()
        await access.apply(document())
        version = (await access.apply(CLOSED)).version
        await access.stub.RevokeKey(pb.RevokeKeyRequest(id="stolen"), metadata=access.admin)

        async def is_copied() -> bool:
            found = json.loads(self.copy.read_text()) if self.copy.exists() else {}
            return bool(found) and found["applied"]["version"] == version and "stolen" in found["revoked"]

        await until(is_copied, "the copy has the policy and the revoked key")
        return version


@pytest.fixture
async def place(run_dir: Path) -> AsyncIterator[Place]:
    with EtcdProcess(run_dir) as etcd:
        await etcd.until_ready()
        yield Place(run_dir, etcd)


async def policy_or_none(access: Access) -> Policy | None:
    listing = await access.etcd.list(cluster.PREFIX)
    return cluster.in_force({entry.key: entry.value for entry in listing.entries})


async def until_restored(access: Access, version: int) -> None:
    """Wait until there is a policy, which must be CLOSED, as this version."""

    async def is_in_force() -> bool:
        return await policy_or_none(access) is not None

    await until(is_in_force, "there is a policy")
    found = await access.policy()
    assert [grant.name for grant in found.grants] == ["only-health", "own"]
    listing = await access.etcd.list(cluster.PREFIX)
    assert cluster.version_of({entry.key: entry.value for entry in listing.entries}) == version


async def test_an_etcd_that_was_emptied_gets_the_last_policy_at_the_next_start(place: Place) -> None:
    async with place.coord() as access:
        version = await place.apply_and_revoke(access)
    assert place.copy.stat().st_mode & 0o777 == 0o600
    await place.empty_etcd()
    async with place.coord() as access:
        await until_restored(access, version + 1)
        assert "stolen" in (await access.policy()).revoked_ids
        await access.begin()
        history = (await access.stub.ListPolicies(pb.ListPoliciesRequest(), metadata=access.admin)).policies
        assert [(one.version, one.rolled_back_to, one.applied_by) for one in history] == [
            (version + 1, version, "coord, after etcd had lost it")
        ]


async def test_a_running_coord_restores_the_policy_of_an_etcd_that_was_emptied(place: Place) -> None:
    async with place.coord() as access:
        version = await place.apply_and_revoke(access)
        await place.empty_etcd()
        await until_restored(access, version + 1)
        assert "stolen" in (await access.policy()).revoked_ids


async def test_a_policy_that_another_node_has_begun_with_is_replaced(place: Place) -> None:
    async with place.coord() as access:
        version = await place.apply_and_revoke(access)
    await place.empty_etcd()
    async with place.coord(1, has_copy=False) as other:
        await other.begin()
        async with place.coord() as access:

            async def is_restored_here() -> bool:
                found = await policy_or_none(access)
                return found is not None and [grant.name for grant in found.grants] == ["only-health", "own"]

            await until(is_restored_here, "the first policy is replaced")
            await until_restored(access, version + 1)


async def test_a_policy_that_was_changed_elsewhere_is_not_replaced(place: Place) -> None:
    async with place.coord() as access:
        await place.apply_and_revoke(access)
    async with place.coord(1, has_copy=False) as other:
        await other.begin()
        later = await other.apply(document())
        async with place.coord() as access:
            await access.begin()
            assert await other.version() == later.version
            assert [grant.name for grant in (await other.policy()).grants] == ["roles"]


async def test_without_a_copy_the_history_in_etcd_has_the_last_policy(place: Place) -> None:
    async with place.coord(has_copy=False) as access:
        await access.begin()
        version = (await access.apply(CLOSED)).version
        await access.etcd.transact([], [Delete(cluster.POLICY)])
        await until_restored(access, version + 1)


async def test_another_master_key_does_not_keep_a_policy_from_being_restored(place: Place) -> None:
    async with place.coord() as access:
        version = await place.apply_and_revoke(access)
        etcd = access.etcd
        place.new_master_key()
        await etcd.transact([], [Delete(cluster.POLICY)])
        await until_restored(access, version + 1)
    async with place.coord() as access:
        await access.etcd.transact([], [Delete(cluster.POLICY)])
        await until_restored(access, version + 2)


async def test_a_copy_that_cannot_be_read_leaves_callers_refused_and_the_nodes_user_applies_another(
    place: Place,
) -> None:
    place.copy.write_text('{"applied": {}}')
    async with place.coord() as access:

        async def is_said() -> bool:
            log = (place.folder / "coord-0.log").read_text()
            return "the copy of the last policy, cannot be read" in log and "remove it to begin" in log

        await until(is_said, "coord says that the copy cannot be read")
        assert await policy_or_none(access) is None
        # So the launcher can say why it waits for its key.
        code, why = await refusal(access.stub.CreateKey(pb.CreateKeyRequest(), metadata=LAUNCHED))
        assert code == "UNAVAILABLE"
        assert why.startswith(
            f"the cluster has no signer yet: {place.copy}, the copy of the last policy, cannot be read"
        )
        request = pb.ApplyPolicyRequest(document=CLOSED, force=True)
        assert (await access.stub.ApplyPolicy(request, metadata=LAUNCHED)).policy.version == 1
        place.copy.unlink()
        await until_restored(access, 1)
        code, _ = await refusal(access.stub.ApplyPolicy(request))
        assert code == "UNAUTHENTICATED"
