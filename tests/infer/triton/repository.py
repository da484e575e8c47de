"""One model repository for two servers: real Triton and Shoal. Every model is a model.py of Triton's python backend.

double      y = 2x, FP32 [n,4], at most 8 rows; dynamic batching
add         sum = a + b, difference = a - b, FP32 [n,k], at most 8 rows
flat        y = x, FP32 [2,3], no batch dimension
same_<dt>   y = x, [n,k] of each datatype that NumPy has, at most 8 rows
classes     y = x, FP32 [n,5], labels for the first three
scores      y = x, INT64 [k], no batch dimension
lookup      y = table[i], raises for i > 2
refuse      responds to each row on its own: an error for x < 0, else y = x
versions    1: y = 1x, 2: y = 2x, 3: y = 3x; all of them served
optional    y = x + (bias, or 100), FP32 [n,2], at most 8 rows
repeat      decoupled: `times` responses y = x + 0, x + 1, ..., each with its index
sleepy      y = x after 0.3 s; one row at a time, a queue of one
steps       sequences, direct: y = sum of x so far, which the model keeps by correlation id, START, END, READY, that id
            as its control has it and as the request does, the request's flags, and its place among the requests
            that come with it; an error for x < 0
steps_...   the same: oldest candidates; ids as text, and as 32 bits; no batch dimension

Ensembles of these:

chain       y = 4x: double twice, at most 8 rows
diamond     s = 4x, d = 0: double twice beside each other, then add; at most 4 rows
lookups     y = table[i]: lookup, which raises for i > 2
nested      y = 16x: chain twice
ragged      sum = a + b for any shapes that agree, no batch: add, whose rows are the first dimension
"""

from __future__ import annotations

from pathlib import Path

DATATYPES = ("BOOL", "INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64", "FP16", "FP32", "FP64")
"""Those of `same_<dt>`, and BYTES."""

LABELS = "ant\nbee\ncat\n"

# pb_utils comes first: its import decides, for real Triton, which NumPy is found (see triton_process).
_MODEL = """
import time

import triton_python_backend_utils as pb_utils
import numpy as np


class TritonPythonModel:
    def initialize(self, args):
        self.version = int(args["model_version"])

    def execute(self, requests):
        self.requests = requests
        return [self.respond(request) for request in requests]

    def respond(self, request):
        def given(name):
            tensor = pb_utils.get_input_tensor_by_name(request, name)
            return None if tensor is None else tensor.as_numpy()

        def response(**outputs):
            return pb_utils.InferenceResponse([pb_utils.Tensor(name, array) for name, array in outputs.items()])

"""

_BODIES = {
    "double": "return response(y=given('x') * np.float32(2))",
    "add": "return response(sum=given('a') + given('b'), difference=given('a') - given('b'))",
    "flat": "return response(y=given('x'))",
    "classes": "return response(y=given('x'))",
    "scores": "return response(y=given('x'))",
    "lookup": "return response(y=np.array([10, 20, 30], np.float32)[given('i')])",
    "versions": "return response(y=given('x') * np.float32(self.version))",
    "optional": "return response(y=given('x') + (np.float32(100) if given('bias') is None else given('bias')))",
    "sleepy": "time.sleep(0.3)\nreturn response(y=given('x'))",
    "refuse": """
if (given('x') < 0).any():
    return pb_utils.InferenceResponse(error=pb_utils.TritonError('x is below zero'))
return response(y=given('x'))
""",
    "steps": """
if not given('READY').any():
    return response(y=np.zeros((1, 8), np.float32))
if (given('x') < 0).any():
    return pb_utils.InferenceResponse(error=pb_utils.TritonError('x is below zero'))
id = request.correlation_id()
sums = self.__dict__.setdefault('sums', {})
sums[id] = given('x') + (0 if given('START').any() else sums[id])
told = [given(name).reshape(-1)[0] for name in ('START', 'END', 'READY', 'CORRID')]
shown = [sums[id].reshape(-1)[0], *told[:3], float(told[3]), float(id), request.flags(), self.requests.index(request)]
return response(y=np.array(shown, np.float32).reshape(given('x').shape[:-1] + (8,)))
""",
}

_REPEAT = """
import triton_python_backend_utils as pb_utils
import numpy as np


class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
            times = int(pb_utils.get_input_tensor_by_name(request, "times").as_numpy()[0])
            for n in range(times):
                tensors = [pb_utils.Tensor("y", x + np.float32(n)), pb_utils.Tensor("n", np.array([n], np.int32))]
                sender.send(pb_utils.InferenceResponse(tensors))
            if times < 0:
                sender.send(pb_utils.InferenceResponse(error=pb_utils.TritonError("times is below zero")))
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""


def _tensor(name: str, datatype: str, dims: str, more: str = "") -> str:
    kind = "STRING" if datatype == "BYTES" else datatype
    return f'{{ name: "{name}" data_type: TYPE_{kind} dims: [ {dims} ] {more} }}'


def _config(inputs: list[str], outputs: list[str], rows: int, more: str = "") -> str:
    given, returned = (", ".join(tensors) for tensors in (inputs, outputs))
    return f"""backend: "python"
