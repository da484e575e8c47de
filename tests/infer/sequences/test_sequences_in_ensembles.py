"""A stateful model as a step of an ensemble: the request's sequence is the step's."""

from __future__ import annotations

import grpc
import pytest

from tests.infer.conftest import Repository, output
from tests.infer.sequences.stateful_models import config, put, step

ENSEMBLE = """
platform: "ensemble"
max_batch_size: 4
input { name: "x" data_type: TYPE_FP32 dims: 1 }
output { name: "total" data_type: TYPE_FP32 dims: 1 }
ensemble_scheduling {
  step {
    model_name: "m"
    model_version: -1
    input_map { key: "x" value: "x" }
    output_map { key: "total" value: "total" }
  }
}
"""


async def test_the_sequence_is_passed_on(serve, models_folder: Repository):
    put(models_folder, "m", config("direct { }"))
    folder = models_folder.root / "e"
    (folder / "1").mkdir(parents=True)
    (folder / "config.pbtxt").write_text(ENSEMBLE)
    served = await serve(models_folder.root)
    infer = served.stub.ModelInfer
    with pytest.raises(grpc.aio.AioRpcError) as err:
        await infer(step("e", 1))
    assert err.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "must specify the START flag" in err.value.details()
    responses = [await infer(step("e", 1, 2, start=n == 0, end=n == 3)) for n in range(4)]
    assert [output(response, "total").item() for response in responses] == [2, 4, 6, 8]
    ready = {name: has_sequences for name, _, has_sequences, _ in served.models.ready_set.value}
    assert ready == {"e": True, "m": True}, "the mesh keeps its sequences together, too"
