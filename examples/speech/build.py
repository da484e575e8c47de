"""Writes the model repository: the configuration from models/, and silero-vad's ONNX file as a model that remembers.

    python -m examples.speech.build FOLDER      then: shoal models push FOLDER, or shoal serve FOLDER

The package's file takes a batch as the second dimension of its state, and leaves it to the package's Python code to put
the last 64 samples before the next 512. A few nodes around it say both in the graph, so that the server can keep them:

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
    """The repository in `into`; returns it."""
    original = onnx.load(originals.folder("silero_vad") / "data" / "silero_vad.onnx")
    files = {"speech/1/model.onnx": remembering(original).SerializeToString()}
    return repository.build(Path(__file__).parent / "models", into, files)


def remembering(model: onnx.ModelProto) -> onnx.ModelProto:
    """silero-vad at 16 kHz with `state_in`, `context_in` and their outputs, each with the batch as first dimension."""
    graph = model.graph
    names = {value.name for value in [*graph.input, *graph.output]}
    if names != {"input", "state", "sr", "output", "stateN"}:
        raise ValueError(f"this is not the silero-vad that is known here: its inputs and outputs are {sorted(names)}")
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
