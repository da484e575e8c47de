"""etcd, mongod and Envoy start, and start again at another address."""

from __future__ import annotations

import asyncio
import http.client
import os
import stat
from dataclasses import replace
from pathlib import Path

import aetcd
import pytest
from pymongo import AsyncMongoClient

from mesh.cluster.etcd import Etcd
from shoal.errors import FailedPrecondition
from shoal.node import processes, versions
from tests.free_ports import free_port


async def test_the_mongod_of_the_tests_is_a_replica_set(mongo_uri: str, mongo_database: str) -> None:
    async with AsyncMongoClient(mongo_uri) as client:
        async with client.start_session() as session, await session.start_transaction():
            await client[mongo_database]["x"].insert_one({"a": 1}, session=session)
        assert await client[mongo_database]["x"].count_documents({}) == 1


async def test_the_etcd_of_the_tests_answers(etcd_address: str) -> None:
    host, _, port = etcd_address.partition(":")
    async with aetcd.Client(host, int(port), timeout=30) as client:
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
    argv = processes.mongod(tmp_path, "127.0.0.1:1").argv
    assert float(argv[argv.index("--oplogMinRetentionHours") + 1]) > 0
    assert int(argv[argv.index("--oplogSize") + 1]) >= 256


async def until_ready(part: processes.ProcessSpec) -> asyncio.subprocess.Process:
    process = await asyncio.create_subprocess_exec(*part.argv, stdout=asyncio.subprocess.DEVNULL, cwd=part.cwd)
    async with asyncio.timeout(60):
        while not await part.ready():
            await asyncio.sleep(0.05)
    return process


@pytest.mark.mongo
async def test_a_mongod_keeps_its_data_when_it_moves_from_a_port_to_a_socket(tmp_path: Path, run_dir: Path) -> None:
    for address in (f"127.0.0.1:{free_port()}", f"unix:{run_dir}/1.sock", f"unix:{run_dir}/2.sock"):
        process = await until_ready(processes.mongod(tmp_path, address))
        try:
            # As the services do: by the name of the set, whose member is then called by its address.
            async with AsyncMongoClient(f"{processes.mongo_uri(address)}?replicaSet=rs0") as client:
                await client["test"]["x"].insert_one({})
                count = await client["test"]["x"].count_documents({})
            if address.startswith("unix:"):
                assert stat.S_IMODE(os.stat(address.removeprefix("unix:")).st_mode) == 0o600
        finally:
            process.terminate()
            await process.wait()
    assert count == 3


@pytest.mark.etcd
async def test_an_etcd_keeps_its_data_when_it_moves_from_a_port_to_a_socket(tmp_path: Path, run_dir: Path) -> None:
    tcp = tuple(f"127.0.0.1:{free_port()}" for _ in range(2))
    for number, (address, peer) in enumerate((tcp, *[(f"unix:{run_dir}/etcd:0", f"unix:{run_dir}/peer:0")] * 2)):
        process = await until_ready(processes.etcd(tmp_path / "etcd", address, peer))
        try:
            async with Etcd(address, timeout_s=30) as etcd:
                await etcd.put(b"/test/%d" % number, b"here")
                count = len((await etcd.list(b"/test/")).entries)
        finally:
            # A killed one leaves its sockets behind.
            process.kill()
            await process.wait()
    assert count == 3
    assert {path.name for path in run_dir.iterdir()} == {"etcd:0", "peer:0"}


async def test_an_etcd_that_may_lose_writes_is_named(tmp_path: Path) -> None:
    spec = processes.etcd(tmp_path, "127.0.0.1:1", "127.0.0.1:2")
    for said, version, count in (
        ("etcd Version: 3.5.1", "3.5.1", 1),
        ("etcd Version: 3.5.16", "3.5.16", 0),
        ("etcd Version: 3.10.0", "3.10.0", 0),
        ("no word of it", "", 0),
    ):
        binary = tmp_path / "etcd"
        binary.write_text(f"#!/bin/sh\necho '{said}'\n")
        binary.chmod(0o700)
        known = await versions.found([replace(spec, argv=(str(binary),))])
        assert known == ({"etcd": version} if version else {})
        assert len(versions.warnings(known)) == count
    assert await versions.found([replace(spec, argv=(str(tmp_path / "none"),))]) == {}


def test_a_missing_binary_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FailedPrecondition, match="SHOAL_ETCD_BINARY=/nowhere: no executable file"):
        processes.find_binary("etcd", {"SHOAL_ETCD_BINARY": "/nowhere"})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FailedPrecondition, match="no etcd found: install it"):
        processes.find_binary("etcd", {"PATH": ""})
