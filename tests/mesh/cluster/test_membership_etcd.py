"""Registration and Directory over a real etcd."""

from __future__ import annotations

import asyncio
import os
import time

import pytest

from mesh.cluster import membership
from mesh.cluster.etcd import Etcd
from mesh.cluster.membership import Directory, ReadyModel, Registration, State, encode
from mesh.process.config import ServiceConfig
from tests.breakable import EtcdProcess, until

pytestmark = pytest.mark.etcd


@pytest.fixture
async def own(tmp_path):
    with EtcdProcess(tmp_path) as process:
        await process.until_ready()
        yield process


def config(etcd: str | None, instance: str = "infer-0", notice_ms: int = 0) -> ServiceConfig:
    return ServiceConfig(instance=instance, listen="unix:/tmp/x.sock", etcd=etcd, notice_ms=notice_ms)


def states(directory: Directory) -> dict[str, State]:
    return {instance.name: instance.state for instance in directory.view.instances}


@pytest.fixture
def long_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    """No lease ends by itself, even if this process stands still for seconds."""
    monkeypatch.setattr(membership, "TTL_S", 600)


async def test_an_instance_comes_changes_and_goes(own, long_leases):
    async with Etcd(own.address) as etcd, Directory(etcd) as directory:
        async with Registration.of(config(own.address), "infer", "unix:/tmp/x.sock") as registration:
            await until(lambda: states(directory) == {"local/infer-0": State.STARTING})
            await registration.update(state=State.READY, models=[ReadyModel("b", (1,)), ReadyModel("a", (1, 2))])
            await until(lambda: states(directory) == {"local/infer-0": State.READY})
            (instance,) = directory.view.instances
            assert instance.pid == os.getpid()
            assert [model.name for model in instance.models] == ["a", "b"]
            assert 0 <= time.time() - instance.started_at < 120
        await until(lambda: states(directory) == {})


async def test_leaving_says_draining_first_and_stays_for_the_notice(own):
    async with Etcd(own.address) as etcd, Directory(etcd) as directory:
        registration = Registration.of(config(own.address, notice_ms=60_000), "infer", "unix:/tmp/x.sock")
        await registration.__aenter__()
        await registration.update(state=State.READY)
        await until(lambda: states(directory) == {"local/infer-0": State.READY})
        leaving = asyncio.create_task(registration.__aexit__(None, None, None))
        await until(lambda: states(directory) == {"local/infer-0": State.DRAINING})
        assert not leaving.done()
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)


async def test_without_etcd_nothing_happens():
    async with Registration.of(config(None), "infer", "unix:/tmp/x.sock") as registration:
        await registration.update(state=State.READY)
        assert registration.instance.state is State.READY


async def test_an_etcd_that_was_never_there_stops_nobody():
    async with Registration.of(config("127.0.0.1:1"), "infer", "unix:/tmp/x.sock") as registration:
        await registration.update(state=State.READY)


async def test_instances_register_again_after_a_pause_longer_than_their_lease(own):
    """All leases expire at once when etcd wakes up."""
    async with Etcd(own.address, timeout_s=0.5, idle_s=0.2) as etcd, Directory(etcd) as directory:
        async with (
            Registration.of(config(own.address), "infer", "unix:/tmp/x.sock") as one,
            Registration.of(config(own.address, "infer-1"), "infer", "unix:/tmp/y.sock") as two,
        ):
            for registration in (one, two):
                await registration.update(state=State.READY)
            both = {"local/infer-0": State.READY, "local/infer-1": State.READY}
            await until(lambda: states(directory) == both)
            own.freeze()
            await until(lambda: directory.view.stale, "staleness")
            paused = time.monotonic()
            await two.update(models=[ReadyModel("m", (1,))])
            await until(lambda: time.monotonic() - paused > 10)
            assert states(directory) == both
            own.thaw()
            await until(
                lambda: (
                    not directory.view.stale
                    and states(directory) == both
                    and directory.view.instances[1].models == (ReadyModel("m", (1,)),)
                ),
                "both again",
            )


async def test_an_instance_survives_an_etcd_that_lost_everything(own, tmp_path):
    async with Registration.of(config(own.address), "infer", "unix:/tmp/x.sock") as registration:
        await registration.update(state=State.READY)
        async with Etcd(own.address) as etcd, Directory(etcd) as directory:
            await until(lambda: states(directory) == {"local/infer-0": State.READY})
            own.kill()
            os.rename(tmp_path / "etcd", tmp_path / "lost")
            own.start()
            await until(lambda: not directory.view.stale and states(directory) == {"local/infer-0": State.READY})


async def test_changes_that_never_stop_do_not_starve_the_lease(own, monkeypatch: pytest.MonkeyPatch):
    # A busy machine may stop this process for seconds, and so end a lease of three.
    monkeypatch.setattr(membership, "TTL_S", 10)
    async with Etcd(own.address) as etcd:
        async with Registration.of(config(own.address), "infer", "unix:/tmp/x.sock") as registration:
            leases = set()
            started = time.monotonic()

            async def changed() -> bool:
                await registration.update(models=[ReadyModel("m", (time.monotonic_ns(),))])
                if (entry := await etcd.get(registration.instance.key)) is not None:
                    leases.add(entry.lease)
                return time.monotonic() - started > membership.TTL_S + 1.5

            await until(changed, every_s=0.1)
            assert len(leases) == 1


async def test_a_deleted_key_is_written_again(own):
    async with Registration.of(config(own.address), "infer", "unix:/tmp/x.sock") as registration:
        async with Etcd(own.address) as etcd, Directory(etcd) as directory:
            await until(lambda: len(states(directory)) == 1)
            before = directory.view.revision
            await etcd.delete(registration.instance.key)
            await until(lambda: directory.view.revision >= before + 2 and len(states(directory)) == 1)


async def test_whoever_replaced_a_process_keeps_its_key_when_the_old_one_leaves(own, long_leases):
    async with Etcd(own.address) as etcd, Directory(etcd) as directory:
        old = Registration.of(config(own.address), "infer", "unix:/tmp/old.sock")
        new = Registration.of(config(own.address), "infer", "unix:/tmp/new.sock")
        assert new.instance.started_at > old.instance.started_at
        async with new:
            async with old:
                await until(lambda: len(states(directory)) == 1)
                await new.update(state=State.READY)
                await until(lambda: states(directory) == {"local/infer-0": State.READY})
                await old.update(models=[ReadyModel("m", (1,))])
            assert (await etcd.get(new.instance.key)).value == encode(new.instance)


async def test_unreadable_keys_harm_nobody(own, long_leases):
    async with Etcd(own.address) as etcd, Directory(etcd) as directory:
        for key, value in [(b"infer/local/infer-9", b"{"), (b"\xff\xfe", b"x"), (b"infer", b"[1]"), (b"", b"")]:
            await etcd.put(b"/shoal/instances/" + key, value)
        async with Registration.of(config(own.address), "infer", "unix:/tmp/x.sock") as registration:
            await until(lambda: list(states(directory)) == ["local/infer-0"])
            copy = (await etcd.get(registration.instance.key)).value
            assert copy == encode(registration.instance)


async def test_followers_see_each_newest_view(own):
    async with Etcd(own.address) as etcd, Directory(etcd) as directory:
        async with Registration.of(config(own.address), "infer", "unix:/tmp/x.sock") as registration:
            async for view in directory.follow():
                if [i.state for i in view.instances] == [State.STARTING]:
                    await registration.update(state=State.READY)
                if [i.state for i in view.instances] == [State.READY]:
                    break
