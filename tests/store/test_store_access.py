"""Tenants and grants in the store: artifacts by their uploaders, models by grants, results by their tenants."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest

from mesh.mongo import connect
from mesh.rpc.access import Access
from services.store.config import StoreConfig
from services.store.documents import Collections
from services.store.registry.model_code import CONFIG_BYTES, Content, content_of
from services.store.registry.model_rules import File
from services.store.results.waiting import Waiters
from shoal.access import tokens
from shoal.access.caller_header import AS_SERVICE
from shoal.access.tokens import Signer
from shoal.store.v1 import store_pb2 as pb
from tests.access.policies import claims_of, key, passed, policy
from tests.store.conftest import Store, refused, running_store, sha256, upload

S = grpc.StatusCode
MODEL = b"the bytes of a model"
GRANTS: list[dict[str, Any]] = [
    {"name": "acme", "tenants": ["acme"], "models": ["acme-*", "shared"]},
    {"name": "globex", "tenants": ["globex"], "models": ["globex-*", "shared"]},
    {"name": "code", "tenants": ["acme"], "allow": ["code"], "models": ["acme-script"]},
]


class Served:
    """A store with a policy, and publishers of two tenants."""

    def __init__(self, store: Store, signer: Signer) -> None:
        self.store, self.stub = store, store.stub
        self.acme, self.globex = (
            {"metadata": (passed(claims_of(key(signer, tenant, "publisher"))),), "timeout": 30}
            for tenant in ("acme", "globex")
        )

    async def put(self, who: dict[str, Any], data: bytes, **header: object) -> pb.PutArtifactResponse:
        answer: pb.PutArtifactResponse = await self.stub.PutArtifact(iter(upload(data, **header)), **who)
        return answer

    async def register(self, who: dict[str, Any], name: str, **files: bytes) -> None:
        request = pb.RegisterModelRequest()
        request.model.name = name
        for path, data in files.items():
            request.model.files.add(path=path.replace("__", "../").replace("_", "."), sha256=sha256(data))
        await self.stub.RegisterModel(request, **who)


MIB = 1 << 20


async def test_one_tenant_does_not_fill_the_registry(config: StoreConfig, tmp_path: Path) -> None:
    signer = tokens.create_signer(tmp_path / "signer.json")
    small = config.model_copy(update={"registry_bytes": MIB})
    async with running_store(small, access=Access(policy(signer, grants=GRANTS))) as store:
        served = Served(store, signer)
        for who in (served.acme, served.globex):
            await served.put(who, MODEL)
        request = pb.RegisterModelRequest()
        request.model.name = "acme-1"
        for number in range(400):
            request.model.files.add(path=f"{number}{'/' + 200 * 'x'}", sha256=sha256(MODEL))
        # 0.12 MiB each; at once, too.
        outcomes = await asyncio.gather(*(_registered(served, request, version) for version in range(1, 13)))
        assert outcomes.count("") == 5
        wrong = [outcome for outcome in outcomes if outcome]
        assert all(each.startswith("RESOURCE_EXHAUSTED") and "twice what is free" in each for each in wrong)
        await served.register(served.globex, "globex-1", model_onnx=MODEL)
        # What is registered is no new version.
        first = next(number for number, outcome in enumerate(outcomes, 1) if not outcome)
        assert not await _registered(served, request, first)
        await served.stub.RemoveModel(pb.RemoveModelRequest(name="acme-1", version=first), **served.acme)
        assert not await _registered(served, request, 13)
        assert len((await served.stub.ListModels(pb.ListModelsRequest(), **served.acme)).models) == 5


async def _registered(served: Served, request: pb.RegisterModelRequest, version: int) -> str:
    """Register a version of the tenant acme; return the error, or an empty text."""
    numbered = pb.RegisterModelRequest()
    numbered.CopyFrom(request)
    numbered.model.version = version
    try:
        await served.stub.RegisterModel(numbered, **served.acme)
    except grpc.aio.AioRpcError as err:
        return f"{err.code().name}: {err.details()}"
    return ""


async def test_aliases_count_in_the_registry(config: StoreConfig, tmp_path: Path) -> None:
    signer = tokens.create_signer(tmp_path / "signer.json")
    small = config.model_copy(update={"registry_bytes": MIB})
    async with running_store(small, access=Access(policy(signer, grants=GRANTS))) as store:
        served = Served(store, signer)
        await served.put(served.acme, MODEL)
        await served.register(served.acme, "acme-1", model_onnx=MODEL)
        async with connect(config.mongo) as client:
            await client[config.database]["aliases"].insert_many(
                {"_id": f"acme-1/{n}", "name": "acme-1", "alias": str(n), "version": 1, "tenant": "acme"}
                for n in range(8_000)
            )

        def pointed(alias: str) -> pb.SetAliasRequest:
            return pb.SetAliasRequest(name="acme-1", alias=alias, version=1)

        await refused(served.stub.SetAlias(pointed("new"), **served.acme), S.RESOURCE_EXHAUSTED, "aliases")
        await served.stub.SetAlias(pb.SetAliasRequest(name="acme-1", alias="a1", version=0), **served.acme)


@pytest.fixture
async def served(config: StoreConfig, tmp_path: Path) -> AsyncIterator[Served]:
    signer = tokens.create_signer(tmp_path / "signer.json")
    async with running_store(config, access=Access(policy(signer, grants=GRANTS))) as store:
        yield Served(store, signer)


def stat(data: bytes) -> pb.StatArtifactRequest:
    return pb.StatArtifactRequest(sha256=sha256(data))


async def got(served: Served, who: dict[str, Any], data: bytes) -> bytes:
    call = served.stub.GetArtifact(pb.GetArtifactRequest(sha256=sha256(data)), **who)
    return b"".join([message.chunk async for message in call])


async def test_services_alone_see_who_registered_a_version(served: Served) -> None:
    await served.put(served.acme, MODEL)
    await served.register(served.acme, "shared", model_onnx=MODEL)
    for who, seen in (({"metadata": AS_SERVICE}, "acme"), (served.acme, ""), (served.globex, "")):
        watch = served.stub.WatchModels(pb.WatchModelsRequest(), **who)
        (version,) = (await watch.read()).snapshot
        assert version.tenant == seen
        watch.cancel()
    (listed,) = (await served.stub.ListModels(pb.ListModelsRequest(), **served.acme)).models
    assert listed.tenant == ""


async def test_equal_bytes_of_two_tenants_are_stored_once_and_sent_by_each(served: Served) -> None:
    assert not (await served.put(served.acme, MODEL)).existed
    await refused(served.stub.StatArtifact(stat(MODEL), **served.globex), S.NOT_FOUND)
    assert not (await served.put(served.globex, MODEL)).existed
    for who in (served.acme, served.globex):
        assert await got(served, who, MODEL) == MODEL
        assert (await served.put(who, MODEL)).existed
    assert len(served.store.blobs(sha256(MODEL))) == 1
    assert served.store.staged == []


async def test_an_unfinished_upload_is_its_tenants(served: Served) -> None:
    part = [pb.PutArtifactRequest(header={"sha256": sha256(MODEL), "size_bytes": len(MODEL)})]
    part.append(pb.PutArtifactRequest(chunk=MODEL[:5]))
    await refused(served.stub.PutArtifact(iter(part), **served.acme), S.INVALID_ARGUMENT, "offset 5")
    await refused(served.stub.StatArtifact(stat(MODEL), **served.globex), S.NOT_FOUND)
    wrong = upload(MODEL[:5] + b"x" * (len(MODEL) - 5), offset=5, sha256=sha256(MODEL))
    await refused(served.stub.PutArtifact(wrong, **served.globex), S.FAILED_PRECONDITION)
    assert (await served.stub.StatArtifact(stat(MODEL), **served.acme)).received_bytes == 5
    assert (await served.put(served.acme, MODEL, offset=5)).artifact.sha256 == sha256(MODEL)


async def test_files_of_a_model_are_read_by_those_who_may_read_the_model(served: Served) -> None:
    for name in ("acme-secret", "shared"):
        data = name.encode()
        await served.put(served.acme, data)
        await served.register(served.acme, name, model_onnx=data)
    assert await got(served, served.globex, b"shared") == b"shared"
    await refused(got(served, served.globex, b"acme-secret"), S.NOT_FOUND)
    listed = await served.stub.ListModels(pb.ListModelsRequest(), **served.globex)
    assert [model.name for model in listed.models] == ["shared"]
    watch = served.stub.WatchModels(pb.WatchModelsRequest(), **served.globex)
    assert [model.name for model in (await watch.read()).snapshot] == ["shared"]
    # A change that the caller may not see is not told.
    await served.put(served.acme, b"more")
    await served.register(served.acme, "acme-secret", model_onnx=b"more")
    await served.put(served.acme, b"other")
    await served.register(served.acme, "shared", model_onnx=b"other")
    assert [model.version for model in (await watch.read()).snapshot] == [1, 2]
    watch.cancel()
    every = await served.stub.ListModels(pb.ListModelsRequest(), metadata=AS_SERVICE)
    assert {model.name for model in every.models} == {"acme-secret", "shared"}
    # A file that one may not read cannot be given to a model of one's own.
    await refused(served.register(served.globex, "globex-copy", model_onnx=b"acme-secret"), S.NOT_FOUND)
    await refused(served.register(served.globex, "acme-secret", model_onnx=b"shared"), S.PERMISSION_DENIED)
    remove = pb.RemoveModelRequest(name="acme-secret")
    await refused(served.stub.RemoveModel(remove, **served.globex), S.PERMISSION_DENIED)


async def test_models_that_run_code_need_the_group_code(served: Served) -> None:
    script, remote = b"class TritonPythonModel: ...", b'backend: "remote"'
    for data in (script, remote, MODEL):
        await served.put(served.acme, data)
    await refused(served.register(served.acme, "acme-other", model_py=script), S.PERMISSION_DENIED, "code")
    await refused(served.register(served.acme, "acme-other", __config_pbtxt=remote), S.PERMISSION_DENIED, "code")
    await served.register(served.acme, "acme-other", model_onnx=MODEL)
    await served.register(served.acme, "acme-script", model_py=script)


async def test_an_ensemble_calls_only_models_that_its_publisher_may_call(served: Served) -> None:
    """Otherwise a publisher reaches each model by an ensemble of its own."""
    configs = {
        name: f'platform: "ensemble" ensemble_scheduling {{ step {{ model_name: "{name}" }} }}'.encode()
        for name in ("acme-secret", "shared")
    }
    for config in configs.values():
        await served.put(served.globex, config)
    secret = served.register(served.globex, "globex-all", __config_pbtxt=configs["acme-secret"])
    await refused(secret, S.PERMISSION_DENIED, "infer of the model 'acme-secret'")
    await served.register(served.globex, "globex-all", __config_pbtxt=configs["shared"])


async def test_only_services_refer_to_artifacts(served: Served) -> None:
    named = served.put(served.acme, MODEL, reference="job/another")
    await refused(named, S.PERMISSION_DENIED, "only services")
    for call in (
        served.stub.PutResults(pb.PutResultsRequest(), **served.acme),
        served.stub.ReleaseArtifacts(pb.ReleaseArtifactsRequest(references=["job/another"]), **served.acme),
        served.stub.ListReferences(pb.ListReferencesRequest(), **served.acme),
    ):
        await refused(call, S.PERMISSION_DENIED, "services only")
    put = await served.stub.PutArtifact(iter(upload(MODEL, reference="job/1", tenant="acme")), metadata=AS_SERVICE)
    assert put.artifact.sha256 == sha256(MODEL)
    # The payload of a job is an artifact of no tenant's publisher.
    await refused(served.stub.StatArtifact(stat(MODEL), **served.acme), S.NOT_FOUND)


async def test_removed_results_are_their_tenants(served: Served, config: StoreConfig) -> None:
    now = datetime(2026, 1, 2, tzinfo=UTC)
    tombstone = {
        "_id": "j",
        "outcome": 1,
        "code": 0,
        "attempt": 1,
        "stood_at": now,
        "removed_at": now,
        "tenant": "acme",
    }
    async with connect(config.mongo) as client:
        await client[config.database]["results"].insert_one(tombstone)
    request = pb.QueryResultsRequest(job_ids=["j"], include_removed=True)
    for tenant, expected in (("acme", ["j"]), ("globex", [])):
        header = (("x-shoal-tenant", tenant), *AS_SERVICE)
        found = await served.stub.QueryResults(request, metadata=header, timeout=30)
        assert [result.job_id for result in found.results] == expected


async def test_a_wait_does_not_end_with_another_tenants_result(config: StoreConfig) -> None:
    async with connect(config.mongo) as client:
        waiters = Waiters(Collections(client[config.database]))
        theirs, ours, any_of = (waiters.begin("j", tenant) for tenant in ("globex", "acme", None))
        document = {"_id": "j", "tenant": "acme"}
        waiters.notify([document])
        assert not theirs.done()
        assert (ours.result(), any_of.result()) == (document, document)
        for future in (theirs, ours, any_of):
            waiters.end("j", future)


CASES: Sequence[tuple[str, str | None, bool]] = [
    ("model.onnx", None, False),
    ("model.onnx", "max_batch_size: 8", False),
    ("model.onnx", 'backend: "onnxruntime"', False),
    ("model.onnx", 'platform: "onnxruntime_onnx"', False),
    ("model.onnx", 'backend: "kernels"', False),
    ("model.onnx", 'platform: "ensemble" ensemble_scheduling {}', False),
    ("model.onnx", 'parameters { key: "isolation" value { string_value: "process" } }', False),
    ("model.py", None, True),
    ("weights/Model.PY", None, True),
    ("custom.so", None, True),
    ("model.onnx", 'backend: "python"', True),
    ("model.onnx", 'backend: "remote"', True),
    ("model.onnx", 'backend: "onnxruntime" platform: "python"', True),
    ("model.onnx", 'runtime: "python"', True),
    ("model.onnx", 'backend: "unknown"', True),
    ("model.onnx", 'parameters { key: "session.x" value { string_value: "/etc/passwd" } }', True),
    ("model.onnx", 'parameters { key: "metadata.x" value { string_value: "${env:HOME}" } }', True),
    ("model.onnx", "no configuration {", True),
    ("model.onnx", "no_such_field: 1", True),
    ("model.onnx", "a{" * 1_000, True),
    ("model.onnx", "\udcff", True),
]


@pytest.mark.parametrize(("path", "config", "expected"), CASES)
def test_code_is_found(path: str, config: str | None, expected: bool) -> None:
    text = None if config is None else config.encode(errors="surrogateescape")
    assert content_of([File(path, "", 0)], text).has_code == expected


def test_the_models_that_an_ensemble_calls_are_found() -> None:
    steps = "".join(f'step {{ model_name: "{name}" }} ' for name in ("b", "a", "b"))
    config = f'platform: "ensemble" ensemble_scheduling {{ {steps} }}'.encode()
    assert content_of([File("../config.pbtxt", "", 0)], config) == Content(has_code=False, called=("b", "a"))


@pytest.mark.parametrize("part", ["a:1 ", "a{", "input{}", "\n", '"'])
def test_a_long_configuration_is_judged_in_a_moment(part: str) -> None:
    config = (part * (CONFIG_BYTES // len(part))).encode()
    began = time.thread_time()
    content_of([File("../config.pbtxt", "", 0)], config)
    # Unknown fields in one line took seven minutes.
    assert time.thread_time() - began < 20
