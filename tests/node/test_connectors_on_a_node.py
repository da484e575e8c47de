"""`shoal up --connectors`: from a topic through a real model into another, and what `shoal status` says of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import shoal
from shoal.client import Connector
from tests.breakable import until
from tests.ingest.connectors.brokers import Received, toml
from tests.ingest.connectors.kafkas import Kafka, Tansu

pytestmark = [pytest.mark.node, pytest.mark.timeout(300)]
PATIENT = {"within_s": 90.0, "every_s": 0.2}


@pytest.fixture(scope="module")
def tansu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tansu]:
    with Tansu(tmp_path_factory.mktemp("tansu")) as broker:
        broker.wait_until_ready()
        yield broker


def seen(gateway: str) -> Connector:
    """The one connector, as an operator's program sees it."""
    with shoal.Client(gateway) as client:
        (connector,) = client.status().connectors or (None,)
    assert connector is not None
    return connector


async def test_rows_of_a_topic_are_answered_in_another_and_the_status_says_how_it_goes(
    node: Callable[..., Any], onnx_models: Path, tansu: Tansu, tmp_path: Path
) -> None:
    kafka = await Kafka(tansu.address, partitions=1).make()
    settings = {"model": "double", "format": "record", "inputs": {"x": "FP32"}, "writes": "json", "tenant": "shop"}
    file = tmp_path / "streams.toml"
    file.write_text(toml("doubles", kafka.table, **settings))
    running = node("--connectors", str(file), "--replicas", "ingest=1")
    with shoal.Client(running.gateway) as client:
        [pushed] = client.models.push(onnx_models / "double.onnx")
        assert pushed.ready
    for n in range(5):  # One by one: Tansu knows the end of a topic only by its last batch.
        await kafka.publish([json.dumps({"x": [n, 0, 0, 0]}).encode()])
    await kafka.publish([b"no JSON"])
    found: list[Received] = []

    async def answered() -> bool:
        found[:] = await kafka.answers()
        return len(found) >= 5

    await until(answered, "answers", **PATIENT)
    assert sorted(json.loads(each.value)["outputs"][0]["data"][0] for each in found) == [0, 2, 4, 6, 8]

    def is_done(connector: Connector) -> bool:
        return connector.lag == 0 and [lane.committed for lane in connector.lanes] == ["6"]

    await until(lambda: is_done(seen(running.gateway)), "no lag", **PATIENT)
    connector = seen(running.gateway)
    assert (connector.name, connector.instance, connector.phase) == ("doubles", "local/ingest-0", "running")
    assert (connector.messages, connector.answered, connector.dead, connector.in_flight) == (6, 5, 1, 0)
    assert connector.tenant == "shop"
    shown = running.shoal("status").stdout
    assert "connectors" in shown
    assert "doubles" in shown
    document = json.loads(running.shoal("status", "--json").stdout)
    assert document["connectors"][0]["lag"] == 0
    with shoal.Client(running.gateway) as client:
        assert all(job.labels["connector"] == "doubles" for job in client.jobs.list(tenant="shop"))

    await lag_and_catch_up(running, kafka)
    tansu.kill()
    await until(lambda: "Kafka" in seen(running.gateway).last_error, "the error", **PATIENT)
    done = running.shoal("doctor", "--json", check=False)
    [failing] = [each for each in json.loads(done.stdout)["findings"] if each["check"] == "connector-failing"]
    assert "connector doubles at local/ingest-0 fails: Kafka" in failing["what"]
    # The first error may be that the connection has ended.
    await until(lambda: "Connection refused" in running.typed(failing["command"]), "the cause is logged", **PATIENT)


async def lag_and_catch_up(running: Any, kafka: Kafka) -> None:
    """A connector whose tenant may submit too few jobs is found; the command of the finding lets it catch up."""

    def found() -> list[dict[str, str]]:
        document = json.loads(running.shoal("doctor", "--json", check=False).stdout)
        return [finding for finding in document["findings"] if finding["check"] == "connector-lags"]

    assert found() == []
    running.shoal("tenants", "set", "shop", "--rate", "1")
    rows = [json.dumps({"x": [n, 0, 0, 0]}).encode() for n in range(1_500)]
    for start in range(0, len(rows), 100):
        await kafka.publish(rows[start : start + 100])
    await until(lambda: (seen(running.gateway).lag or 0) > 1_300, "a lag", **PATIENT)
    finding: dict[str, str] = {}

    def is_found() -> bool:
        for each in found():
            finding.update(each)
        return bool(finding)

    await until(is_found, "the lag is found", **PATIENT)
    assert "its tenant shop may submit 1 jobs a second" in finding["what"]
    running.typed(finding["command"])
    await until(lambda: found() == [], "no finding", **PATIENT)
    await until(lambda: seen(running.gateway).lag == 0, "no lag", **PATIENT)
