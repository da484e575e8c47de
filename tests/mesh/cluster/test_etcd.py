"""The session layer over a real etcd: what it promises when etcd is killed, frozen, compacted or replaced."""

from __future__ import annotations

import asyncio
import os
import uuid
from contextlib import aclosing

import pytest

from mesh.cluster.etcd import Compacted, Created, Delete, Etcd, Event, LeaseLost, Modified, Put, addresses_of, range_end
from mesh.cluster.mirror import Mirror, applied
from mesh.process.watched import Watched
from shoal.errors import InvalidArgument, Unavailable
from tests.breakable import PATIENCE_S, EtcdProcess, until
from tests.free_ports import free_port

pytestmark = pytest.mark.etcd


@pytest.fixture
def prefix() -> bytes:
    return f"/test/{uuid.uuid4().hex}/".encode()


@pytest.fixture
async def etcd(etcd_address):
    async with Etcd(etcd_address, timeout_s=PATIENCE_S) as session:
        yield session


@pytest.fixture
async def own(tmp_path):
    with EtcdProcess(tmp_path) as process:
        await process.until_ready()
        yield process


async def test_keys_come_and_go(etcd, prefix):
    key = prefix + b"a"
    assert await etcd.get(key) is None
    revision = await etcd.put(key, b"1")
    entry = await etcd.get(key)
    assert (entry.value, entry.mod_revision) == (b"1", revision)
    assert [e.key for e in (await etcd.list(prefix)).entries] == [key]
    assert await etcd.delete(key)
    assert not await etcd.delete(key)
    assert (await etcd.list(prefix)).entries == ()


async def test_a_transaction_does_all_or_nothing(etcd, prefix):
    a, b = prefix + b"a", prefix + b"b"
    first = await etcd.transact([Created(a, 0)], [Put(a, b"1"), Put(b, b"1")])
    assert first.succeeded
    assert not (await etcd.transact([Created(a, 0)], [Put(a, b"2")])).succeeded
    assert (await etcd.transact([Created(a, first.revision), Modified(b, first.revision)], [Delete(b)])).succeeded
    assert [e.value for e in (await etcd.list(prefix)).entries] == [b"1"]


async def test_a_key_goes_with_its_lease(etcd, prefix):
    lease = await etcd.grant(600)
    await etcd.put(prefix + b"a", b"1", lease.id)
    await lease.refresh()
    assert lease.is_held()
    await lease.revoke()
    assert not lease.is_held()
    assert await etcd.get(prefix + b"a") is None
    await lease.revoke()
    with pytest.raises(LeaseLost):
        await lease.refresh()
    with pytest.raises(LeaseLost):
        await etcd.put(prefix + b"a", b"1", lease.id)


async def test_a_lease_is_held_by_the_holders_own_clock(etcd):
    now = 100.0
    # By the clock of etcd, it is held to the end of the test.
    lease = await etcd.grant(600, clock=lambda: now)
    now = 699.9
    assert lease.is_held()
    now = 700.0
    assert not lease.is_held()
    with pytest.raises(LeaseLost, match="run out"):
        await lease.refresh(revive=False)
    assert not lease.is_held()
    await lease.refresh()
    assert lease.is_held()


async def test_a_watch_sees_changes_in_order_and_says_when_all_is_quiet(etcd_address, prefix):
    async with Etcd(etcd_address, idle_s=0.05) as etcd:
        start = await etcd.put(prefix + b"a", b"0")
        async with aclosing(etcd.watch(prefix, start + 1)) as changes:
            assert (await anext(changes)).events == ()
            quiet = await anext(changes)
            assert quiet.revision >= start
            await etcd.put(prefix + b"a", b"1")
            await etcd.delete(prefix + b"a")
            seen: list[Event] = []
            async for change in changes:
                seen += change.events
                if len(seen) == 2:
                    break
    assert [(e.key, e.entry.value if e.entry else None) for e in seen] == [(prefix + b"a", b"1"), (prefix + b"a", None)]


async def test_a_watch_below_compaction_says_so(own, prefix):
    async with Etcd(own.address) as etcd:
        for value in (b"1", b"2", b"3"):
            last = await etcd.put(prefix + b"a", value)
        await etcd.compact(last)
        with pytest.raises(Compacted):
            async for _ in etcd.watch(prefix, 1):
                pass


