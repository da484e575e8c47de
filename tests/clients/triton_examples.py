"""Triton's own HTTP examples, as they are, and the models that they ask.

The examples are copies from https://github.com/triton-inference-server/client, src/python/examples, at
58a44caa0dce77303115302e6dbdf64626b2b093. Left out: examples of shared memory, one that expects a server named `triton`,
and one that expects a repository of seven models.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from onnx import TensorProto, helper

from tests.infer import onnx_files

EXAMPLES = Path(__file__).parent / "python/triton_examples"
MODELS = ("simple", "simple_identity", "simple_sequence", "simple_string")

# One process for all of them: the imports take most of the time.
_RUN = """
import contextlib, io, json, runpy, sys
url, *paths = sys.argv[1:]
found = {}
for path in paths:
    sys.argv, out, code = [path, "-u", url], io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
    found[path.rpartition("/")[2]] = [code, out.getvalue()[-1000:]]
print(json.dumps(found))
"""


def put_models(root: Path) -> None:
    """Write MODELS: sums and differences of numbers and of texts, the same text, and x + 1 at a sequence's start."""
    numbers, texts = (TensorProto.INT32, ("n", 16)), (TensorProto.STRING, ("n", 16))
    pair = [helper.make_node("Add", ["i0", "i1"], ["o0"]), helper.make_node("Sub", ["i0", "i1"], ["o1"])]
    _put(root / "simple", [_renamed(node) for node in pair], [numbers, numbers], [numbers, numbers])
    read = [helper.make_node("Cast", [f"INPUT{n}"], [f"i{n}"], to=TensorProto.INT32) for n in (0, 1)]
    written = [helper.make_node("Cast", [f"o{n}"], [f"OUTPUT{n}"], to=TensorProto.STRING) for n in (0, 1)]
    _put(root / "simple_string", [*read, *pair, *written], [texts, texts], [texts, texts])
    any_texts = (TensorProto.STRING, ("n", "k"))
    same = helper.make_node("Identity", ["INPUT0"], ["OUTPUT0"])
    _put(root / "simple_identity", [same], [any_texts], [any_texts])
    row = (TensorProto.INT32, ("n", 1))
    model = onnx_files.model(
        [helper.make_node("Add", ["INPUT", "START"], ["OUTPUT"])],
        [("INPUT", *row), ("START", *row)],
        [("OUTPUT", *row)],
    )
    start = 'control_input { name: "START" control { kind: CONTROL_SEQUENCE_START int32_false_true: [0, 1] } }'
    _write(root / "simple_sequence", model, f"sequence_batching {{ {start} }}")


def _renamed(node: Any) -> Any:
    names = {"i0": "INPUT0", "i1": "INPUT1", "o0": "OUTPUT0", "o1": "OUTPUT1"}
    return helper.make_node(node.op_type, [names[name] for name in node.input], [names[name] for name in node.output])


def _put(folder: Path, nodes: list[Any], inputs: list[Any], outputs: list[Any]) -> None:
    named = [
        [(f"{kind}{n}", *of) for n, of in enumerate(all_of)]
        for kind, all_of in (("INPUT", inputs), ("OUTPUT", outputs))
    ]
    _write(folder, onnx_files.model(nodes, *named), "")


def _write(folder: Path, model: Any, config: str) -> None:
    (folder / "1").mkdir(parents=True)
    (folder / "1/model.onnx").write_bytes(model.SerializeToString())
    (folder / "config.pbtxt").write_text(f"max_batch_size: 8\n{config}\n")


def failed(python: Path, address: str) -> dict[str, Any]:
    """Run the examples at `address`; return the status and the output of those that fail."""
    examples = sorted(map(str, EXAMPLES.glob("*.py")))
    assert len(examples) == 4
    command = [str(python), "-c", _RUN, address, *examples]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return {name: seen for name, seen in json.loads(done.stdout).items() if seen[0]}
