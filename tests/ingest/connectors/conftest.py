"""Brokers for the tests of connectors, and ingest with a connector on one."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.breakable import PATIENCE_S
from tests.ingest.conftest import IngestProcess, StartIngest
from tests.ingest.connectors.brokers import Broker, toml
from tests.ingest.connectors.direct import Direct
from tests.ingest.connectors.kafkas import Kafka, Tansu
from tests.ingest.connectors.kinesises import KEYS, Kinesis, Moto
from tests.ingest.connectors.pubsubs import PubSub, PubSubServer


@pytest.fixture(scope="module")
def tansu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tansu]:
    with Tansu(tmp_path_factory.mktemp("tansu")) as broker:
        broker.wait_until_ready()
        yield broker


@pytest.fixture
async def kafka(tansu: Tansu) -> Kafka:
    return await Kafka(tansu.address).make()


@pytest.fixture(scope="module")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Moto]:
    with Moto(tmp_path_factory.mktemp("moto")) as server:
        deadline = time.monotonic() + PATIENCE_S
        while not server.is_ready():
            assert server.is_running(), server.log.read_text()[-2000:]
            assert time.monotonic() < deadline, "moto did not become ready"
            time.sleep(0.05)
        yield server


@pytest.fixture(autouse=True)
def _keys_of_aws(monkeypatch: pytest.MonkeyPatch) -> None:
    """moto takes any."""
    for name, value in KEYS.items():
        monkeypatch.setenv(name.upper().replace("REGION_NAME", "AWS_DEFAULT_REGION"), value)


MakeBroker = Callable[[str], Awaitable[Broker]]


@pytest.fixture
async def make_broker(request: pytest.FixtureRequest, mongo_uri: str, mongo_database: str) -> AsyncIterator[MakeBroker]:
    """Makes one of a kind. Its parts are started only for those who ask for it."""
    stack = AsyncExitStack()

    async def make(kind: str) -> Broker:
        if kind == "pubsub":
            return PubSub(await stack.enter_async_context(PubSubServer()))
        if kind == "kinesis":
            return await Kinesis(request.getfixturevalue("moto"), mongo_uri, mongo_database).make()
        return await Kafka(request.getfixturevalue("tansu").address).make()

    async with stack:
        yield make


BROKERS = ["kafka", "kinesis", "pubsub"]


@pytest.fixture(params=["grpc", *BROKERS])
async def broker(
    request: pytest.FixtureRequest, make_broker: Callable[[str], Awaitable[Broker]]
) -> AsyncIterator[Broker]:
    """Each broker in turn, and a client's own stream."""
    if request.param != "grpc":
        yield await make_broker(request.param)
        return
    direct = Direct()
    yield direct
    await direct.close()


@pytest.fixture(params=BROKERS)
async def real_broker(request: pytest.FixtureRequest, make_broker: MakeBroker) -> Broker:
    """Each broker in turn."""
    return await make_broker(request.param)


StartConnector = Callable[..., IngestProcess]


@pytest.fixture
def start_connector(start_ingest: StartIngest, run_dir: Path) -> Iterator[StartConnector]:
    """Starts ingest with a connector named `c` on a broker. More settings are the connector's."""
    logs: set[Path] = set()

    def start(broker: Broker, n: int = 0, *, ingest: dict[str, Any] | None = None, **settings: Any) -> IngestProcess:
        told: dict[str, Any] = {"lease_ms": 2_000, "renew_ms": 500, **(ingest or {})}
        if not isinstance(broker, Direct):
            told["connectors"] = run_dir / "connectors.toml"
            told["connectors"].write_text(toml("c", broker.table, **settings))
        process = start_ingest(n, **told)
        if isinstance(broker, Direct):
            broker.attach(process.address, **settings)
        logs.add(process.log)
        return process

    yield start
    for log in logs:
        print(log.read_text()[-8_000:])  # Shown with a test that fails.