async def test_every_call_has_a_deadline(own, prefix):
    async with Etcd(own.address, timeout_s=PATIENCE_S, idle_s=0.1) as etcd:
        lease = await etcd.grant(600)
        watching = aclosing(etcd.watch(prefix, 1))
        async with watching as changes:
            await anext(changes)
            own.freeze()
            etcd._timeout_s = 0.3
            with pytest.raises(Unavailable):
                await drain(changes)
            for call in (etcd.get(b"a"), etcd.put(b"a", b"1"), lease.refresh(), etcd.grant(3), etcd.list(b"/")):
                with pytest.raises(Unavailable):
                    await call
            with pytest.raises(Unavailable):
                await anext(etcd.watch(prefix, 1))
            own.thaw()
            etcd._timeout_s = PATIENCE_S
            await until(lambda: answers(etcd), "an answer after the freeze")
            await lease.refresh()


async def drain(changes) -> None:
    async for _ in changes:
        pass


async def answers(etcd: Etcd) -> bool:
    try:
        await etcd.get(b"a")
    except Unavailable:
        return False
    return True


async def test_a_watch_ends_with_an_error_when_etcd_is_killed(own, prefix):
    async with Etcd(own.address) as etcd:
        async with aclosing(etcd.watch(prefix, 1)) as changes:
            await anext(changes)
            own.kill()
            with pytest.raises(Unavailable):
                await drain(changes)
        with pytest.raises(Unavailable, match=own.address):
            await etcd.put(prefix, b"1")
        own.start()
        await until(lambda: answers(etcd), "an answer after the restart")


async def test_a_dead_address_is_left_for_the_next(etcd_address):
    dead = f"127.0.0.1:{free_port()}"
    async with Etcd(f"{dead},{etcd_address}") as etcd:
        with pytest.raises(Unavailable, match=dead):
            await etcd.get(b"a")
        assert await etcd.get(b"a") is None


@pytest.mark.parametrize("text", ["", ",", "localhost", "localhost:port", "unix:x", "a:1,b", "http://", "a b:1"])
def test_a_wrong_address_is_named(text):
    with pytest.raises(InvalidArgument, match="expected host:port"):
        addresses_of(text)


def test_addresses_may_be_many():
    assert addresses_of(" a:1, http://10.0.0.1:2 ,[::1]:3") == ("a:1", "10.0.0.1:2", "[::1]:3")
    assert addresses_of("unix:/run/etcd:0,a:1") == ("unix:/run/etcd:0", "a:1")


@pytest.mark.parametrize(("prefix", "end"), [(b"/a/", b"/a0"), (b"a\xff", b"b"), (b"\xff\xff", b"\0"), (b"", b"\0")])
def test_the_range_of_a_prefix(prefix, end):
    assert range_end(prefix) == end


def test_applying_events_leaves_the_old_copy_alone():
    before = {b"a": 1, b"b": 2}
    after = applied(before, (Event(b"a", None), Event(b"c", 3)))
    assert (dict(after), before) == ({b"b": 2, b"c": 3}, {b"a": 1, b"b": 2})


def values(mirror: Mirror) -> dict[bytes, bytes]:
    return {key: entry.value for key, entry in mirror.copy.entries.items()}


async def test_a_mirror_follows(etcd, prefix):
    await etcd.put(prefix + b"a", b"1")
    async with Mirror(etcd, prefix) as mirror:
        await until(lambda: values(mirror) == {prefix + b"a": b"1"})
        assert not mirror.copy.stale
        await etcd.put(prefix + b"b", b"2")
        await etcd.delete(prefix + b"a")
        await until(lambda: values(mirror) == {prefix + b"b": b"2"})


