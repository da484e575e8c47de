"""Ensembles as clients see them: outputs, shared batches, errors, statistics, explain, models that come and go."""

from __future__ import annotations

import asyncio

import grpc
import numpy as np
import pytest
from onnx import TensorProto

from services.infer.core import InferenceServer
from shoal.errors import Internal, NotFound, ResourceExhausted, Unavailable
from shoal.inference.v2 import inference_pb2 as pb
from tests.breakable import until
from tests.infer import onnx_files
from tests.infer.conftest import floats, output, request
from tests.infer.ensembles.conftest import FAN, parameter, step, tensor
from tests.infer.scheduling.test_scheduling_rpc import occupied

X = floats([1, 2, 3, 4], [5, 6, 7, 8])
CHAIN = (step("double", {"x": "x"}, {"y": "d"}), step("triple", {"x": "d"}, {"y": "y"}))
"""y = 6x."""


async def load(served, name: str) -> None:
    await served.stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name=name))


async def unload(served, name: str, *, dependents: bool | None = None) -> None:
    asked = pb.RepositoryModelUnloadRequest(model_name=name)
    if dependents is not None:
        asked.parameters["unload_dependents"].bool_param = dependents
    await served.stub.RepositoryModelUnload(asked)


def states(served) -> dict[str, tuple[str, str]]:
    return {row.name: (str(row.state), row.reason) for row in served.models.index()}


async def refused(served, asked) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as err:
        await served.stub.ModelInfer(asked)
    return err.value.code(), err.value.details() or ""


async def test_steps_that_join(serve, models_folder):
    models_folder.ensemble("e", *FAN)
    served = await serve(models_folder.root)
    response = await served.stub.ModelInfer(request("e", x=X, id="7"))
    assert (response.model_name, response.model_version, response.id) == ("e", "1", "7")
    assert np.array_equal(output(response, "s"), 5 * X)
    assert np.array_equal(output(response, "f"), -X)
    asked = request("e", x=X)
    asked.outputs.add(name="f")
    only = await served.stub.ModelInfer(asked)
    assert [o.name for o in only.outputs] == ["f"]


async def test_what_nobody_asks_for_is_not_run(serve, models_folder):
    more = "max_batch_size: 8 " + tensor("output", "d") + tensor("output", "t")
    models_folder.ensemble("e", *FAN[:2], more=more)
    served = await serve(models_folder.root)
    asked = request("e", x=X)
    asked.outputs.add(name="t")
    assert np.array_equal(output(await served.stub.ModelInfer(asked), "t"), 3 * X)
    assert [served.models.find(name, "").statistics.executions for name in ("double", "triple")] == [0, 1]


async def test_an_ensemble_of_ensembles(serve, models_folder):
    models_folder.ensemble("six", *CHAIN)
    models_folder.ensemble("outer", step("six", {"x": "in"}, {"y": "m"}), step("six", {"x": "m"}, {"y": "out"}))
    models_folder.ensemble("outermost", step("outer", {"in": "in"}, {"out": "o"}))
    served = await serve(models_folder.root)
    assert np.array_equal(output(await served.stub.ModelInfer(request("outermost", **{"in": X})), "o"), 36 * X)


async def test_a_version_of_a_step_may_be_named(serve, models_folder):
    for version in (1, 2):
        models_folder.put("v", onnx_files.scale(float(version)), version=version, config="version_policy { all {} }")
    models_folder.ensemble("one", step("v", {"x": "x"}, {"y": "y"}, version=1))
    models_folder.ensemble("newest", step("v", {"x": "x"}, {"y": "y"}))
    served = await serve(models_folder.root)
    assert np.array_equal(output(await served.stub.ModelInfer(request("one", x=X)), "y"), X)
    assert np.array_equal(output(await served.stub.ModelInfer(request("newest", x=X)), "y"), 2 * X)


