"""etcd, mongod and Envoy start, and start again on another port."""

from __future__ import annotations

import asyncio
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
