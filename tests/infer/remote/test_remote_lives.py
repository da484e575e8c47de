"""A remote model from its first attempt on: servers that are away, come back, change, or want another key."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest

from services.infer.models.version import State
from shoal.errors import FailedPrecondition, InvalidArgument, NotFound, Unavailable
from shoal.inference.v2 import inference_pb2 as pb
from shoal.inference.v2 import model_config_pb2
from tests.infer.conftest import Serving, floats, output, request
from tests.infer.remote import configs
from tests.infer.remote.conftest import Clock
from tests.infer.remote.scripted import Scripted, given, response

X = floats([1, 2, 3, 4])


async def doubled(near: Serving) -> list[list[float]]:
    return output(await near.core.infer(request("m", x=X)), "y").tolist()


def reason(near: Serving) -> str:
    (row,) = near.models.index()
    assert row.state is State.UNAVAILABLE
    return row.reason


async def until_ready(near: Serving) -> None:
    async with asyncio.timeout(30):
        async for ready in near.models.ready_set.follow():
            if ready:
                return


async def test_loading_is_retried_until_the_server_is_reachable(front, run_dir: Path, tmp_path: Path):
    address = f"unix:{run_dir}/far.sock"
    configs.put(tmp_path / "models", "m", url=address)
    near = await front(tmp_path / "models")
    assert reason(near).startswith(f"the remote server at {address} is unavailable: ")
    with pytest.raises(Unavailable):
        await doubled(near)
    async with Scripted().serving(address):
        await until_ready(near)
        assert await doubled(near) == [[2, 4, 6, 8]]


async def test_a_server_that_does_not_have_the_model_yet(front, scripted: Scripted, tmp_path: Path):
    scripted.is_ready = False
    configs.put(tmp_path / "models", "m", url=f"grpc://{scripted.address}", remote_model="far", remote_version="7")
    near = await front(tmp_path / "models")
    assert "the remote server says that model 'far' version '7' is not ready" in reason(near)
    scripted.is_ready = True
    await until_ready(near)
    assert await doubled(near) == [[2, 4, 6, 8]]


async def test_a_model_recovers_after_a_restart_of_its_server(front, run_dir: Path, tmp_path: Path):
    address = f"unix:{run_dir}/far.sock"
    configs.put(tmp_path / "models", "m", url=address)
    async with Scripted().serving(address):
        near = await front(tmp_path / "models")
        assert await doubled(near) == [[2, 4, 6, 8]]
    with pytest.raises(Unavailable, match="model 'm': the remote server is unavailable") as caught:
        await doubled(near)
    assert caught.value.retry_after_ms == 1000
    async with Scripted().serving(address):
        assert await first_result(near) == [[2, 4, 6, 8]]


async def first_result(near: Serving) -> list[list[float]]:
    """The first result after refusals."""
    async with asyncio.timeout(30):
        while True:
            try:
                return await doubled(near)
            except Unavailable:
                await asyncio.sleep(0)


async def refuse(asked: pb.ModelInferRequest, context: grpc.aio.ServicerContext) -> pb.ModelInferResponse:
    if asked.inputs[0].datatype != "INT32":
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "x is INT32 now")
    return response(asked, given(asked))


async def test_a_changed_model_rejects_requests_and_names_the_change(near: Serving, scripted: Scripted, clock: Clock):
    assert await doubled(near) == [[2, 4, 6, 8]]
    double, scripted.infer = scripted.infer, refuse
    scripted.inputs = [("x", "INT32", [-1, 4]), ("mask", "BOOL", [-1, 1])]
    for _ in range(2):
        with pytest.raises(FailedPrecondition) as caught:
            await doubled(near)
        assert caught.value.message == (
            "model 'm': the remote model has changed since it was loaded: input 'x' was FP32 [-1,4] and is "
            "INT32 [-1,4]; input 'mask' is new; unload it and load it again"
        )
    assert scripted.seen == [1, 1]  # It is not asked any more.
    scripted.inputs, scripted.infer = [("x", "FP32", [-1, 4])], double
    clock.ahead += 10
    assert await doubled(near) == [[2, 4, 6, 8]]


async def test_a_changed_model_is_another_one_once_it_is_loaded_again(near: Serving, scripted: Scripted):
    scripted.outputs = [("z", "FP32", [-1, 4])]
    scripted.infer = refuse
    with pytest.raises(FailedPrecondition, match="output 'y' no longer exists"):
        await doubled(near)
    await near.core.unload_model(pb.RepositoryModelUnloadRequest(model_name="m"))
    await near.core.load_model(pb.RepositoryModelLoadRequest(model_name="m"))
    metadata = near.core.model_metadata(pb.ModelMetadataRequest(name="m"))
    assert [t.name for t in metadata.outputs] == ["z"]


async def test_a_flood_of_bad_requests_queries_metadata_once(near: Serving, scripted: Scripted):
    asked: list[str] = []
    scripted.infer = refuse
    scripted.config = lambda said: asked.append("again")
    for _ in range(5):
        with pytest.raises(InvalidArgument, match="x is INT32 now"):
            await doubled(near)
    assert asked == ["again"]


async def test_smaller_batches_than_before_are_a_change(near: Serving, scripted: Scripted):
    scripted.rows, scripted.infer = 4, refuse
    with pytest.raises(FailedPrecondition, match="max_batch_size was 8 and is 4"):
        await doubled(near)


def decoupled(said: pb.ModelConfigResponse) -> None:
    said.config.model_transaction_policy.decoupled = True


def sequences(said: pb.ModelConfigResponse) -> None:
    said.config.sequence_batching.SetInParent()


@pytest.mark.parametrize(
    ("change", "says"), [(decoupled, "remote model 'm' is decoupled"), (sequences, "keeps state between the requests")]
)
async def test_what_cannot_be_remote(front, scripted: Scripted, tmp_path: Path, change, says):
    scripted.config = change
    configs.put(tmp_path / "models", "m", url=f"grpc://{scripted.address}")
    assert says in reason(await front(tmp_path / "models"))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("max_batch_size: 9", "max_batch_size 9: the remote model takes 8 at most"),
        ('input { name: "z" data_type: TYPE_FP32 dims: [ 4 ] }', "the configuration has input 'z', the model has 'x'"),
        (
            'input { name: "x" data_type: TYPE_INT8 dims: [ 4 ] }',
            "input 'x': the configuration says INT8, the model FP32",
        ),
        ('input { name: "x" data_type: TYPE_FP32 dims: [ 5 ] }', "input 'x': the configuration says [5] with a batch"),
        ("model_transaction_policy { decoupled: true }", "model_transaction_policy.decoupled is not supported"),
        ("instance_group { kind: KIND_GPU }", "KIND_GPU is not supported"),
        ('parameters { key: "protocol" value { string_value: "rest" } }', "parameter protocol 'rest': expected one of"),
    ],
)
async def test_a_configuration_that_contradicts(front, scripted: Scripted, tmp_path: Path, more, says):
    configs.put(tmp_path / "models", "m", more, url=f"grpc://{scripted.address}")
    near = await front(tmp_path / "models")
    assert says in reason(near)
    assert not near.models._models["m"].may_retry()


async def test_fewer_rows_than_the_remote_model_takes(front, scripted: Scripted, tmp_path: Path):
    for rows in (0, 3):
        configs.put(tmp_path / "models", f"m{rows}", f"max_batch_size: {rows}", url=f"grpc://{scripted.address}")
    near = await front(tmp_path / "models")
    configured = [near.models.find(f"m{rows}", "").loaded.model.config for rows in (0, 3)]
    assert [config.max_batch_size for config in configured] == [0, 3]
    assert [list(config.input[0].dims) for config in configured] == [[-1, 4], [4]]
    assert [group.count for group in configured[0].instance_group] == [4]


async def test_a_server_without_model_config_is_tried_out(front, tmp_path: Path):
    async with Scripted(rows=None).serving() as remote:
        configs.put(tmp_path / "models", "m", url=f"grpc://{remote.address}")
        near = await front(tmp_path / "models")
        assert near.models.find("m", "").loaded.model.config.max_batch_size == 64
        assert await doubled(near) == [[2, 4, 6, 8]]


async def test_a_server_that_says_nothing_of_tensors(front, tmp_path: Path):
    async with Scripted(rows=None).serving() as remote:
        remote.inputs = remote.outputs = []
        configs.put(tmp_path / "models", "m", url=f"grpc://{remote.address}")
        tensors = "\n".join(
            f'{kind} {{ name: "{n}" data_type: TYPE_FP32 dims: [ 4 ] }}'
            for kind, n in (("input", "x"), ("output", "y"))
        )
        configs.put(tmp_path / "models", "n", f"max_batch_size: 8\n{tensors}", url=f"grpc://{remote.address}")
        near = await front(tmp_path / "models")
        rows = {row.name: row for row in near.models.index()}
        assert "write input and output into config.pbtxt" in rows["m"].reason
        assert output(await near.core.infer(request("n", x=X)), "y").tolist() == [[2, 4, 6, 8]]


async def test_an_input_that_the_remote_model_can_do_without(front, scripted: Scripted, tmp_path: Path):
    def optional(said: pb.ModelConfigResponse) -> None:
        given = said.config.input.add(name="bias", data_type=model_config_pb2.TYPE_FP32, dims=[4])
        given.optional = True

    scripted.inputs, scripted.config = [("x", "FP32", [-1, 4]), ("bias", "FP32", [-1, 4])], optional
    configs.put(tmp_path / "models", "m", url=f"grpc://{scripted.address}")
    near = await front(tmp_path / "models")
    assert await doubled(near) == [[2, 4, 6, 8]]
    assert output(await near.core.infer(request("m", x=X, bias=X)), "y").tolist() == [[2, 4, 6, 8]]


async def test_a_datatype_that_the_protocol_does_not_have(front, scripted: Scripted, tmp_path: Path):
    scripted.inputs = [("x", "FP4", [-1, 4])]
    configs.put(tmp_path / "models", "m", url=f"grpc://{scripted.address}")
    assert "input 'x' of the remote model has the datatype 'FP4'" in reason(await front(tmp_path / "models"))


async def test_a_key_that_is_renewed_in_its_file(front, scripted: Scripted, tmp_path: Path):
    scripted.token = "Bearer one"
    folder = configs.put(
        tmp_path / "models", "m", url=f"grpc://{scripted.address}", metadata_authorization="Bearer ${file:key}"
    )
    (folder / "key").write_text("one\n")
    near = await front(tmp_path / "models")
    assert await doubled(near) == [[2, 4, 6, 8]]
    scripted.token = "Bearer two"
    with pytest.raises(FailedPrecondition, match="does not accept the credentials of this server: no such token"):
        await doubled(near)
    (folder / "key").write_text("two")
    assert await doubled(near) == [[2, 4, 6, 8]]
    scripted.token = "Bearer three"
    (folder / "key").unlink()
    with pytest.raises(FailedPrecondition, match=r"no such token; parameter metadata.authorization: cannot read key"):
        await doubled(near)


async def test_a_key_that_is_wrong_at_first(front, scripted: Scripted, tmp_path: Path, environ: dict[str, str]):
    scripted.token = "two"
    environ["KEY"] = "one"
    configs.put(tmp_path / "models", "m", url=f"grpc://{scripted.address}", metadata_authorization="${env:KEY}")
    near = await front(tmp_path / "models")
    assert "does not accept the credentials of this server" in reason(near)
    scripted.token = "one"
    await until_ready(near)


async def test_an_unknown_model_is_not_requested_from_the_remote_server(near: Serving):
    with pytest.raises(NotFound):
        await near.core.infer(request("other", x=X))


async def test_versions_are_as_of_any_model(front, scripted: Scripted, tmp_path: Path):
    more = "version_policy { all { } }"
    folder = configs.put(tmp_path / "models", "m", more, url=f"grpc://{scripted.address}")
    for number in (2, 5):
        (folder / str(number)).mkdir()
    near = await front(tmp_path / "models")
    assert [version.number for version in near.models.versions("m")] == [2, 5]
    assert await doubled(near) == [[2, 4, 6, 8]]


async def test_a_delay_for_company(front, scripted: Scripted, tmp_path: Path):
    more = "instance_group { count: 1 } dynamic_batching { max_queue_delay_microseconds: 2000 }"
    configs.put(tmp_path / "models", "m", more, url=f"grpc://{scripted.address}")
    near = await front(tmp_path / "models")
    assert await doubled(near) == [[2, 4, 6, 8]]