async def test_texts_and_batches_of_models_without_a_batch(serve, models_folder):
    models_folder.bare("words", onnx_files.identity(TensorProto.STRING, ("n", 1)))
    models_folder.put("mixing", onnx_files.mixing(), config="max_batch_size: 0")
    models_folder.ensemble("texts", step("words", {"x": "t"}, {"y": "u"}), step("words", {"x": "u"}, {"y": "v"}))
    models_folder.ensemble("mixed", step("double", {"x": "x"}, {"y": "d"}), step("mixing", {"x": "d"}, {"y": "y"}))
    served = await serve(models_folder.root)
    texts = np.array([["a"], ["käse"]], object)
    raw = np.array([[b"a"], ["käse".encode()]], object)
    assert output(await served.stub.ModelInfer(request("texts", t=raw)), "v").tolist() == [
        [text.encode()] for (text,) in texts.tolist()
    ]
    code, why = await refused(served, request("texts", t=np.array([[b"\xff"]], object)))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "in ensemble 'texts', step 0, model 'words': input 'x', tensor 't': its model's BYTES are text" in why
    assert served.models.find("mixed", "").loaded.model.signature.max_batch_size == 0
    response = await served.stub.ModelInfer(request("mixed", x=X))
    assert np.array_equal(output(response, "y"), 2 * X - (2 * X).mean(axis=0))


async def test_requests_of_different_ensembles_share_executions(serve, models_folder):
    models_folder.ensemble("e", *CHAIN)
    models_folder.ensemble("other", *FAN)
    served = await serve(models_folder.root)
    double = served.models.find("double", "")
    asked = request("e", x=X)
    asked.parameters["explain"].bool_param = True
    async with occupied(double):
        calls = [served.stub.ModelInfer(r) for r in (asked, request("other", x=X), request("double", x=X))]
        await until(lambda: len(double.scheduler._queue) >= 3)
    first, _, _ = await asyncio.gather(*calls)
    assert np.array_equal(output(first, "y"), 6 * X)
    assert first.parameters["step_0_batch_size"].int64_param == 6
    assert double.statistics.by_rows.keys() == {6}


async def test_explain_says_every_step(serve, models_folder):
    models_folder.ensemble("e", *CHAIN)
    served = await serve(models_folder.root)
    asked = request("e", x=X)
    asked.parameters["explain"].bool_param = True
    said = (await served.stub.ModelInfer(asked)).parameters
    assert said["fired"].string_param == "steps"
    assert [said[f"step_{n}_model"].string_param for n in (0, 1)] == ["double", "triple"]
    assert all(said[f"step_{n}_calls"].int64_param == 1 for n in (0, 1))
    assert all(said[f"step_{n}_fired"].string_param for n in (0, 1))
    parts = sum(said[f"step_{n}_compute_us"].int64_param for n in (0, 1))
    assert parts <= said["compute_us"].int64_param <= parts + 2


async def test_statistics_of_the_ensemble_and_of_its_models(serve, models_folder):
    models_folder.ensemble("e", *CHAIN)
    served = await serve(models_folder.root)
    for _ in range(3):
        await served.stub.ModelInfer(request("e", x=X))
    stats = {s.name: s for s in (await served.stub.ModelStatistics(pb.ModelStatisticsRequest())).model_stats}
    for name in ("e", "double", "triple"):
        assert (stats[name].inference_count, stats[name].execution_count) == (6, 3)
        assert stats[name].inference_stats.success.count == 3
    computed = [stats[name].inference_stats.compute_infer.ns for name in ("e", "double", "triple")]
    assert computed[0] == computed[1] + computed[2]
    assert stats["e"].inference_stats.success.ns >= computed[0]


