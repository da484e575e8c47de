"""etcd, mongod and Envoy start, and start again on another port."""

from __future__ import annotations

import asyncio
import http.client
from pathlib import Path

import aetcd
import pytest
from pymongo import AsyncMongoClient

from shoal.errors import FailedPrecondition
from shoal.node import processes


async def test_the_mongod_of_the_tests_is_a_replica_set(mongo_uri: str, mongo_database: str) -> None:
    async with AsyncMongoClient(mongo_uri) as client:
        async with client.start_session() as session, await session.start_transaction():
            await client[mongo_database]["x"].insert_one({"a": 1}, session=session)
        assert await client[mongo_database]["x"].count_documents({}) == 1


async def test_the_etcd_of_the_tests_answers(etcd_address: str) -> None:
    host, _, port = etcd_address.partition(":")
    async with aetcd.Client(host, int(port), timeout=2) as client:
        await client.put(b"/test/parts", b"here")
        assert (await client.get(b"/test/parts")).value == b"here"


def test_a_web_page_cannot_write_to_etcd(etcd_address: str) -> None:
    connection = http.client.HTTPConnection(etcd_address, timeout=30)
    page = {"origin": "https://evil.example", "content-type": "text/plain"}
    connection.request("POST", "/v3/kv/put", b'{"key": "L2V2aWw=", "value": "eA=="}', page)
    assert connection.getresponse().status == 404
    connection.close()


@pytest.mark.parametrize(
    ("free_gib", "mib", "hours"),
    [(0, 256, 0.0), (1, 256, 0.006), (20, 1_024, 0.1193), (200, 10_240, 1.0), (9_999, 16_384, 1.0)],
)
def test_the_log_of_mongod_has_an_hour_where_the_disk_has_room_for_it(free_gib: int, mib: int, hours: float) -> None:
    assert processes.oplog(free_gib << 30) == (mib, hours)


def test_mongod_keeps_its_log_for_a_time_and_not_for_a_size_alone(tmp_path: Path) -> None:
    argv = processes.mongod(tmp_path, 1).argv
    assert float(argv[argv.index("--oplogMinRetentionHours") + 1]) > 0
    assert int(argv[argv.index("--oplogSize") + 1]) >= 256


async def until_ready(part: processes.ProcessSpec) -> asyncio.subprocess.Process:
    process = await asyncio.create_subprocess_exec(*part.argv, stdout=asyncio.subprocess.DEVNULL)
    async with asyncio.timeout(30):
        while not await part.ready():
            await asyncio.sleep(0.05)
    return process


async def test_a_mongod_keeps_its_data_when_its_port_changes(tmp_path: Path) -> None:
    for _ in range(2):
        port = processes.free_port()
        process = await until_ready(processes.mongod(tmp_path, port))
        try:
            async with AsyncMongoClient(f"mongodb://127.0.0.1:{port}/?directConnection=true") as client:
                await client["test"]["x"].insert_one({})
                count = await client["test"]["x"].count_documents({})
        finally:
            process.terminate()
            await process.wait()
    assert count == 2


def test_a_missing_binary_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FailedPrecondition, match="SHOAL_ETCD_BINARY=/nowhere: no executable file"):
        processes.find_binary("etcd", {"SHOAL_ETCD_BINARY": "/nowhere"})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FailedPrecondition, match="no etcd found: install it"):
        processes.find_binary("etcd", {"PATH": ""})
