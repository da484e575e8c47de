"""The client and its commands against a real node: every service, Envoy, etcd and MongoDB, and what happens to them."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import signal
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import shoal
from shoal.client import AsyncClient, JobRequest, JobState
from shoal.errors import (
    AlreadyExists,
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ShoalError,
)
from tests.breakable import until
from tests.node.conftest import python_model
from tests.node.one_node.conftest import is_whole

pytestmark = pytest.mark.node

ROW = np.float32([[1, 2, 3, 4]])
# On a busy machine, a process that was killed takes longer to start than the client waits for it by default.
PATIENT = shoal.RetryPolicy(attempts=60, stream_attempts=60)


@pytest.fixture
async def client(running: Any) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(running.gateway, retry=PATIENT) as client:
        yield client


def test_blocking_infer_from_lists_and_arrays(running: Any) -> None:
    with shoal.Client(running.gateway) as client:
        result = client.infer("double", {"x": ROW}, parameters={"explain": True}, request_id="r")
        np.testing.assert_array_equal(result["y"], ROW * 2)
        assert (result.model_name, result.model_version, result.id) == ("double", "1", "r")
        assert str(result.parameters["replica"]).startswith("local/infer-")
        assert result.parameters["batch_size"] == 1
        assert client.infer("double", {"x": [[1, 2, 3, 4]]})["y"].tolist() == [[2, 4, 6, 8]]
        answers = client.infer_stream(shoal.InferRequest("double", {"x": ROW * n}, request_id=str(n)) for n in range(5))
        assert {answer.id: answer["y"][0, 0] for answer in answers} == {str(n): 2.0 * n for n in range(5)}


async def test_what_a_model_is(client: AsyncClient) -> None:
    assert await client.models.ready("double")
    assert not await client.models.ready("nothing")
    metadata = await client.models.metadata("double")
    assert [(t.name, t.datatype, t.shape) for t in metadata.inputs] == [("x", "FP32", (-1, 4))]
    assert (await client.models.config("double"))["name"] == "double"
    [statistics] = await client.models.statistics("double")
    assert statistics.version == "1"
    [version] = await client.models.list("double")
    assert (version.version, version.files[0].path) == (1, "model.onnx")
    assert {entry.name for entry in await client.models.index()} >= {"double", "slow"}


async def test_errors_are_the_services_own(client: AsyncClient) -> None:
    with pytest.raises(NotFound, match="unknown model: 'nothing'"):
        await client.infer("nothing", {"x": ROW})
    with pytest.raises(InvalidArgument, match="x"):
        await client.infer("double", {"x": np.zeros((1, 5), np.float32)})
    with pytest.raises(InvalidArgument, match="x"):
        await client.infer("double", {"x": ROW.astype(np.float64)})
    with pytest.raises(DeadlineExceeded):
        await client.infer("slow", {"x": np.ones((64, 4), np.float32)}, timeout=0.02)
    with pytest.raises(NotFound):
        await client.jobs.get("01JD8Y3V5M2Q4R6T8W0X2Z4B6D")
    with pytest.raises(NotFound):
        await client.models.remove("nothing")


async def test_a_folder_with_versions_an_alias_and_back_again(
    client: AsyncClient, onnx_models: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "versions"
    model = (onnx_models / "double.onnx").read_bytes()
    for version in (1, 2):
        (folder / str(version)).mkdir(parents=True)
        (folder / str(version) / "model.onnx").write_bytes(model)
    (folder / "config.pbtxt").write_text("max_batch_size: 8\nversion_policy { all {} }\n")
    pushed = await client.models.push(folder, alias="stable")
    assert [(p.model.version, p.ready) for p in pushed] == [(1, True), (2, True)]
    assert pushed[-1].model.aliases == ("stable",)
    assert pushed[1].sent_bytes == 0 or pushed[0].sent_bytes == 0 or pushed[0].sent_bytes == pushed[1].sent_bytes
    assert [p.existed for p in await client.models.push(folder)] == [True, True]
    assert (await client.infer("versions", {"x": ROW}, version=1)).model_version == "1"
    await client.models.alias("versions", "stable", 1)
    await until(lambda: answers_as(client, "versions", "1"), "the alias")
    home = await client.models.pull("versions", 2, into=tmp_path / "back")
    assert (home / "2/model.onnx").read_bytes() == model
    assert (home / "config.pbtxt").read_bytes() == (folder / "config.pbtxt").read_bytes()
    (folder / "1/model.onnx").write_bytes(model + b"\0")
    with pytest.raises(AlreadyExists):
        await client.models.push(folder, version=1)
    removed = await client.models.remove("versions")
    assert [version.version for version in removed] == [1, 2]


async def answers_as(client: AsyncClient, model: str, version: str) -> bool:
    return (await client.infer(model, {"x": ROW})).model_version == version


async def test_a_model_that_cannot_be_loaded_says_why_and_leaves_nothing(
    running: Any, client: AsyncClient, onnx_models: Path, tmp_path: Path
) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"this is no model")
    with pytest.raises(FailedPrecondition, match=r"broken cannot be loaded: .+"):
        await client.models.push(tmp_path / "broken.onnx", timeout=60)
    await client.models.push(onnx_models / "double.onnx", "broken")
    # The served version stays.
    with pytest.raises(FailedPrecondition, match=r"broken version 2 cannot be loaded: .+"):
        await client.models.push(tmp_path / "broken.onnx", version=2, timeout=60)
    assert [version.version for version in await client.models.list("broken")] == [1]
    assert (await client.infer("broken", {"x": ROW})).model_version == "1"
    assert await client.ready()
    # Untried, it is registered, and does not keep the server from being ready for ever.
    with pytest.raises(FailedPrecondition, match=r"worse version 1 cannot be loaded: .+"):
        await client.models.push(tmp_path / "broken.onnx", "worse", check=False, timeout=60)
    assert await client.ready()
    for name in ("broken", "worse"):
        await client.models.remove(name)


async def test_a_model_that_ends_every_instance_is_not_registered(
    running: Any, client: AsyncClient, tmp_path: Path
) -> None:
    deadly = (
        "import os\n\nclass TritonPythonModel:\n    def initialize(self, args):\n        os._exit(13)\n"
        "    def execute(self, requests):\n        pass\n"
    )
    folder = python_model(tmp_path / "deadly", deadly)
    ports = '{ name: "x" data_type: TYPE_FP32 dims: [4] }'
    with (folder / "config.pbtxt").open("a") as file:
        file.write(f"input {ports}\noutput {ports.replace('x', 'y')}\n")

    def restarts() -> int:
        return len(re.findall(r"infer-\d restarted", running.output.read_text()))

    before = restarts()
    calls = asyncio.create_task(calls_until_cancelled(client))
    with pytest.raises(
        FailedPrecondition, match=r"deadly version 1 is not registered, .* ended meanwhile: local/infer"
    ):
        await client.models.push(folder, timeout=120)
    assert not await client.models.list("deadly")
    with shoal.Client(running.gateway) as blocking:
        await until(lambda: restarts() == before + 2 and is_whole(running, blocking), "the instances are back")
    # One instance was always there: no call failed.
    assert not calls.done(), await calls
    calls.cancel()


async def calls_until_cancelled(client: AsyncClient) -> None:
    while True:
        await client.infer("double", {"x": ROW}, retries=0)
        await asyncio.sleep(0.01)


async def test_two_pushes_of_one_name_at_once_are_two_versions(
    client: AsyncClient, onnx_models: Path, tmp_path: Path
) -> None:
    content = (onnx_models / "double.onnx").read_bytes()
    paths = [tmp_path / f"{number}.onnx" for number in range(2)]
    for number, path in enumerate(paths):
        # A field that ONNX Runtime ignores makes the two files different.
        path.write_bytes(content + b"\x32\x01%d" % number)
    outcomes = await asyncio.gather(
        *(client.models.push(path, "twins", check=number > 0, wait=False) for number, path in enumerate(paths))
    )
    assert {pushed.model.version for [pushed] in outcomes} == {1, 2}
    versions = {version.version: version.files[0].sha256 for version in await client.models.list("twins")}
    for path, [pushed] in zip(paths, outcomes, strict=True):
        assert versions[pushed.model.version] == hashlib.sha256(path.read_bytes()).hexdigest()
    await client.models.remove("twins")


async def test_statistics_of_the_gateway_cover_both_replicas(client: AsyncClient, onnx_models: Path) -> None:
    await client.models.push(onnx_models / "double.onnx", "counted")
    replicas = set()
    calls = 0
    while len(replicas) < 2 or calls < 20:
        result = await client.infer("counted", {"x": ROW}, parameters={"explain": True})
        replicas.add(result.parameters["replica"])
        calls += 1
    for _ in range(10):
        [statistics] = await client.models.statistics("counted")
        assert (statistics.inference_count, statistics.success.count) == (calls, calls)
        assert statistics.batches[1].count == calls
    assert {"counted", "double", "slow"} <= {each.name for each in await client.models.statistics()}
    await client.models.remove("counted")


async def test_an_old_version_that_is_not_served_says_so(client: AsyncClient, onnx_models: Path) -> None:
    path = onnx_models / "double.onnx"
    await client.models.push(path, "aged", 5)
    with pytest.raises(FailedPrecondition, match="aged version 3 is registered but not served"):
        await client.models.push(path, "aged", 3)
    [pushed] = await client.models.push(path, "aged", 3, alias="stable")
    assert pushed.ready
    await client.models.remove("aged")


async def test_a_large_file_survives_the_death_of_the_store(running: Any, client: AsyncClient, tmp_path: Path) -> None:
    path = tmp_path / "large.onnx"
    path.write_bytes(os.urandom(48 << 20))
    killed: list[int] = []

    def progress(progress: Any) -> None:
        if progress.done_bytes >= 16 << 20 and not killed:
            killed.append(running.kill("store-0"))

    [pushed] = await client.models.push(path, check=False, wait=False, progress=progress)
    assert killed
    assert pushed.model.size_bytes == 48 << 20
    home = await client.models.pull("large", into=tmp_path / "back")
    assert (home / "1/model.onnx").read_bytes() == path.read_bytes()
    await client.models.remove("large")


async def test_jobs_from_submit_to_result(client: AsyncClient) -> None:
    key = uuid.uuid4().hex
    job = await client.jobs.submit("double", {"x": ROW}, idempotency_key=key, labels={"a": "b"})
    assert (await client.jobs.submit("double", {"x": ROW}, idempotency_key=key, labels={"a": "b"})).id == job.id
    with pytest.raises(AlreadyExists):
        await client.jobs.submit("double", {"x": ROW * 2}, idempotency_key=key)
    answer = await client.jobs.result(job.id)
    np.testing.assert_array_equal(answer["y"], ROW * 2)
    assert answer.parameters == {}  # Nobody asked to have it explained.
    states = [seen.state async for seen in client.jobs.watch(job.id)]
    assert states[-1] is JobState.SUCCEEDED
    assert (await client.jobs.get(job.id)).labels == {"a": "b"}
    assert job.id in [listed.id for listed in await client.jobs.list(state=JobState.SUCCEEDED, model="double")]
    assert (await client.jobs.cancel(job.id)).state is JobState.SUCCEEDED


async def test_jobs_that_end_without_an_answer(client: AsyncClient) -> None:
    job = await client.jobs.submit("double", {"x": np.zeros((1, 5), np.float32)})
    with pytest.raises(InvalidArgument, match=f"job {job.id} failed"):
        await client.jobs.result(job.id)
    job = await client.jobs.submit("nowhere", {"x": ROW}, deadline=0.5)
    with pytest.raises(ShoalError, match=f"job {job.id}"):
        await client.jobs.result(job.id)
    blocker = [await client.jobs.submit("slow", {"x": np.ones((32, 4), np.float32)}) for _ in range(4)]
    job = await client.jobs.submit("slow", {"x": ROW})
    cancelled = await client.jobs.cancel(job.id, "changed my mind")
    if cancelled.state is JobState.CANCELLED:
        with pytest.raises(Cancelled, match=f"job {job.id} was cancelled"):
            await client.jobs.result(job.id)
    for each in blocker:
        await client.jobs.result(each.id)


async def test_a_stream_of_jobs_outlives_ingest_and_envoy(running: Any, client: AsyncClient) -> None:
    count, acks = 400, {}
    requests = [JobRequest("double", {"x": ROW * n}, labels={"n": str(n)}) for n in range(count)]

    async def paced() -> AsyncIterator[JobRequest]:
        for n, request in enumerate(requests):
            if n == 100:
                running.kill("ingest-0")
            if n == 250:
                running.kill("envoy")
            await asyncio.sleep(0)
            yield request

    async for ack in client.jobs.submit_many(paced(), window=32):
        assert ack.error is None
        acks[ack.index] = ack.job_id
    assert sorted(acks) == list(range(count))
    assert len(set(acks.values())) == count

    async def value(job_id: str) -> float:
        return float((await client.jobs.result(job_id, timeout=90))["y"][0, 0])

    values = await asyncio.gather(*(value(acks[n]) for n in range(count)))
    assert values == [2.0 * n for n in range(count)]


async def test_a_watch_outlives_envoy(running: Any, client: AsyncClient) -> None:
    job = await client.jobs.submit("nowhere", {"x": ROW}, deadline=5)
    seen: list[JobState] = []
    async for state in client.jobs.watch(job.id):
        if not seen:
            running.kill("envoy")
        seen.append(state.state)
    assert seen[-1] in (JobState.EXPIRED, JobState.FAILED, JobState.DEAD)


async def test_status_sees_everything(running: Any, client: AsyncClient) -> None:
    async def whole() -> bool:
        nonlocal status
        status = await client.status()
        services = sorted(instance.service for instance in status.instances if instance.state == "ready")
        return status.healthy and services == ["coord", "infer", "infer", "ingest", "store"]

    # The test before has killed the Envoy.
    status = await client.status()
    await until(whole, "a whole node without problems")
    assert status.leader is not None
    assert {model.name for model in status.models} >= {"double", "slow"}
    assert [envoy.node for envoy in status.envoys] == ["local"]


async def test_calls_outlive_a_dying_replica(running: Any, client: AsyncClient) -> None:
    async def ask(n: int) -> None:
        result = await client.infer("double", {"x": ROW * n})
        assert result["y"][0, 0] == 2 * n

    for n in range(300):
        if n == 100:
            running.kill("infer-0")
        await ask(n)


def test_the_commands(running: Any, onnx_models: Path, tmp_path: Path) -> None:
    pushed = running.shoal(
        "models", "push", str(onnx_models / "double.onnx"), "--name", "by-command", "--alias", "stable"
    )
    assert "by-command version 1: registered" in pushed.stdout
    assert "ready" in pushed.stdout
    [entry] = json.loads(running.shoal("models", "list", "by-command", "--json").stdout)
    assert entry["aliases"] == ["stable"]
    answer = json.loads(running.shoal("infer", "by-command", '{"x": [1, 2, 3, 4]}', "--json").stdout)
    assert answer["outputs"] == [{"name": "y", "datatype": "FP32", "shape": [1, 4], "data": [[2.0, 4.0, 6.0, 8.0]]}]
    job_id = running.shoal("jobs", "submit", "by-command", "[[1, 2, 3, 4]]").stdout.strip()
    result = json.loads(running.shoal("jobs", "result", job_id, "--json").stdout)
    assert result["outputs"] == answer["outputs"]
    assert running.shoal("jobs", "watch", job_id).stdout.split()[-1]
    assert job_id in running.shoal("jobs", "list", "--model", "by-command").stdout
    status = json.loads(running.shoal("status", "--json").stdout)
    assert status["envoy"]["endpoints"]
    assert {e["cluster"] for e in status["envoy"]["endpoints"]} >= {"infer", "store", "ingest", "coord"}
    table = running.shoal("status").stdout
    assert "local/infer-1" in table
    assert "by-command" in table
    failed = running.shoal("infer", "by-command", '{"z": [1]}', check=False)
    assert (failed.returncode, failed.stdout) == (2, "")
    assert "has no input 'z'" in failed.stderr
    assert "Traceback" not in failed.stderr
    running.shoal("models", "remove", "by-command")


def test_ctrl_c_ends_a_command_that_waits(running: Any) -> None:
    import subprocess
    import sys

    with shoal.Client(running.gateway) as client:
        job = client.jobs.submit("nowhere", {"x": ROW}, deadline=60)
        command = [sys.executable, "-m", "shoal.cli.main", "jobs", "watch", job.id, "--json"]
        process = subprocess.Popen(
            command, env=running.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["id"] == job.id
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode != 0
        assert "Traceback" not in err
        client.jobs.cancel(job.id)
