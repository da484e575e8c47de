"""Decisions by model in infer: each place where a model's name is read, on the fast path and beside it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mesh.rpc.access import CALLER, Access
from services.infer.config import InferConfig
from services.infer.policy_file import followed
from services.infer.scheduling.queue import QueueLimits
from shoal.access import tokens
from shoal.access.tokens import Key, Signer
from shoal.errors import ERROR_CODE_PARAMETER, Code, PermissionDenied
from shoal.inference.v2 import bulk_pb2, bulk_pb2_grpc
from shoal.inference.v2 import inference_pb2 as pb
from tests.access.policies import claims_of, key, passed, policy
from tests.breakable import until
from tests.infer import onnx_files
from tests.infer.conftest import Repository, Serving, floats, request, serving
from tests.mesh.http1.raw import RawClient

X = floats([1, 2, 3, 4])
# An ensemble whose only step is the model `secret`.
ENSEMBLE = """
platform: "ensemble" max_batch_size: 8
input [{ name: "x" data_type: TYPE_FP32 dims: 4 }] output [{ name: "y" data_type: TYPE_FP32 dims: 4 }]
ensemble_scheduling { step { model_name: "secret" model_version: -1
  input_map { key: "x" value: "x" } output_map { key: "y" value: "y" } } }
"""


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Signer:
    return tokens.create_signer(tmp_path_factory.mktemp("signer") / "signer.json")


@pytest.fixture
def access(signer: Signer) -> Access:
    grants = [
        {"name": "acme", "tenants": ["acme"], "models": ["open*", "both"]},
        {"name": "globex", "tenants": ["globex"], "models": ["*"]},
    ]
    return Access(policy(signer, grants=grants))


@pytest.fixture
async def served(access: Access, models_folder: Repository, run_dir: Path) -> AsyncIterator[Serving]:
    models_folder.bare("open", onnx_files.scale(2))
    models_folder.bare("secret", onnx_files.scale(3))
    (models_folder.root / "both" / "1").mkdir(parents=True)
    (models_folder.root / "both" / "config.pbtxt").write_text(ENSEMBLE)
    async with serving(models_folder.root, run_dir / "infer.sock", QueueLimits(), access=access) as running:
        yield running


def by(made: Key) -> tuple[tuple[str, str]]:
    return (passed(claims_of(made)),)


async def code_of(call: Any) -> str:
    return (await call.code()).name


async def test_each_call_is_decided_by_its_own_model_on_both_paths(served: Serving, signer: Signer) -> None:
    acme, globex = by(key(signer, "acme")), by(key(signer, "globex"))
    # The first call of each form takes the slow path, and teaches the fast path.
    for _ in range(3):
        for model, caller, expected in [
            ("open", acme, "OK"),
            ("secret", globex, "OK"),
            ("secret", acme, "PERMISSION_DENIED"),
            ("nothing", acme, "PERMISSION_DENIED"),
            ("nothing", globex, "NOT_FOUND"),
            ("open", (), "UNAUTHENTICATED"),
            ("open", by(key(signer, "acme", "viewer")), "PERMISSION_DENIED"),
            ("open", by(key(signer, "globex", models=["secret"])), "PERMISSION_DENIED"),
        ]:
            call = served.stub.ModelInfer(request(model, x=X), metadata=caller, timeout=30)
            assert await code_of(call) == expected, (model, caller)


async def test_each_call_over_rest_is_decided_by_its_own_model(served: Serving, signer: Signer) -> None:
    acme, globex = key(signer, "acme"), key(signer, "globex")
    tensor = {"name": "x", "shape": [1, 4], "datatype": "FP32", "parameters": {"binary_data_size": X.nbytes}}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    length = f"Inference-Header-Content-Length: {len(head)}"
    async with await RawClient.connect(served.server.address) as client:
        # The first allowed call of each form takes the slow path, and teaches the fast path.
        for _ in range(3):
            for model, caller, status in [
                ("open", acme, 200),
                ("secret", globex, 200),
                ("secret", acme, 403),
                ("open", None, 401),
                ("open", key(signer, "acme", "viewer"), 403),
                ("open", key(signer, "globex", models=["secret"]), 403),
            ]:
                headers = [] if caller is None else [": ".join(passed(claims_of(caller)))]
                path = f"/v2/models/{model}/infer"
                answer = await client.request("POST", path, head + X.tobytes(), length, *headers)
                assert answer.status == status, (model, caller)


async def test_a_second_name_in_one_message_is_the_one_that_is_decided_and_served(
    served: Serving, signer: Signer
) -> None:
    acme = by(key(signer, "acme"))
    known = request("open", x=X).SerializeToString()
    infer = served.channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
    second = pb.ModelInferRequest(model_name="secret").SerializeToString()
    for body in (known, known, known + second, second + known, known):
        call = infer(body, metadata=acme, timeout=30)
        expected = "PERMISSION_DENIED" if body.endswith(second) else "OK"
        assert await code_of(call) == expected
        if expected == "OK":
            answer = pb.ModelInferResponse.FromString(await call)
            assert np.frombuffer(answer.raw_output_contents[0], np.float32).tolist() == [2, 4, 6, 8]


async def test_each_message_of_a_stream_is_decided_by_its_own_model(served: Serving, signer: Signer) -> None:
    names = ["open", "secret", "open", "nothing", "both"]
    messages = iter([request(name, id=name, x=X) for name in names])
    stream = served.stub.ModelStreamInfer(messages, metadata=by(key(signer, "acme")), timeout=30)
    found = [
        (answer.infer_response.id, answer.infer_response.parameters[ERROR_CODE_PARAMETER].int64_param)
        async for answer in stream
    ]
    denied = Code.PERMISSION_DENIED
    assert found == [("open", 0), ("secret", denied), ("open", 0), ("nothing", denied), ("both", 0)]


async def test_an_ensemble_covers_the_models_that_it_calls(served: Serving, signer: Signer) -> None:
    answer = await served.stub.ModelInfer(request("both", x=X), metadata=by(key(signer, "acme")), timeout=30)
    assert np.frombuffer(answer.raw_output_contents[0], np.float32).tolist() == [3, 6, 9, 12]


async def test_lists_have_only_what_the_caller_may_see(served: Serving, signer: Signer) -> None:
    acme = by(key(signer, "acme", "viewer"))
    index = await served.stub.RepositoryIndex(pb.RepositoryIndexRequest(), metadata=acme, timeout=30)
    assert {row.name for row in index.models} == {"open", "both"}
    statistics = await served.stub.ModelStatistics(pb.ModelStatisticsRequest(), metadata=acme, timeout=30)
    assert {row.name for row in statistics.model_stats} == {"open", "both"}
    everything = await served.stub.RepositoryIndex(
        pb.RepositoryIndexRequest(), metadata=by(key(signer, "globex")), timeout=30
    )
    assert {row.name for row in everything.models} == {"open", "both", "secret"}


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("ModelReady", pb.ModelReadyRequest(name="secret")),
        ("ModelMetadata", pb.ModelMetadataRequest(name="secret")),
        ("ModelConfig", pb.ModelConfigRequest(name="secret")),
        ("ModelStatistics", pb.ModelStatisticsRequest(name="secret")),
        ("RepositoryModelLoad", pb.RepositoryModelLoadRequest(model_name="secret")),
        ("RepositoryModelUnload", pb.RepositoryModelUnloadRequest(model_name="secret")),
    ],
)
async def test_each_method_that_names_a_model_is_decided_by_it(
    served: Serving, signer: Signer, method: str, message: Any
) -> None:
    call = getattr(served.stub, method)
    assert (
        await code_of(call(message, metadata=by(key(signer, "acme", "publisher")), timeout=30)) == "PERMISSION_DENIED"
    )
    assert await code_of(call(message, metadata=by(key(signer, "globex", "publisher")), timeout=30)) == "OK"


async def test_an_unload_with_the_models_of_an_ensemble_needs_a_grant_for_each(served: Serving, signer: Signer) -> None:
    unload = pb.RepositoryModelUnloadRequest(model_name="both")
    unload.parameters["unload_dependents"].bool_param = True
    acme, globex = by(key(signer, "acme", "publisher")), by(key(signer, "globex", "publisher"))
    call = served.stub.RepositoryModelUnload(unload, metadata=acme, timeout=30)
    assert await code_of(call) == "PERMISSION_DENIED"
    for model in ("both", "secret"):
        assert await code_of(served.stub.ModelInfer(request(model, x=X), metadata=globex, timeout=30)) == "OK"
    assert await code_of(served.stub.RepositoryModelUnload(unload, metadata=globex, timeout=30)) == "OK"
    assert await code_of(served.stub.ModelInfer(request("secret", x=X), metadata=globex, timeout=30)) != "OK"


async def test_a_load_with_parameters_needs_the_grant_of_code(served: Serving, access: Access, signer: Signer) -> None:
    load = pb.RepositoryModelLoadRequest(model_name="open")
    load.parameters["config"].string_param = "{}"
    caller = by(key(signer, "globex", "publisher"))
    call = served.stub.RepositoryModelLoad(load, metadata=caller, timeout=30)
    assert await code_of(call) == "PERMISSION_DENIED"
    assert "no grant allows code" in await call.details()
    grants = [
        {"name": "all", "models": ["*"]},
        {"name": "code", "roles": ["publisher"], "allow": ["code"], "models": ["open"]},
    ]
    access.set_policy(policy(signer, grants=grants))
    assert await code_of(served.stub.RepositoryModelLoad(load, metadata=caller, timeout=30)) != "PERMISSION_DENIED"


async def test_nobody_but_a_service_sends_a_bulk(served: Serving, signer: Signer) -> None:
    bulk = served.channel.unary_unary("/shoal.inference.v2.BulkInference/InferBulk")
    assert await code_of(bulk(b"", metadata=by(key(signer, "globex", "admin")), timeout=30)) == "PERMISSION_DENIED"


async def test_each_entry_of_a_bulk_is_decided_by_its_own_model(
    served: Serving, signer: Signer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As for a service that calls for a user: the method itself is allowed.
    monkeypatch.setattr(Access, "open_call", lambda *_: contextlib.nullcontext())
    entries = [
        bulk_pb2.InferBulkRequest.Entry(number=number, request=request(name, x=X).SerializeToString())
        for number, name in enumerate(["open", "secret", "open"])
    ]
    stub = bulk_pb2_grpc.BulkInferenceStub(served.channel)
    for _ in range(2):
        call = stub.InferBulk(
            iter([bulk_pb2.InferBulkRequest(entries=entries)]), metadata=by(key(signer, "acme")), timeout=30
        )
        codes = {answer.number: answer.code async for response in call for answer in response.answers}
        assert codes == {0: 0, 1: Code.PERMISSION_DENIED, 2: 0}


async def test_a_replaced_policy_file_is_in_force_and_an_invalid_one_is_not(signer: Signer, tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    path.write_text(policy(signer).model_dump_json())
    caller = passed(claims_of(key(signer)))[1].encode()

    def is_allowed(access: Access) -> bool:
        try:
            access.check_infer({CALLER: caller}, "m")
        except PermissionDenied:
            return False
        return True

    async with followed(path) as access:
        assert is_allowed(access)
        for text, expected in [(policy(signer, grants=[]).model_dump_json(), False), ("{", False)]:
            written = tmp_path / "written"
            written.write_text(text)
            written.replace(path)
            await until(lambda expected=expected: is_allowed(access) is expected, "the change of the policy")
        written.write_text(policy(signer).model_dump_json())
        written.replace(path)
        await until(lambda: is_allowed(access), "the repaired policy")


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "[::1]:0", "0.0.0.0:8001"])
def test_a_policy_needs_a_socket_that_only_the_gateway_can_connect_to(tmp_path: Path, listen: str) -> None:
    with pytest.raises(ValueError, match="SHOAL_INFER_POLICY needs a unix socket"):
        InferConfig(listen=listen, insecure=True, repository=tmp_path, policy=tmp_path / "policy.json")
