"""The store as a process: `python -m services.store`, its environment, its end, and its sudden end."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import grpc
import pytest
from grpc import StatusCode

from mesh.rpc.channel import connect
from services.store.config import StoreConfig
from shoal.store.v1 import store_pb2 as pb
from shoal.store.v1 import store_pb2_grpc
from tests.breakable import Process, until
from tests.free_ports import free_port
from tests.store.conftest import Store, header, refused, serving, sha256

pytestmark = pytest.mark.mongo

MIB = 1 << 20


def environment(config: StoreConfig) -> dict[str, str]:
    fields = {"instance", "listen", "mongo", "database", "blobs"}
    return {f"SHOAL_STORE_{name.upper()}": str(value) for name, value in config.model_dump(include=fields).items()}


def process(config: StoreConfig, python: str, log: Path, **env: str) -> Process:
    return Process([python, "-m", "services.store"], log, {**environment(config), **env})


def store_at(config: StoreConfig, channel: grpc.aio.Channel) -> Store:
    return Store(config, store_pb2_grpc.StoreServiceStub(channel), channel)


async def test_a_good_stop(config: StoreConfig, python: str, tmp_path: Path) -> None:
    with process(config, python, tmp_path / "log") as store:
        async with connect(config.listen) as channel:
            await until(lambda: serving(channel), "the store serves")
            await store_at(config, channel).put(b"abc")
            watch = store_at(config, channel).stub.WatchModels(pb.WatchModelsRequest(), timeout=60)
            await watch.read()
            assert store.terminate(30) == 0, store.log.read_text()
            await refused(watch, StatusCode.UNAVAILABLE, "stopping")
    assert not Path(config.listen.removeprefix("unix:")).exists()


async def test_kill_9_in_the_middle_of_an_upload(config: StoreConfig, python: str, tmp_path: Path) -> None:
    data = os.urandom(6 * MIB + 3)
    digest = sha256(data)
    half = 3 * MIB

    async with connect(config.listen) as channel:
        store = store_at(config, channel)
        with process(config, python, tmp_path / "log") as running:
            await until(lambda: serving(channel), "the store serves")

            async def stalled():
                yield header(sha256=digest, size_bytes=len(data))
                for at in range(0, half, MIB):
                    yield pb.PutArtifactRequest(chunk=data[at : at + MIB])
                await until(lambda: not running.is_running(), "the store is killed")

            call = store.stub.PutArtifact(stalled())
            await until(lambda: [p.stat().st_size for p in store.staged] == [half], "half has arrived")
            running.kill()
            await refused(call, StatusCode.UNAVAILABLE)

            running.start()
            await until(lambda: serving(channel), "the store serves again")
            request = pb.StatArtifactRequest(sha256=digest)
            stat = await store.stub.StatArtifact(request, wait_for_ready=True)
            assert (stat.HasField("artifact"), stat.received_bytes) == (False, half)
            answer = await store.put(data, offset=half)
            assert (answer.existed, answer.artifact.size_bytes) == (False, len(data))
            running.kill()

            running.start()
            await until(lambda: serving(channel), "the store serves for the third time")
            assert await store.get(digest) == (len(data), data)
            assert store.staged == []


async def test_a_stop_while_mongodb_is_away(config: StoreConfig, python: str, tmp_path: Path) -> None:
    away = f"mongodb://127.0.0.1:{free_port()}/?directConnection=true"
    with process(config, python, tmp_path / "log", SHOAL_STORE_MONGO=away) as store:
        async with connect(config.listen) as channel:
            await channel.channel_ready()
            assert not await serving(channel)
            assert store.terminate(30) == 0, store.log.read_text()


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"SHOAL_STORE_MONGO": "localhost"}, ["SHOAL_STORE_MONGO"]),
        ({"SHOAL_STORE_BLOBS": "memory:///"}, ["SHOAL_STORE_BLOBS"]),
        ({"SHOAL_STORE_BLOBS": "s3://bucket"}, ["SHOAL_STORE_STAGING"]),
        ({"SHOAL_STORE_STAGING": "/tmp"}, ["SHOAL_STORE_STAGING"]),
        ({"SHOAL_STORE_MAX_UPLOADS": "0"}, ["SHOAL_STORE_MAX_UPLOADS"]),
        ({"SHOAL_STORE_COLOUR": "red"}, ["SHOAL_STORE_COLOUR", "SHOAL_STORE_MONGO"]),
    ],
)
def test_a_wrong_configuration_is_named(
    config: StoreConfig, python: str, env: dict[str, str], words: list[str]
) -> None:
    whole = {**os.environ, **environment(config), **env}
    done = subprocess.run([python, "-m", "services.store"], env=whole, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert all(word in done.stderr for word in words), done.stderr
    assert "Traceback" not in done.stderr
