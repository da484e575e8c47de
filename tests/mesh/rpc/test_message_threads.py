"""Large compressed messages: threads, one message of a tenant at a time, and bounds."""

from __future__ import annotations

import asyncio
import gzip
import threading
import zlib

import pytest

from mesh.rpc.framing import INLINE_BYTES, inflated, inflated_inline, most_inflated
from mesh.rpc.message_threads import MessageThreads
from shoal.errors import InvalidArgument, ResourceExhausted

LIMIT = 8 << 20
PACK = {b"gzip": gzip.compress, b"deflate": zlib.compress}
# Numbers compress by a factor of about 5.
NUMBERS = b"".join(b"%d," % (n * 7919 % 100_003) for n in range(400_000))


def whole(message: bytes, encoding: bytes, limit: int = LIMIT) -> bytes:
    return inflated(message, encoding, limit, lambda: False)


@pytest.mark.parametrize("encoding", PACK)
@pytest.mark.parametrize("size", [0, 1, INLINE_BYTES, INLINE_BYTES + 1, len(NUMBERS)])
def test_a_message_of_any_size_is_inflated(encoding, size):
    message = PACK[encoding](NUMBERS[:size])
    plain = inflated_inline(message, encoding)
    assert plain == NUMBERS[:size] if size <= INLINE_BYTES else plain is None
    assert whole(message, encoding) == NUMBERS[:size]
    assert most_inflated(message, encoding, LIMIT) >= size


@pytest.mark.parametrize("encoding", PACK)
def test_a_bomb_ends_at_the_bound_of_its_ratio(encoding):
    bomb = PACK[encoding](bytes(6 << 20))
    assert most_inflated(bomb, encoding, LIMIT) <= 1 << 20
    with pytest.raises(ResourceExhausted, match="100 times"):
        whole(bomb, encoding)


@pytest.mark.parametrize("encoding", PACK)
def test_a_message_that_grows_up_to_1_mib_has_no_bound_of_ratio(encoding):
    assert whole(PACK[encoding](bytes(1 << 20)), encoding) == bytes(1 << 20)


@pytest.mark.parametrize("encoding", PACK)
def test_a_message_beyond_the_limit_is_exhausted(encoding):
    with pytest.raises(ResourceExhausted, match="larger than max"):
        whole(PACK[encoding](NUMBERS), encoding, 1 << 20)


def test_a_size_at_the_end_of_gzip_that_is_too_small_is_an_error():
    message = gzip.compress(NUMBERS)[:-4] + (500_000).to_bytes(4, "little")
    with pytest.raises(InvalidArgument, match="larger than its last bytes say"):
        whole(message, b"gzip")


@pytest.mark.parametrize("encoding", PACK)
def test_damaged_messages_are_invalid(encoding):
    message = PACK[encoding](NUMBERS)
    for damaged in (message[:-9], message + b"x", message[:1000] + b"\0" * 99 + message[1099:]):
        with pytest.raises((InvalidArgument, ResourceExhausted)):
            whole(damaged, encoding)


async def test_a_tenant_has_one_thread_and_others_do_not_wait_for_it():
    threads = MessageThreads()
    release, began, done = threading.Event(), [], []

    def work(name: str) -> bytes:
        began.append((name, threading.current_thread() is threading.main_thread()))
        if name == "a1":
            assert release.wait(20)
        return name.encode()

    for name in ("a1", "a2", "a3", "b1", "b2"):
        threads.start(name[:1].encode(), lambda name=name: work(name), done.append)
    while len(done) < 2:
        await asyncio.sleep(0.001)
    assert done == [b"b1", b"b2"]
    assert [name for name, _ in began] == ["a1", "b1", "b2"]
    release.set()
    while len(done) < 5:
        await asyncio.sleep(0.001)
    assert done[2:] == [b"a1", b"a2", b"a3"]
    assert not any(is_main for _, is_main in began)
    assert not threads._waiting
    threads.close()


async def test_an_error_in_a_thread_reaches_its_call_and_harms_no_other():
    threads, done = MessageThreads(), []

    def fails() -> bytes:
        raise InvalidArgument("bad")

    def broken(result: bytes | BaseException) -> None:
        done.append(result)
        raise ValueError("a fault of a call")

    threads.start(b"", fails, broken)
    threads.start(b"", lambda: b"next", done.append)
    while len(done) < 2:
        await asyncio.sleep(0.001)
    assert isinstance(done[0], InvalidArgument)
    assert done[1] == b"next"
    threads.close()