async def test_an_error_names_the_step_and_keeps_its_status(serve, models_folder):
    models_folder.bare("lookup", onnx_files.lookup())
    models_folder.ensemble("e", step("lookup", {"i": "i"}, {"y": "y"}), step("lookup", {"i": "i"}, {"y": "z"}))
    served = await serve(models_folder.root)
    code, why = await refused(served, request("e", i=np.array([[9]], np.int64)))
    assert code is grpc.StatusCode.INTERNAL
    assert "in ensemble 'e', step " in why
    assert "model 'lookup': Failed to process the request(s) for model 'lookup'" in why
    stats = served.models.find("e", "").statistics
    assert (stats.fail.count, stats.success.count) == (1, 0)
    assert output(await served.stub.ModelInfer(request("e", i=np.array([[1]], np.int64))), "z").tolist() == [[20]]


async def test_one_bad_request_fails_alone_in_a_step_that_others_share(serve, models_folder):
    models_folder.bare("lookup", onnx_files.lookup())
    models_folder.ensemble("e", step("lookup", {"i": "i"}, {"y": "y"}))
    served = await serve(models_folder.root)
    numbers = [0, 9, 2]
    async with occupied(served.models.find("lookup", "")):
        calls = [served.stub.ModelInfer(request("e", i=np.array([[n]], np.int64))) for n in numbers]
        await until(lambda: len(served.models.find("lookup", "").scheduler._queue) >= 3)
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert [output(a, "y").item() if isinstance(a, pb.ModelInferResponse) else "failed" for a in outcomes] == [
        10,
        "failed",
        30,
    ]


async def test_a_shape_that_only_the_request_shows_is_named(serve, models_folder):
    models_folder.bare("any", onnx_files.scale(dims=("n", "k")))
    models_folder.ensemble("e", step("any", {"x": "x"}, {"y": "a"}), step("double", {"x": "a"}, {"y": "y"}))
    served = await serve(models_folder.root)
    code, why = await refused(served, request("e", x=floats([1, 2, 3])))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "step 1, model 'double': input 'x', tensor 'a' has shape [1,3], expected [-1,4]" in why
    assert np.array_equal(output(await served.stub.ModelInfer(request("e", x=X)), "y"), 4 * X)


async def test_a_response_cache_of_a_step_and_of_the_ensemble(serve, models_folder):
    models_folder.put("kept", onnx_files.scale(2.0), config="response_cache { enable: true }")
    models_folder.ensemble("e", step("kept", {"x": "x"}, {"y": "d"}), step("triple", {"x": "d"}, {"y": "y"}))
    models_folder.ensemble("cached", *CHAIN, more="response_cache { enable: true }")
    served = await serve(models_folder.root)
    for _ in range(3):
        assert np.array_equal(output(await served.stub.ModelInfer(request("e", x=X)), "y"), 6 * X)
        assert np.array_equal(output(await served.stub.ModelInfer(request("cached", x=X)), "y"), 6 * X)
    stats = {name: served.models.find(name, "").statistics for name in ("kept", "triple", "cached")}
    assert (stats["kept"].executions, stats["kept"].cache_hit.count) == (1, 2)
    assert (stats["cached"].executions, stats["cached"].cache_hit.count) == (1, 2)
    models_folder.bare("double", onnx_files.scale(20.0))
    await load(served, "double")  # What was kept is of the old one.
    assert np.array_equal(output(await served.stub.ModelInfer(request("cached", x=X)), "y"), 60 * X)


async def test_a_response_cache_forgets_when_a_model_changes_that_a_step_is_made_of(serve, models_folder):
    models_folder.ensemble("inner", *CHAIN)
    models_folder.ensemble("cached", step("inner", {"x": "x"}, {"y": "y"}), more="response_cache { enable: true }")
    served = await serve(models_folder.root)
    assert np.array_equal(output(await served.stub.ModelInfer(request("cached", x=X)), "y"), 6 * X)
    models_folder.bare("double", onnx_files.scale(20.0))
    await load(served, "double")
    assert np.array_equal(output(await served.stub.ModelInfer(request("cached", x=X)), "y"), 60 * X)


