"""The repository that the conformance suite is run on: one small model for each thing that the protocol speaks of."""

from __future__ import annotations

from pathlib import Path

from onnx import ModelProto, TensorProto

from tests.infer import onnx_files

ONNX_TYPES = {
    "BOOL": TensorProto.BOOL,
    "INT8": TensorProto.INT8,
    "INT16": TensorProto.INT16,
    "INT32": TensorProto.INT32,
    "INT64": TensorProto.INT64,
    "UINT8": TensorProto.UINT8,
    "UINT16": TensorProto.UINT16,
    "UINT32": TensorProto.UINT32,
    "UINT64": TensorProto.UINT64,
    "FP16": TensorProto.FLOAT16,
    "BF16": TensorProto.BFLOAT16,
    "FP32": TensorProto.FLOAT,
    "FP64": TensorProto.DOUBLE,
    "BYTES": TensorProto.STRING,
}

CONFIGS = {
    "double": """
        max_batch_size: 8
        input [ { name: "x" data_type: TYPE_FP32 dims: [ 4 ] } ]
        output [ { name: "y" data_type: TYPE_FP32 dims: [ 4 ] } ]
        parameters { key: "note" value { string_value: "kept" } }
    """,
    "classes": """
        max_batch_size: 8
        input [ { name: "x" data_type: TYPE_FP32 dims: [ 5 ] } ]
        output [ { name: "y" data_type: TYPE_FP32 dims: [ 5 ] label_filename: "labels.txt" } ]
    """,
    "versions": "version_policy { all {} }",
    "decode": """
        backend: "kernels"
        max_batch_size: 8
        parameters { key: "operation" value { string_value: "decode_image" } }
    """,
    "steps": """
        max_batch_size: 4
        sequence_batching {
          direct { }
          max_sequence_idle_microseconds: 600000000
          control_input { name: "START" control { kind: CONTROL_SEQUENCE_START fp32_false_true: [0, 1] } }
          control_input { name: "END" control { kind: CONTROL_SEQUENCE_END fp32_false_true: [0, 1] } }
          control_input { name: "READY" control { kind: CONTROL_SEQUENCE_READY fp32_false_true: [0, 1] } }
          control_input { name: "CORRID" control { kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_INT64 } }
          state { input_name: "total_in" output_name: "total_out" data_type: TYPE_FP32 dims: 1 }
          state { input_name: "product_in" output_name: "product_out" data_type: TYPE_FP32 dims: 1 }
        }
    """,
    "patient": """
        max_batch_size: 4
        dynamic_batching { max_queue_delay_microseconds: 60000000 }
    """,
}

LABELS = "ant\nbee\ncat\n"
"""Of `classes`: two of its five classes have none."""

REPEAT = """
import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            times = int(pb_utils.get_input_tensor_by_name(request, "times").as_numpy()[0])
            for n in range(times):
                sender.send(pb_utils.InferenceResponse([pb_utils.Tensor("n", np.array([n], np.int32))]))
            if times < 0:
                sender.send(pb_utils.InferenceResponse(error=pb_utils.TritonError("times is below zero")))
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""

CHAIN = """
platform: "ensemble"
ensemble_scheduling {
  step [
    { model_name: "double" model_version: -1
      input_map { key: "x" value: "x" } output_map { key: "y" value: "twice" } },
    { model_name: "double" model_version: -1
      input_map { key: "x" value: "twice" } output_map { key: "y" value: "y" } }
  ]
}
"""

REPEAT_CONFIG = """
backend: "python"
max_batch_size: 0
model_transaction_policy { decoupled: true }
input [ { name: "times" data_type: TYPE_INT32 dims: [ 1 ] } ]
output [ { name: "n" data_type: TYPE_INT32 dims: [ 1 ] } ]
"""


def write(root: Path) -> Path:
    """Fills `root`; returns it.

    double      y = 2x, FP32 [n,4], at most 8 rows
    add         sum = a + b, difference = a - b, FP32 [n,k]
    flat        y = x, FP32 [2,3], no batch dimension
    scalar      y = x, FP32 [], no batch dimension
    same_<dt>   y = x, [n,k] of each datatype
    classes     y = x, FP32 [n,5], labels for the first three
    lookup      y = table[i], raises for i > 2
    versions    1: y = 1x, 2: y = 2x, 3: y = 3x; all of them served
    slow        y = 2x after some milliseconds of arithmetic
    patient     y = 2x, which waits a minute for the fourth row
    decode      an operation without a model file: BYTES of an image to its pixels
    steps       sequences: total = sum of x so far, FP32 [n,1]
    chain       y = 4x, an ensemble: double twice
    repeat      decoupled, model.py: `times` responses n = 0, 1, ...; an error when `times` is negative
    """
    _put(root, "double", onnx_files.scale(2))
    _put(root, "add", onnx_files.add())
    _put(root, "flat", onnx_files.identity(dims=(2, 3)))
    _put(root, "scalar", onnx_files.identity(dims=()))
    for datatype, onnx_type in ONNX_TYPES.items():
        _put(root, f"same_{datatype.lower()}", onnx_files.identity(onnx_type, ("n", "k")))
    _put(root, "classes", onnx_files.identity(dims=("n", 5)))
    (root / "classes/labels.txt").write_text(LABELS)
    _put(root, "lookup", onnx_files.lookup())
    for version in (1, 2, 3):
        _put(root, "versions", onnx_files.scale(version), version)
    _put(root, "slow", onnx_files.slow())
    _put(root, "patient", onnx_files.scale(2))
    put_chain(root)
    put_decode(root)
    _put(root, "steps", onnx_files.accumulating())
    put_repeat(root)
    return root


def put_chain(root: Path) -> None:
    """Adds `chain`, an ensemble of `double`."""
    (root / "chain/1").mkdir(parents=True)
    (root / "chain/config.pbtxt").write_text(CHAIN)


def put_decode(root: Path) -> None:
    """Adds `decode`, which has a configuration and an empty version."""
    (root / "decode/1").mkdir(parents=True)
    (root / "decode/config.pbtxt").write_text(CONFIGS["decode"])


def put_repeat(root: Path) -> None:
    """Adds `repeat`, whose responses to one request are as many as it says."""
    (root / "repeat/1").mkdir(parents=True)
    (root / "repeat/1/model.py").write_text(REPEAT)
    (root / "repeat/config.pbtxt").write_text(REPEAT_CONFIG)


def _put(root: Path, name: str, model: ModelProto, version: int = 1) -> None:
    folder = root / name / str(version)
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    if name in CONFIGS:
        (root / name / "config.pbtxt").write_text(CONFIGS[name])