async def test_a_mirror_survives_a_restart_of_etcd(own, prefix):
    async with (
        Etcd(own.address) as etcd,
        Etcd(own.address, timeout_s=PATIENCE_S) as other,
        Mirror(etcd, prefix) as mirror,
    ):
        await other.put(prefix + b"a", b"1")
        await until(lambda: len(values(mirror)) == 1)
        own.kill()
        await until(lambda: mirror.copy.stale, "staleness")
        assert values(mirror) == {prefix + b"a": b"1"}
        own.start()
        await own.until_ready()
        await until(lambda: answers(other))
        await other.put(prefix + b"b", b"2")
        await until(lambda: len(values(mirror)) == 2 and not mirror.copy.stale, "the change after the restart")


async def test_a_mirror_survives_a_freeze_of_etcd(own, prefix):
    async with (
        Etcd(own.address, timeout_s=PATIENCE_S) as other,
        Etcd(own.address, timeout_s=0.3, idle_s=0.1) as etcd,
        Mirror(etcd, prefix) as mirror,
    ):
        await until(lambda: not mirror.copy.stale)
        own.freeze()
        await until(lambda: mirror.copy.stale, "staleness")
        own.thaw()
        await until(lambda: not mirror.copy.stale, "sight of etcd")
        await other.put(prefix + b"a", b"1")
        await until(lambda: values(mirror) == {prefix + b"a": b"1"})


async def test_a_mirror_lists_again_after_compaction(own, prefix, tmp_path):
    """While the mirror cannot see etcd, keys change and history is compacted away under it."""
    relay = await Relay.to(own.address)
    async with Etcd(relay.address, idle_s=0.1, timeout_s=0.3) as etcd, Etcd(own.address, timeout_s=PATIENCE_S) as other:
        await other.put(prefix + b"a", b"1")
        async with Mirror(etcd, prefix) as mirror:
            await until(lambda: len(values(mirror)) == 1)
            await relay.cut()
            await until(lambda: mirror.copy.stale, "staleness")
            await other.delete(prefix + b"a")
            await other.compact(await other.put(prefix + b"b", b"2"))
            await relay.mend()
            await until(lambda: values(mirror) == {prefix + b"b": b"2"}, "the new list")
            await until(lambda: not mirror.copy.stale)
    await relay.cut()


async def test_a_mirror_notices_an_etcd_that_lost_its_data(tmp_path, prefix):
    with EtcdProcess(tmp_path) as own:
        await own.until_ready()
        async with Etcd(own.address) as etcd, Mirror(etcd, prefix) as mirror:
            for number in range(50):
                await etcd.put(prefix + b"a", str(number).encode())
            await until(lambda: values(mirror) == {prefix + b"a": b"49"})
            own.kill()
            os.rename(tmp_path / "etcd", tmp_path / "lost")
            own.start()
            await own.until_ready()
            await until(lambda: values(mirror) == {}, "the empty list")
            await until(lambda: answers(etcd))
            await etcd.put(prefix + b"b", b"1")
            await until(lambda: values(mirror) == {prefix + b"b": b"1"})


class Relay:
    """TCP from a port of its own to `target`, until it is cut."""

    def __init__(self, target: str) -> None:
        self._host, _, port = target.rpartition(":")
        self._port = int(port)
        self._writers: list[asyncio.StreamWriter] = []
        self.address = f"127.0.0.1:{free_port()}"

    @classmethod
    async def to(cls, target: str) -> Relay:
        relay = cls(target)
        await relay.mend()
        return relay

    async def mend(self) -> None:
        host, _, port = self.address.rpartition(":")
        self._server = await asyncio.start_server(self._serve, host, int(port))

    async def cut(self) -> None:
        self._server.close()
        for writer in self._writers:
            writer.close()
        self._writers.clear()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection(self._host, self._port)
        self._writers += [writer, up_writer]

        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            try:
                while data := await source.read(65536):
                    sink.write(data)
            except OSError:
                pass
            finally:
                sink.close()

        await asyncio.gather(pump(reader, up_writer), pump(up_reader, writer))


async def test_followers_see_the_newest_and_no_queue_grows():
    latest = Watched(0)
    seen = []
    following = latest.follow()
    seen.append(await anext(following))
    for value in range(1, 100):
        latest.set(value)
    seen.append(await anext(following))
    latest.set(99)
    waiting = asyncio.ensure_future(anext(following))
    latest.set(100)
    seen.append(await waiting)
    assert seen == [0, 99, 100]