async def test_a_response_cache_forgets_though_a_call_found_the_new_version_first(serve, models_folder):
    models_folder.ensemble("cached", *CHAIN, more="response_cache { enable: true }")
    served = await serve(models_folder.root)
    assert np.array_equal(output(await served.stub.ModelInfer(request("cached", x=X)), "y"), 6 * X)
    cached = served.models.find("cached", "")
    follow, asked = cached.recheck, []

    def recheck(other_models):
        if not asked and served.models.find("double", "") is not before:
            cached.scheduler.refresh()  # As every call does, before it runs.
            asked.append(True)
        return follow(other_models)

    before, cached.recheck = served.models.find("double", ""), recheck
    models_folder.bare("double", onnx_files.scale(20.0))
    await load(served, "double")
    assert asked
    assert np.array_equal(output(await served.stub.ModelInfer(request("cached", x=X)), "y"), 60 * X)


async def test_samples_of_warm_up_go_through_the_steps(serve, models_folder):
    sample = """model_warmup { name: "%s" batch_size: 2 count: 3
        inputs { key: "%s" value { data_type: TYPE_%s dims: [%d] %s } } }"""
    models_folder.bare("lookup", onnx_files.lookup())
    models_folder.ensemble("good", *CHAIN, more=sample % ("s", "x", "FP32", 4, "random_data: true"))
    models_folder.ensemble("wrong", *CHAIN, more=sample % ("s", "z", "FP32", 4, "zero_data: true"))
    (models_folder.root / "fails/warmup").mkdir(parents=True)
    (models_folder.root / "fails/warmup/nine").write_bytes(np.int64(9).tobytes())
    more = sample % ("s", "i", "INT64", 1, 'input_data_file: "nine"')
    models_folder.ensemble("fails", step("lookup", {"i": "i"}, {"y": "y"}), more=more)
    served = await serve(models_folder.root)
    assert states(served)["good"] == ("READY", "")
    assert served.models.find("triple", "").statistics.by_rows[2].count == 3
    assert "model_warmup 's': has inputs ['z'], the model ['x']" in states(served)["wrong"][1]
    assert "model_warmup 's': in ensemble 'fails', step 0, model 'lookup': Failed" in states(served)["fails"][1]


async def test_ready_when_its_models_are(serve, models_folder):
    models_folder.ensemble("e", step("late", {"x": "x"}, {"y": "y"}))
    models_folder.ensemble("outer", step("e", {"x": "x"}, {"y": "y"}))
    served = await serve(models_folder.root)
    why = "step 0, model 'late' is not ready: Request for unknown model: 'late' is not found"
    assert states(served)["e"] == ("UNAVAILABLE", why)
    assert not served.core.ready().ready
    code, details = await refused(served, request("e", x=X))
    assert (code, why in details) == (grpc.StatusCode.UNAVAILABLE, True)
    models_folder.bare("late", onnx_files.scale(7.0))
    await load(served, "late")
    assert np.array_equal(output(await served.stub.ModelInfer(request("outer", x=X)), "y"), 7 * X)
    assert served.core.ready().ready


async def test_a_model_that_is_unloaded_takes_its_ensembles_along_and_brings_them_back(serve, models_folder):
    models_folder.ensemble("e", *CHAIN)
    models_folder.ensemble("outer", step("e", {"x": "x"}, {"y": "y"}))
    served = await serve(models_folder.root)
    await unload(served, "triple")
    assert "step 1, model 'triple' is not ready" in states(served)["e"][1]
    assert "step 0, model 'e' is not ready" in states(served)["outer"][1]
    code, why = await refused(served, request("outer", x=X))
    assert code is grpc.StatusCode.UNAVAILABLE
    assert "'e'" in why
    assert states(served)["double"][0] == "READY"
    await load(served, "triple")
    assert np.array_equal(output(await served.stub.ModelInfer(request("outer", x=X)), "y"), 6 * X)


