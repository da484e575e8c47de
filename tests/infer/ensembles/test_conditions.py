"""When a step is run: what may be written, what it means, and what becomes of tensors that nobody gave."""

from __future__ import annotations

import grpc
import numpy as np
import pytest
from onnx import TensorProto

from services.infer.ensembles import conditions
from services.infer.ensembles.conditions import Undecided
from shoal.oip.datatypes import BY_NAME
from tests.infer import onnx_files
from tests.infer.conftest import floats, output, request
from tests.infer.ensembles.conftest import parameter, step, tensor
from tests.infer.ensembles.test_ensembles_served import refused, states


def holds(text: str, value, datatype: str = "FP32") -> bool:
    return all(comparison.holds(value, BY_NAME[datatype]) for comparison in conditions.parse(text))


@pytest.mark.parametrize(
    ("text", "value", "datatype", "expected"),
    [
        ("x > 0", floats([1, 2]), "FP32", True),
        ("x > 0", floats([-1, 0]), "FP32", False),
        ("x>=1.5e0 and x<2", floats([1.5]), "FP32", True),
        ("x == -3", np.array([-3]), "INT64", True),
        ("x == 9007199254740993", np.array([9007199254740992]), "INT64", False),
        ("x == true", np.array([True]), "BOOL", True),
        ("x != false", np.array([False]), "BOOL", False),
        ("x == 'yes and no'", np.array(["yes and no"], object), "BYTES", True),
        ("x != 'a'", np.array([b"a"], object), "BYTES", False),
        ("x == 1", np.array([0x3F80], np.uint16), "BF16", True),
        ("x > 0", np.zeros((0, 4), np.float32), "FP32", False),
        ("x < 1", floats([np.nan]), "FP32", False),
        ("count(x) == 3", np.zeros((3, 0)), "FP32", True),
        ("count( x ) > 1", [floats([1])], "FP32", False),
        ("x > 0", [floats([1]), floats([2, 3])], "FP32", True),
    ],
)
def test_what_holds(text, value, datatype, expected):
    assert holds(text, value, datatype) is expected


def test_rows_that_disagree_are_not_decided_by_any_of_them():
    with pytest.raises(Undecided, match="x > 0 holds for some elements of 'x' and not for others"):
        holds("x > 0", floats([1, -1]))


@pytest.mark.parametrize(
    "text", ["", "x", "x >", "> 0", "x > 0 and", "x > 0 x < 1", "x = 0", "x > zero", "x == 'a", "count(x > 0", "x>0y<1"]
)
def test_what_is_no_condition(text):
    with pytest.raises(ValueError, match="expected"):
        conditions.parse(text)


BRANCHES = (
    step("double", {"x": "x"}, {"y": "y"}),
    step("triple", {"x": "x"}, {"y": "y"}),
)


async def test_branches_that_give_one_tensor(serve, models_folder):
    models_folder.bare("flag", onnx_files.identity(TensorProto.INT64, ("n", 1)))
    more = parameter("when.double", "kind == 1") + parameter("when.1", "kind == 2")
    more += "max_batch_size: 8 " + tensor("input", "x") + tensor("input", "k", "1", "INT64") + tensor("output", "z")
    models_folder.ensemble(
        "e", *BRANCHES, step("flag", {"x": "k"}, {"y": "kind"}), step("double", {"x": "y"}, {"y": "z"}),
        more=more.replace("when.double", "when.0"),
    )  # fmt: skip
    served = await serve(models_folder.root)
    x = floats([1, 2, 3, 4], [5, 6, 7, 8])

    def asked(*kinds: int):
        return request("e", x=x, k=np.array([[kind] for kind in kinds], np.int64))

    assert np.array_equal(output(await served.stub.ModelInfer(asked(1, 1)), "z"), 4 * x)
    assert np.array_equal(output(await served.stub.ModelInfer(asked(2, 2)), "z"), 6 * x)
    runs = served.models.find("double", "").statistics.executions
    code, why = await refused(served, asked(3, 3))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "in ensemble 'e': output 'z': every step that gives it was skipped" in why
    assert served.models.find("double", "").statistics.executions == runs
    code, why = await refused(served, asked(1, 2))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "step 0, model 'double': kind == 1 holds for some elements" in why
    assert "send these rows in separate requests" in why


async def test_a_tensor_of_two_branches_has_the_shapes_of_either(serve, models_folder):
    models_folder.bare("four", onnx_files.scale(dims=("n", 4)))
    models_folder.bare("any", onnx_files.scale(dims=("n", "k")))
    models_folder.bare("eight", onnx_files.scale(dims=("n", 8)))
    more = parameter("when.0", "kind > 0") + parameter("when.1", "kind <= 0")
    more += "max_batch_size: 8 " + tensor("input", "w", "4") + tensor("input", "x", "-1")
    more += tensor("input", "kind", "1") + tensor("output", "z", "8")
    branches = step("four", {"x": "w"}, {"y": "y"}), step("any", {"x": "x"}, {"y": "y"})
    models_folder.ensemble("e", *branches, step("eight", {"x": "y"}, {"y": "z"}), more=more)
    served = await serve(models_folder.root)
    x = floats([*range(8)])
    asked = request("e", w=floats([1, 2, 3, 4]), x=x, kind=floats([-1]))
    assert np.array_equal(output(await served.stub.ModelInfer(asked), "z"), 4 * x)


async def test_the_first_that_ran_counts_when_several_did(serve, models_folder):
    more = parameter("when.0", "x > 5") + parameter("when.1", "x > 0")
    models_folder.ensemble("e", *BRANCHES, more=more)
    served = await serve(models_folder.root)
    large, small = floats([6, 7, 8, 9]), floats([1, 2, 3, 4])
    assert np.array_equal(output(await served.stub.ModelInfer(request("e", x=large)), "y"), 2 * large)
    assert np.array_equal(output(await served.stub.ModelInfer(request("e", x=small)), "y"), 3 * small)


async def test_an_output_that_was_skipped_may_be_empty(serve, models_folder):
    models_folder.bare("any", onnx_files.scale(dims=("n", "k")))
    more = parameter("when.any", "x > 0") + parameter("skipped.y", "empty")
    models_folder.ensemble("e", step("any", {"x": "x"}, {"y": "y"}), step("any", {"x": "x"}, {"y": "z"}),
                           more=more.replace("when.any", "when.0"))  # fmt: skip
    served = await serve(models_folder.root)
    response = await served.stub.ModelInfer(request("e", x=floats([-1], [-2])))
    assert (output(response, "y").shape, output(response, "z").tolist()) == ((2, 0), [[-2], [-4]])


async def test_an_input_that_is_left_out_skips_what_needs_it(serve, models_folder):
    more = 'max_batch_size: 4 input { name: "a" data_type: TYPE_FP32 dims: [4] optional: true } ' + tensor("input", "b")
    models_folder.ensemble("e", step("double", {"x": "a"}, {"y": "p"}), step("triple", {"x": "b"}, {"y": "q"}),
                           more=more + tensor("output", "p") + tensor("output", "q"))  # fmt: skip
    served = await serve(models_folder.root)
    assert states(served)["e"] == ("READY", "")
    b = floats([1, 2, 3, 4])
    asked = request("e", b=b)
    asked.outputs.add(name="q")
    assert np.array_equal(output(await served.stub.ModelInfer(asked), "q"), 3 * b)
    assert "output 'p'" in (await refused(served, request("e", b=b)))[1]
    assert np.array_equal(output(await served.stub.ModelInfer(request("e", a=b, b=b)), "p"), 2 * b)
