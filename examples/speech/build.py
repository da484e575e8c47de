"""Build of the model repository: the configuration from models/, and silero-vad's ONNX file as a stateful model.

    python -m examples.speech.build FOLDER      then: shoal models push FOLDER, or shoal serve FOLDER

The package's file has the batch as the second dimension of its state. The package's Python code prepends the last 64
samples to the next 512. A few added nodes do both in the graph, so that the server can keep the state and the samples:

    context_in ──┐                          ┌── speech
    audio ───────┴ Concat ── silero-vad ────┤
    state_in ────── Transpose ──┘           └── Transpose ── state_out;     Concat ── last 64 ── context_out
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from examples import originals, repository

RATE = 16_000
CHUNK = 512
CONTEXT = 64


def build(into: Path) -> Path:
    """Write the repository to `into`, and return `into`."""
    original = onnx.load(originals.folder("silero_vad") / "data" / "silero_vad.onnx")
    files = {"speech/1/model.onnx": with_state(original).SerializeToString()}
    return repository.build(Path(__file__).parent / "models", into, files)


def with_state(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return silero-vad at 16 kHz with inputs and outputs for its state and context, with the batch first."""
    graph = model.graph
    names = {value.name for value in [*graph.input, *graph.output]}
    if names != {"input", "state", "sr", "output", "stateN"}:
        raise ValueError(f"unknown version of silero-vad, with the inputs and outputs {sorted(names)}")
    before = [
        helper.make_node("Concat", ["context_in", "audio"], ["input"], axis=1),
        helper.make_node("Transpose", ["state_in"], ["state"], perm=[1, 0, 2]),
    ]
    after = [
        helper.make_node("Identity", ["output"], ["speech"]),
        helper.make_node("Transpose", ["stateN"], ["state_out"], perm=[1, 0, 2]),
        helper.make_node("Slice", ["input", "context_start", "context_end", "context_axis"], ["context_out"]),
    ]
    numbers = {"sr": RATE, "context_start": [CHUNK], "context_end": [CHUNK + CONTEXT], "context_axis": [1]}
    constants = [numpy_helper.from_array(np.array(value, np.int64), name) for name, value in numbers.items()]
    made = helper.make_graph(
        [*before, *graph.node, *after],
        "speech",
        [_values("audio", CHUNK), _values("state_in", 2, 128), _values("context_in", CONTEXT)],
        [_values("speech", 1), _values("state_out", 2, 128), _values("context_out", CONTEXT)],
        [*graph.initializer, *constants],
    )
    return helper.make_model(made, opset_imports=model.opset_import, ir_version=model.ir_version)


def _values(name: str, *dims: int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *dims])


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(build(Path(sys.argv[1])))
