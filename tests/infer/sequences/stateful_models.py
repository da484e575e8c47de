"""Stateful models for tests: real ONNX files and configurations."""

from __future__ import annotations

import numpy as np

from shoal.inference.v2 import inference_pb2 as pb
from tests.infer.conftest import Repository, floats, request
from tests.infer.onnx_files import accumulating

CONTROLS = """
    control_input { name: "START" control { kind: CONTROL_SEQUENCE_START fp32_false_true: [0, 1] } }
    control_input { name: "END" control { kind: CONTROL_SEQUENCE_END fp32_false_true: [0, 1] } }
    control_input { name: "READY" control { kind: CONTROL_SEQUENCE_READY fp32_false_true: [0, 1] } }
    control_input { name: "CORRID" control { kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_INT64 } }
"""
STATES = """
    state { input_name: "total_in" output_name: "total_out" data_type: TYPE_FP32 dims: 1 }
    state {
      input_name: "product_in" output_name: "product_out" data_type: TYPE_FP32 dims: 1
      initial_state { name: "one" data_type: TYPE_FP32 dims: 1 data_file: "one" }
    }
"""


def config(strategy: str, *, rows: int = 4, idle_us: int = 0, more: str = "", controls: str = CONTROLS) -> str:
    """Of a model `accumulating`."""
    return f"""
max_batch_size: {rows}
{more}
sequence_batching {{
  {strategy}
  max_sequence_idle_microseconds: {idle_us}
  {controls}
  {STATES}
}}
"""


def put(folder: Repository, name: str, text: str) -> None:
    """Adds a model `accumulating`; its product begins with 1."""
    made = folder.put(name, accumulating(), config=text)
    (made / "initial_state").mkdir(exist_ok=True)
    (made / "initial_state/one").write_bytes(np.float32(1).tobytes())


def step(
    model: str, id: int | str | None, x: float = 1, *, start: bool = False, end: bool = False
) -> pb.ModelInferRequest:
    """One request of sequence `id`."""
    made = request(model, x=floats([x]))
    if isinstance(id, str):
        made.parameters["sequence_id"].string_param = id
    elif id is not None:
        made.parameters["sequence_id"].int64_param = id
    if start:
        made.parameters["sequence_start"].bool_param = True
    if end:
        made.parameters["sequence_end"].bool_param = True
    return made