async def test_unloading_an_ensemble_with_its_dependents(serve, models_folder):
    models_folder.ensemble("e", *CHAIN)
    models_folder.ensemble("outer", step("e", {"x": "x"}, {"y": "y"}))
    served = await serve(models_folder.root)
    await unload(served, "outer", dependents=False)
    assert states(served)["e"][0] == "READY"
    await load(served, "outer")
    await unload(served, "outer", dependents=True)
    ready = {name for name, (state, _) in states(served).items() if state == "READY"}
    assert ready == {"add"}
    await load(served, "outer")  # Brings what it is made of.
    assert np.array_equal(output(await served.stub.ModelInfer(request("outer", x=X)), "y"), 6 * X)


async def test_a_model_that_is_unloaded_after_its_ensemble_was_loaded_stays_so(serve, models_folder):
    models_folder.ensemble("e", *CHAIN)
    served = await serve(models_folder.root)
    await load(served, "e")
    await unload(served, "double")
    await load(served, "triple")
    assert "step 0, model 'double' is not ready" in states(served)["e"][1]
    with pytest.raises(NotFound):
        served.models.find("double", "")


async def test_a_step_is_replaced_and_no_call_fails(serve, models_folder):
    models_folder.ensemble("e", *CHAIN)
    served = await serve(models_folder.root)
    version, stop = served.models.find("e", ""), asyncio.Event()

    async def calls() -> set[float]:
        factors = set()
        while not stop.is_set():
            response = output(await served.stub.ModelInfer(request("e", x=X)), "y")
            (factor,) = np.unique(response / X)
            factors.add(float(factor))
        return factors

    callers = [asyncio.create_task(calls()) for _ in range(4)]
    for factor in (10.0, 20.0, 30.0):
        models_folder.bare("double", onnx_files.scale(factor))
        await load(served, "double")
        assert np.array_equal(output(await served.stub.ModelInfer(request("e", x=X)), "y"), 3 * factor * X)
    stop.set()
    seen = set().union(*await asyncio.gather(*callers))
    assert seen <= {6.0, 30.0, 60.0, 90.0}
    assert served.models.find("e", "") is version


async def test_a_step_with_another_signature_makes_another_ensemble_or_none(serve, models_folder):
    models_folder.ensemble("open", *CHAIN)
    models_folder.ensemble("firm", *CHAIN, more="max_batch_size: 8 " + tensor("input", "x") + tensor("output", "y"))
    served = await serve(models_folder.root)
    models_folder.bare("double", onnx_files.scale(dims=("n", "k")))
    models_folder.bare("triple", onnx_files.scale(dims=("n", 3)))
    await load(served, "double")
    await load(served, "triple")
    assert served.models.find("open", "").loaded.model.signature.outputs[0].shape == (-1, 3)
    assert "output 'y' is [-1,4], tensor 'y' is [-1,3] by step 1, model 'triple'" in states(served)["firm"][1]
    response = await served.stub.ModelInfer(request("open", x=floats([1, 2, 3])))
    assert output(response, "y").tolist() == [[4, 8, 12]]
    with pytest.raises(Unavailable):
        served.models.find("firm", "")


async def test_so_many_requests_at_the_same_time(serve, models_folder):
    models_folder.ensemble("e", *CHAIN, more=parameter("max_in_flight", "2"))
    served = await serve(models_folder.root)
    async with occupied(served.models.find("double", "")):
        calls = [served.stub.ModelInfer(request("e", x=X)) for _ in range(2)]
        await until(lambda: len(served.models.find("double", "").scheduler._queue) >= 2)
        with pytest.raises(grpc.aio.AioRpcError) as err:
            await served.stub.ModelInfer(request("e", x=X))
        assert err.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "of ensemble 'e': 2 requests are in progress" in (err.value.details() or "")
        assert "retry-after-ms" in dict(err.value.trailing_metadata() or ())
    await asyncio.gather(*calls)
    assert served.models.find("e", "").statistics.shed == 1


