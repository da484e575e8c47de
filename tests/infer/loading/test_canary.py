"""Trial runs of a version before it is READY: batches of each size run, and the outputs fit the signature."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from services.infer.loading import warmup
from services.infer.loading.model_config import Completed
from services.infer.requests.signature import Signature, TensorSpec
from services.infer.runtimes.runtime import ModelFailed, Session
from shoal.errors import FailedPrecondition
from shoal.inference.v2 import inference_pb2 as pb
from shoal.inference.v2 import model_config_pb2
from shoal.oip.datatypes import BY_NAME
from tests.infer import onnx_files
from tests.infer.conftest import Repository, floats, output, request

F = BY_NAME["FP32"]


class Recorded(Session):
    """y = x, written down; each run takes what `took` says on the clock of the test."""

    def __init__(self, compute=lambda x: x, took=lambda rows: 0.0) -> None:
        self.rows: list[int] = []
        self.now = 0.0
        self._compute, self._took = compute, took

    inputs = outputs = ()
    text = True

    def run(self, inputs, outputs):
        self.rows.append(len(inputs["x"]))
        self.now += self._took(len(inputs["x"]))
        return [self._compute(inputs["x"])]

    def close(self) -> None: ...


def model(largest: int = 64, *, shape=(-1, 4), given: bool = True) -> Completed:
    config = model_config_pb2.ModelConfig(max_batch_size=largest)
    config.input.add(name="x")
    config.output.add(name="y", dims=shape[1:])
    signature = Signature((TensorSpec("x", F, (-1, 4)),), (TensorSpec("y", F, shape),), largest, True)
    return Completed(config, signature, False, frozenset({"y"} if given else ()))


def warm(session: Session, what: Completed) -> Completed:
    return warmup.run("m", what, session, None, lambda: session.now)


@pytest.mark.parametrize(
    ("largest", "sizes"), [(1, []), (2, [2]), (3, [2, 3]), (8, [2, 4, 8]), (100, [2, 4, 8, 16, 32, 64, 100])]
)
def test_each_size_is_run(largest, sizes):
    session = Recorded()
    warm(session, model(largest))
    trial = [2, 1, 2, 1, 2] if largest > 1 else []
    assert session.rows == [1, 1, *trial, *sizes]


def test_a_slow_model_is_not_run_for_long():
    session = Recorded(took=lambda rows: 0.03 * rows)
    warm(session, model(64))
    # Four more would take 0.24 s.
    assert session.rows == [1, 1, 2, 1, 2, 1, 2, 2, 4]


def test_a_model_whose_trial_would_take_too_long_has_none():
    session = Recorded(took=lambda rows: 0.15 * rows)
    warm(session, model(64))
    assert session.rows == [1, 1]


def test_large_rows_are_not_run_in_large_batches():
    session = Recorded()
    what = model(1024)
    wide = Signature((TensorSpec("x", F, (-1, 1 << 20)),), (TensorSpec("y", F, (-1, 1 << 20)),), 1024, True)
    warm(session, Completed(what.config, wide, False))
    assert max(session.rows) == 16


def test_a_size_that_fails_is_named():
    def compute(x):
        if len(x) == 8:
            raise ModelFailed("eight is too many")
        return x

    with pytest.raises(FailedPrecondition, match=r"batch of 8 rows \(max_batch_size 64\): eight is too many"):
        warm(Recorded(compute), model(64))


@pytest.mark.parametrize(
    ("compute", "named"),
    [
        (lambda x: x.astype(np.float64), "gave float64 in its trial run, expected FP32"),
        (lambda x: x[:, :3], r"promises \[-1,4\], the model gave \[1,3\]"),
        (lambda x: x[0], r"gave \[4\] for 1 rows in its trial run: its first dimension is no batch"),
        (lambda x: x[:1], r"gave \[1,4\] for 2 rows"),
        (lambda x: np.concatenate([x, x]), r"gave \[2,4\] for 1 rows"),
    ],
)
def test_outputs_that_were_not_promised(compute, named):
    with pytest.raises(FailedPrecondition, match=named):
        warm(Recorded(compute), model())


def test_what_only_the_file_says_is_put_right():
    done = warm(Recorded(lambda x: x[:, :3]), model(given=False))
    assert done.signature.outputs[0].shape == (-1, -1)
    assert list(done.config.output[0].dims) == [-1]
    done = warm(Recorded(), model(shape=(), given=False))
    assert done.signature.outputs[0].shape == (-1, -1)


async def test_a_file_that_states_a_wrong_shape(serve, models_folder: Repository):
    wrong = onnx_files.scale(2, dims=("n", 4))
    del wrong.graph.output[0].type.tensor_type.shape.dim[:]
    wrong.graph.output[0].type.tensor_type.shape.dim.add().dim_value = 7
    wrong.graph.output[0].type.tensor_type.shape.dim.add().dim_value = 9
    models_folder.bare("m", wrong)
    served = await serve(models_folder.root)
    metadata = await served.stub.ModelMetadata(pb.ModelMetadataRequest(name="m"))
    assert list(metadata.outputs[0].shape) in ([-1, 4], [-1, -1])
    assert output(await served.stub.ModelInfer(request("m", x=floats([1, 2, 3, 4]))), "y").tolist() == [[2, 4, 6, 8]]


def with_default():
    """y = x + b, where b is an input that the file has a value for."""
    return onnx_files.model(
        [helper.make_node("Add", ["x", "b"], ["y"])],
        [("x", TensorProto.FLOAT, ("n", 4)), ("b", TensorProto.FLOAT, (None, 4))],
        [("y", TensorProto.FLOAT, ("n", 4))],
        [numpy_helper.from_array(np.full((1, 4), 10, np.float32), "b")],
    )


OPTIONAL = """
max_batch_size: 8
input [
  { name: "x" data_type: TYPE_FP32 dims: [4] },
  { name: "b" data_type: TYPE_FP32 dims: [4] optional: true }
]
"""


async def test_an_input_may_be_left_out(serve, models_folder: Repository):
    models_folder.put("m", with_default(), config=OPTIONAL)
    models_folder.put("needed", with_default(), config=OPTIONAL.replace("optional: true", ""))
    models_folder.put("none", with_default())
    models_folder.put("not", onnx_files.add(), config=OPTIONAL.replace('"x"', '"a"'))
    served = await serve(models_folder.root)
    x, b = floats([1, 2, 3, 4]), floats([5, 5, 5, 5])
    assert output(await served.stub.ModelInfer(request("m", x=x)), "y").tolist() == (x + 10).tolist()
    assert output(await served.stub.ModelInfer(request("m", x=x, b=b)), "y").tolist() == (x + 5).tolist()
    assert output(await served.stub.ModelInfer(request("none", x=x)), "y").tolist() == (x + 10).tolist()
    assert output(await served.stub.ModelInfer(request("needed", x=x, b=b)), "y").tolist() == (x + 5).tolist()
    for asked in (request("needed", x=x), request("m", b=b), request("none", x=x, b=b)):
        with pytest.raises(Exception, match="input"):
            await served.stub.ModelInfer(asked)
    twice = request("m", x=x, b=b)
    twice.inputs[1].name = "x"
    with pytest.raises(Exception, match="more than once"):
        await served.stub.ModelInfer(twice)
    (row,) = [row for row in served.models.index() if row.name == "not"]
    assert "input 'b' is optional in the configuration, and the model needs it" in row.reason
