"""The test service in a real process on real sockets."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.protobuf.wrappers_pb2 import BytesValue
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.breakable import Process, until
from tests.free_ports import free_port
from tests.long_form import by_form
from tests.mesh.rpc.fronts.raw import RawConnection
from tests.mesh.rpc.fronts.service import METHODS, path

UNARY = ("Unary", "Short", "Tasked")
TRANSPORTS = ("unix", "tcp", "envoy")

_LARGE = 200 << 20
_OPTIONS = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.default_authority", "localhost"),
    ("grpc.max_send_message_length", _LARGE),
    ("grpc.max_receive_message_length", _LARGE),
)
_numbers = itertools.count()


class Front(Process):
    """A process that serves the test service at `address`.

    `transport` is unix, tcp, or envoy: TCP with an Envoy in front, as `shoal serve` starts it.
    """

    def __init__(
        self, python: str, folder: Path, transport: str, at: str, env: Mapping[str, str] | None = None
    ) -> None:
        self.transport = transport
        self.address = address = at or address_for(transport, folder)
        settings = {"SHOAL_FRONTS_LISTEN": address, **(env or {})}
        log = folder / f"front-{next(_numbers)}.log"
        super().__init__([python, "-m", "tests.mesh.rpc.fronts", transport], log, settings)

    async def until_serving(self) -> None:
        await until(lambda: serves(self.address) if self.is_running() else _dead(self), "serving")

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        async with grpc.aio.insecure_channel(self.address, options=_OPTIONS) as channel:
            yield Client(channel)

    def raw(self) -> RawConnection:
        return RawConnection(self.address)


def _dead(front: Front) -> bool:
    raise AssertionError(f"the server ended:\n{front.log.read_text()[-3000:]}")


async def serves(address: str) -> bool:
    async with grpc.aio.insecure_channel(address, options=_OPTIONS) as channel:
        try:
            answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=2)
        except grpc.aio.AioRpcError:
            return False
        return answer.status == health_pb2.HealthCheckResponse.SERVING


class Client:
    """Calls of the test service: `order` is what is done with the call."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel

    def call(self, method: str, request: Any = b"", order: Any = None, **options: Any) -> Any:
        """`request` is bytes, or an iterator of bytes."""
        asks, answers = METHODS[method]
        kind = "_".join("stream" if streams else "unary" for streams in (asks, answers))
        metadata = [*options.pop("metadata", ())]
        if order is not None:
            metadata.append(("x-do", json.dumps(order)))
        multi = getattr(self.channel, kind)(
            path(method),
            request_serializer=lambda value: BytesValue(value=value).SerializeToString(),
            response_deserializer=lambda data: BytesValue.FromString(data).value,
        )
        return multi(request, metadata=metadata, **options)

    async def fails(self, method: str, request: Any = b"", order: Any = None, **options: Any) -> grpc.aio.AioRpcError:
        """The error that a call ends with."""
        call = self.call(method, request, order, **options)
        try:
            got = [part async for part in call] if METHODS[method][1] else await call
        except grpc.aio.AioRpcError as err:
            return err
        raise AssertionError(f"{method} was answered: {got!r}")

    async def seen(self) -> list[str]:
        events: list[str] = json.loads(await self.call("Seen"))
        return events

    async def until_seen(self, *events: str) -> None:
        async def is_so() -> bool:
            # A list of all events would be long after some tests.
            return set(events) <= set(json.loads(await self.call("Seen", json.dumps(events).encode())))

        await until(is_so, f"{events}")


def address_for(transport: str, folder: Path) -> str:
    return f"unix:{folder}/f.sock" if transport == "unix" else f"127.0.0.1:{free_port()}"


# Behind Envoy the server listens on a unix socket.
@pytest.fixture(scope="session", params=by_form(("tcp", "envoy"), TRANSPORTS))
def started(request: pytest.FixtureRequest, python: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    """One process for all tests that do it no harm."""
    folder = tmp_path_factory.mktemp("f")
    with Front(python, folder, request.param, "") as front:
        yield front
        if not front.is_running():
            _dead(front)


@pytest_asyncio.fixture
async def front(started: Front) -> Front:
    await started.until_serving()
    return started


@pytest.fixture
def large(front: Front) -> None:
    """For tests with large messages, which take their time: on one transport."""
    if front.address.startswith("unix:"):
        pytest.skip("large messages go over TCP")


@pytest_asyncio.fixture
async def client(front: Front) -> AsyncIterator[Client]:
    async with front.client() as client:
        yield client


@pytest_asyncio.fixture
async def raw(front: Front) -> AsyncIterator[RawConnection]:
    """A connection on which the test says each frame."""
    async with front.raw() as connection:
        yield connection
