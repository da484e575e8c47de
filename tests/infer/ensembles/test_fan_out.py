"""Steps whose model is called for each row: rows of any shapes, of any number, in order, batched across requests."""

from __future__ import annotations

import asyncio

import grpc
import numpy as np
from onnx import TensorProto, helper, numpy_helper

from tests.breakable import until
from tests.infer import onnx_files
from tests.infer.conftest import floats, output, request
from tests.infer.ensembles.conftest import parameter, step, tensor
from tests.infer.ensembles.test_ensembles_served import refused
from tests.infer.scheduling.test_scheduling_rpc import occupied


def summing() -> object:
    """y = the sum of each row, rows of any length."""
    return onnx_files.model(
        [helper.make_node("ReduceSum", ["x", "axes"], ["y"], keepdims=1)],
        [("x", TensorProto.FLOAT, ("n", "k"))],
        [("y", TensorProto.FLOAT, ("n", 1))],
        [numpy_helper.from_array(np.array([1], np.int64), "axes")],
    )


def cutting() -> object:
    """y = the first `size` elements of x; no batch: of one row only."""
    return onnx_files.model(
        [
            helper.make_node("Slice", ["x", "zero", "size"], ["y"]),
        ],
        [("x", TensorProto.FLOAT, ("k",)), ("size", TensorProto.INT64, (1,))],
        [("y", TensorProto.FLOAT, ("m",))],
        [numpy_helper.from_array(np.array([0], np.int64), "zero")],
    )


CUT = (
    step("cut", {"x": "page", "size": "sizes"}, {"y": "pieces"}),
    step("sum", {"x": "pieces"}, {"y": "sums"}),
)
"""For each size a piece of the page, and its sum: pieces differ in shape."""
MORE = (
    parameter("each.cut", "sizes")
    + parameter("each.sum", "pieces")
    + "max_batch_size: 0 "
    + tensor("input", "page", "-1")
    + tensor("input", "sizes", "-1, 1", "INT64")
    + tensor("output", "sums", "-1, 1")
)
PAGE = np.arange(1, 11, dtype=np.float32)


async def put(serve, folder, *steps: str, more: str = MORE, **limits: int):
    folder.put("cut", cutting(), config="max_batch_size: 0")
    folder.bare("sum", summing())
    folder.ensemble("e", *(steps or CUT), more=more)
    return await serve(folder.root, **limits)


def asked(*sizes: int):
    return request("e", page=PAGE, sizes=np.array(sizes, np.int64).reshape(-1, 1))


def sums(*sizes: int) -> list[list[float]]:
    return [[float(PAGE[:size].sum())] for size in sizes]


async def test_pieces_of_any_size_come_back_in_order(serve, models_folder):
    served = await put(serve, models_folder)
    for sizes in ((3,), (1, 10, 2), (4, 4, 4, 4), (), range(1, 11)):
        assert output(await served.stub.ModelInfer(asked(*sizes)), "sums").tolist() == sums(*sizes)
    nothing = output(await served.stub.ModelInfer(asked()), "sums")
    assert nothing.shape == (0, 1)


async def test_pieces_of_one_shape_are_batched_across_requests(serve, models_folder):
    served = await put(serve, models_folder)
    model = served.models.find("sum", "")
    async with occupied(model):
        calls = [served.stub.ModelInfer(explained(asked(*sizes))) for sizes in ((3, 5), (5, 3), (3,))]
        await until(lambda: len(model.scheduler._queue) >= 5)
    responses = await asyncio.gather(*calls)
    assert [output(response, "sums").tolist() for response in responses] == [sums(3, 5), sums(5, 3), sums(3)]
    assert {rows: times.count for rows, times in model.statistics.by_rows.items()} == {2: 1, 3: 1}
    said = responses[0].parameters
    assert (said["step_1_calls"].int64_param, said["step_1_batch_size"].int64_param) == (2, 3)


def explained(made):
    made.parameters["explain"].bool_param = True
    return made


async def test_so_many_rows_at_a_time(serve, models_folder):
    """max_inflight_requests."""
    served = await put(serve, models_folder, *CUT, "max_inflight_requests: 2")
    model = served.models.find("cut", "")
    async with occupied(model):
        call = served.stub.ModelInfer(asked(*range(1, 8)))
        await until(lambda: len(model.scheduler._queue) >= 1)
        assert len(model.scheduler._queue) == 2
    assert output(await call, "sums").tolist() == sums(*range(1, 8))


async def test_more_rows_than_the_queue_holds_are_no_overload(serve, models_folder):
    served = await put(serve, models_folder, calls=130)
    sizes = [n % 10 + 1 for n in range(1000)]
    assert output(await served.stub.ModelInfer(asked(*sizes)), "sums").tolist() == sums(*sizes)


async def test_a_row_that_fails_is_named_and_the_request_fails(serve, models_folder):
    models_folder.bare("lookup", onnx_files.lookup())
    models_folder.ensemble("e", step("lookup", {"i": "i"}, {"y": "y"}), more=parameter("each.0", "i"))
    served = await serve(models_folder.root)
    code, why = await refused(served, request("e", i=np.array([[0], [1], [7]], np.int64)))
    assert code is grpc.StatusCode.INTERNAL
    assert "in ensemble 'e', step 0, model 'lookup': row 2 of 3: Failed to process" in why
    good = np.array([[2], [0], [1], [2]], np.int64)
    assert output(await served.stub.ModelInfer(request("e", i=good)), "y").tolist() == [[30], [10], [20], [30]]


async def test_tensors_with_different_numbers_of_rows(serve, models_folder):
    models_folder.ensemble("e", step("add", {"a": "a", "b": "b"}, {"sum": "s"}), more=parameter("each.0", "a, b"))
    models_folder.ensemble("one", step("add", {"a": "a", "b": "b"}, {"sum": "s"}), more=parameter("each.0", "a"))
    served = await serve(models_folder.root)
    code, why = await refused(served, request("e", a=floats([1, 2], [3, 4]), b=floats([1, 2])))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "tensor 'b' has 1 rows, and tensor 'a' has 2" in why
    response = await served.stub.ModelInfer(request("one", a=floats([1, 2], [3, 4]), b=np.array([10, 20], np.float32)))
    assert output(response, "s").tolist() == [[11, 22], [13, 24]]


async def test_rows_of_different_shapes_are_no_tensor(serve, models_folder):
    more = MORE.replace(tensor("output", "sums", "-1, 1"), tensor("output", "pieces", "-1, -1"))
    served = await put(serve, models_folder, more=more)
    assert output(await served.stub.ModelInfer(asked(2, 2)), "pieces").tolist() == [[1, 2], [1, 2]]
    code, why = await refused(served, asked(2, 3))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "in ensemble 'e': output 'pieces': its 2 rows have different shapes ([2], [3])" in why


async def test_rows_are_stacked_for_a_step_that_takes_them_all(serve, models_folder):
    served = await put(serve, models_folder, more=MORE.replace(parameter("each.sum", "pieces"), ""))
    assert output(await served.stub.ModelInfer(asked(4, 4, 4)), "sums").tolist() == sums(4, 4, 4)
    assert output(await served.stub.ModelInfer(asked()), "sums").tolist() == []
    assert served.models.find("sum", "").statistics.by_rows.keys() == {3}
    code, why = await refused(served, asked(4, 5))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "step 1, model 'sum': input 'x', tensor 'pieces': its rows have different shapes" in why
    code, why = await refused(served, asked(*[2] * 65))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "65 rows, its model takes 64 at most: give them row by row" in why
