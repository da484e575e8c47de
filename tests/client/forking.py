"""Script of test_forks: forks in every state of a client. Arguments: the server's address, and the transport."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest

import shoal
from shoal.client.transport import calls
from shoal.errors import FailedPrecondition

ADDRESS, TRANSPORT = sys.argv[1:]
LONGEST_S = 20.0
REQUEST = shoal.InferRequest("m", {"x": np.float32([1])})


def forked(work: Callable[[], object], leave: Callable[[int], Any] = os._exit) -> None:
    """Run `work` in a child, and check that the child ends well, and in time.

    `sys.exit` finalizes the interpreter, which takes half a second.
    """
    child = os.fork()
    if not child:
        work()
        leave(0)
    until = time.monotonic() + LONGEST_S
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > until:
            os.kill(child, 9)
            raise AssertionError("the child hangs")
        time.sleep(0.002)
    assert ended[1] == 0, ended


def call(client: shoal.Client) -> None:
    assert client.infer("m", REQUEST.inputs, timeout=LONGEST_S)["x"].tolist() == [1]


def a_used_client() -> None:
    client = shoal.Client(ADDRESS)
    call(client)
    forked(lambda: call(client), sys.exit)
    call(client)
    forked(lambda: call(shoal.Client(ADDRESS)))
    call(client)
    client.close()
    forked(lambda: None)


def a_closed_client() -> None:
    client = shoal.Client(ADDRESS)
    call(client)
    client.close()

    def child() -> None:
        with pytest.raises(FailedPrecondition, match="closed"):
            call(client)

    forked(child)


def several_generations() -> None:
    client = shoal.Client(ADDRESS)
    call(client)

    def child() -> None:
        call(client)
        forked(lambda: call(client))
        call(client)
        client.close()

    forked(child)
    call(client)


def calls_in_flight_and_a_held_lock() -> None:
    client, is_over = shoal.Client(ADDRESS), threading.Event()

    def repeat() -> None:
        while not is_over.is_set():
            call(client)

    threads = [threading.Thread(target=repeat) for _ in range(3)]
    call(client)
    for thread in threads:
        thread.start()
    for leave in (os._exit, os._exit, sys.exit):
        with client._loop._lock:
            forked(lambda: call(client), leave)
    is_over.set()
    for thread in threads:
        thread.join(LONGEST_S)
        assert not thread.is_alive()
    client.close()


def an_iteration() -> None:
    client = shoal.Client(ADDRESS)
    results = client.infer_stream(iter([REQUEST] * 3))
    next(results)

    def child() -> None:
        with pytest.raises(FailedPrecondition, match="belongs to the parent process"):
            next(results)
        call(client)

    forked(child)
    assert len(list(results)) == 2
    client.close()


async def an_async_client() -> None:
    client = shoal.AsyncClient(ADDRESS)

    async def once() -> None:
        assert (await client.infer("m", REQUEST.inputs, timeout=LONGEST_S))["x"].tolist() == [1]

    async def last() -> None:
        async with client:
            await once()

    def child() -> None:
        asyncio.run(once())
        asyncio.run(last())

    await once()
    # In a thread, where no event loop runs.
    await asyncio.to_thread(forked, child)
    await once()
    await client.close()


def the_parents_connection() -> None:
    """A child that lives on must not keep the parent's connection open."""
    client = shoal.Client(ADDRESS)
    call(client)
    (transport,) = client._inner._caller._transports.values()
    (connection,) = transport._channel._connections  # type: ignore[attr-defined]
    number = connection._transport.get_extra_info("socket").fileno()
    shared = os.readlink(f"/proc/self/fd/{number}")
    assert shared.startswith("socket:")

    def child() -> None:
        for name in os.listdir("/proc/self/fd"):
            # The descriptor that reads the folder.
            with suppress(FileNotFoundError):
                assert os.readlink(f"/proc/self/fd/{name}") != shared, name

    forked(child)
    call(client)
    client.close()


if TRANSPORT == "grpc":
    calls.is_local = lambda address: False
a_used_client()
a_closed_client()
several_generations()
asyncio.run(an_async_client())
# With calls in flight, grpc's threads may hold its locks at the fork: a child may then crash (docs/client.md).
if TRANSPORT == "lean":
    calls_in_flight_and_a_held_lock()
    an_iteration()
    the_parents_connection()