max_batch_size: {rows}
input [ {given} ]
output [ {returned} ]
instance_group [ {{ kind: KIND_CPU count: 1 }} ]
{more}
"""


def _simple(datatype: str, dims: str, rows: int = 8, more: str = "", label: str = "") -> str:
    return _config([_tensor("x", datatype, dims)], [_tensor("y", datatype, dims, label)], rows, more)


_PAIR = (
    [_tensor("a", "FP32", "-1"), _tensor("b", "FP32", "-1")],
    [_tensor(n, "FP32", "-1") for n in ("sum", "difference")],
)


def _stepping(strategy: str, rows: int = 2, id: str = "UINT64", values: str = "fp32_false_true: [ 0, 1 ]") -> str:
    controls = "".join(
        f"""control_input [ {{ name: "{kind}" control [ {{ kind: CONTROL_SEQUENCE_{kind} {values} }} ] }} ]
        """
        for kind in ("START", "END", "READY")
    )
    more = f"""sequence_batching {{
        {strategy}
        max_sequence_idle_microseconds: 600000000
        {controls}
        control_input [ {{ name: "CORRID" control [ {{ kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_{id} }} ] }} ]
    }}"""
    return _config([_tensor("x", "FP32", "1")], [_tensor("y", "FP32", "8")], rows, more)


_BUSY = "dynamic_batching { default_queue_policy { max_queue_size: 1 } }"

CONFIGS = {
    "double": _simple("FP32", "4", more="dynamic_batching { }"),
    "add": _config(*_PAIR, rows=8),
    "flat": _simple("FP32", "2, 3", rows=0),
    "classes": _simple("FP32", "5", label='label_filename: "labels.txt"'),
    "scores": _simple("INT64", "-1", rows=0),
    "lookup": _config([_tensor("i", "INT64", "1")], [_tensor("y", "FP32", "1")], rows=8),
    "refuse": _simple("FP32", "4"),
    "versions": _simple("FP32", "4", more="version_policy { all { } }"),
    "optional": _config(
        [_tensor("x", "FP32", "2"), _tensor("bias", "FP32", "2", "optional: true")], [_tensor("y", "FP32", "2")], rows=8
    ),
    "repeat": _config(
        [_tensor("x", "FP32", "2"), _tensor("times", "INT32", "1")],
        [_tensor("y", "FP32", "2"), _tensor("n", "INT32", "1")],
        rows=0,
        more="model_transaction_policy { decoupled: true }",
    ),
    "sleepy": _simple("FP32", "1", rows=1, more=_BUSY),
    "steps": _stepping("direct { }"),
    "steps_failing": _stepping("direct { }", rows=8),
    "steps_oldest": _stepping("oldest { max_candidate_sequences: 4 }", values="int32_false_true: [ 0, 1 ]"),
    "steps_text": _stepping("direct { }", id="STRING"),
    "steps_int32": _stepping("direct { }", id="INT32", values="bool_false_true: [ false, true ]"),
    "steps_uint32": _stepping("direct { }", id="UINT32"),
    "steps_single": _stepping("direct { }", rows=0, id="INT64"),
    **{f"same_{datatype.lower()}": _simple(datatype, "-1") for datatype in (*DATATYPES, "BYTES")},
}


def _step(model: str, given: dict[str, str], gives: dict[str, str]) -> str:
    maps = [
        f'{field} {{ key: "{key}" value: "{tensor}" }}'
        for field, pairs in (("input_map", given), ("output_map", gives))
        for key, tensor in pairs.items()
    ]
    return f'{{ model_name: "{model}" model_version: -1 {" ".join(maps)} }}'


def _ensemble(inputs: list[str], outputs: list[str], rows: int, *steps: str) -> str:
    return f"""platform: "ensemble"
max_batch_size: {rows}
input [ {", ".join(inputs)} ]
output [ {", ".join(outputs)} ]
ensemble_scheduling {{ step [ {", ".join(steps)} ] }}
"""


_X, _Y = [_tensor("x", "FP32", "4")], [_tensor("y", "FP32", "4")]

ENSEMBLES = {
    "chain": _ensemble(
        _X, _Y, 8, _step("double", {"x": "x"}, {"y": "twice"}), _step("double", {"x": "twice"}, {"y": "y"})
    ),
    "diamond": _ensemble(
        _X,
        [_tensor("s", "FP32", "-1"), _tensor("d", "FP32", "-1")],
        4,
        _step("add", {"a": "p", "b": "q"}, {"sum": "s", "difference": "d"}),
        _step("double", {"x": "x"}, {"y": "p"}),
        _step("double", {"x": "x"}, {"y": "q"}),
    ),
    "lookups": _ensemble(
        [_tensor("i", "INT64", "1")], [_tensor("y", "FP32", "1")], 8, _step("lookup", {"i": "i"}, {"y": "y"})
    ),
    "nested": _ensemble(_X, _Y, 8, _step("chain", {"x": "x"}, {"y": "m"}), _step("chain", {"x": "m"}, {"y": "y"})),
    "ragged": _ensemble(
        [_tensor("a", "FP32", "-1, -1"), _tensor("b", "FP32", "-1, -1")],
        [_tensor("sum", "FP32", "-1, -1")],
        0,
        _step("add", {"a": "a", "b": "b"}, {"sum": "sum"}),
    ),
}


def write(root: Path) -> Path:
    """Fills `root`; returns it."""
    for name, config in ENSEMBLES.items():
        (root / name / "1").mkdir(parents=True)
        (root / name / "config.pbtxt").write_text(config)
    for name, config in CONFIGS.items():
        for version in (1, 2, 3) if name == "versions" else (1,):
            folder = root / name / str(version)
            folder.mkdir(parents=True)
            (folder / "model.py").write_text(_source(name))
        (root / name / "config.pbtxt").write_text(config)
    (root / "classes/labels.txt").write_text(LABELS)
    return root


def _source(name: str) -> str:
    if name == "repeat":
        return _REPEAT
    body = _BODIES.get("steps" if name.startswith("steps_") else name, "return response(y=given('x'))").strip()
    return _MODEL + "".join(f"        {line}\n" for line in body.splitlines())