async def test_in_a_full_ensemble_the_tenant_with_the_most_requests_loses_its_newest(serve, models_folder):
    models_folder.ensemble("e", *CHAIN, more=parameter("max_in_flight", "3"))
    served = await serve(models_folder.root)
    waiting = served.models.find("double", "").scheduler._queue
    calls: list[asyncio.Future[object]] = []
    async with occupied(served.models.find("double", "")):
        for number, tenant in enumerate(("flood", "flood", "flood", "other"), 1):
            calls.append(asyncio.ensure_future(served.core.infer(request("e", x=X), tenant=tenant)))
            await until(lambda number=number: len(waiting) == min(number, 3))
        with pytest.raises(ResourceExhausted, match="of ensemble 'e': 3 requests are in progress"):
            await calls.pop(2)
        with pytest.raises(ResourceExhausted):
            await served.core.infer(request("e", x=X), tenant="flood")
    await asyncio.gather(*calls)
    assert served.models.find("e", "").statistics.shed == 2


async def test_a_full_queue_of_a_step_is_told_with_the_time_to_come_back(serve, models_folder):
    config = "max_batch_size: 8 dynamic_batching { default_queue_policy { max_queue_size: 1 } }"
    models_folder.put("narrow", onnx_files.scale(), config=config)
    models_folder.ensemble("e", step("narrow", {"x": "x"}, {"y": "y"}))
    served = await serve(models_folder.root)
    async with occupied(served.models.find("narrow", "")):
        call = served.stub.ModelInfer(request("e", x=X))
        await until(lambda: len(served.models.find("narrow", "").scheduler._queue) >= 1)
        with pytest.raises(grpc.aio.AioRpcError) as err:
            await served.stub.ModelInfer(request("e", x=X))
        assert err.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "in ensemble 'e', step 0, model 'narrow': Exceeds maximum queue size" in (err.value.details() or "")
        assert "retry-after-ms" in dict(err.value.trailing_metadata() or ())
    await call


class Suspicious:
    """Crash guard that knows that another instance died while it ran `guilty`."""

    def __init__(self, guilty: str) -> None:
        self.guilty, self.asked = guilty, []

    async def checked(self, model, call):
        self.asked.append(model)
        if model == self.guilty:
            raise Internal(f"model '{model}': the instance that ran this request died")
        return call


async def test_a_retry_of_what_another_instance_died_of_is_refused_at_the_step_that_did_it(serve, models_folder):
    models_folder.ensemble("e", *CHAIN)
    models_folder.ensemble("outer", step("e", {"x": "x"}, {"y": "y"}), step("double", {"x": "y"}, {"y": "z"}))
    served = await serve(models_folder.root)
    guard = Suspicious("triple")
    core = InferenceServer(served.models, "test/infer-0", crash_guard=guard)
    with pytest.raises(Internal, match=r"in ensemble 'outer', step 0, model 'e': in ensemble 'e', step 1, .*died"):
        await core.infer(request("outer", x=X), is_retry=True)
    assert guard.asked == ["outer", "e", "double", "triple"]
    guard.guilty = ""
    assert np.array_equal(output(await core.infer(request("outer", x=X), is_retry=True), "z"), 12 * X)
    assert np.array_equal(output(await core.infer(request("outer", x=X)), "z"), 12 * X)


async def test_the_ready_set_is_published_after_a_step_runs_a_new_version(serve, models_folder):
    models_folder.ensemble("chain", *CHAIN)
    served = await serve(models_folder.root)
    assert np.array_equal(output(await served.stub.ModelInfer(request("chain", x=X)), "y"), 6 * X)
    models_folder.bare("double", onnx_files.scale(20.0))
    await load(served, "double")
    assert np.array_equal(output(await served.stub.ModelInfer(request("chain", x=X)), "y"), 60 * X)

    models_folder.bare("later", onnx_files.scale(3.0))
    await load(served, "later")
    await until(lambda: "later" in served.models.names())
