"""The steps of examples/embeddings as an ensemble of a real Triton: the binary in the wheel `nvidia-pytriton`.

That wheel has no ONNX Runtime backend, so every step is a model of Triton's python backend (triton_embeddings/), which
calls tokenizers, ONNX Runtime and NumPy. Each has one instance, one process, and batches the requests that wait.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.infer.triton import triton_process

NEEDED = ("pytriton", "onnxruntime", "tokenizers")
ROWS = 64

MODELS = Path(__file__).with_name("triton_embeddings")

_TEXT = '{ name: "text" data_type: TYPE_STRING dims: 1 }'
_EMBEDDING = '{ name: "embedding" data_type: TYPE_FP32 dims: 384 }'
# Without `allow_ragged_batch`, Triton would batch only requests of one length.
_IDS = '{ name: "input_ids" data_type: TYPE_INT64 dims: -1 RAGGED }'
_MASK = '{ name: "attention_mask" data_type: TYPE_INT64 dims: -1 RAGGED }'
_TOKENS = '{ name: "token_embeddings" data_type: TYPE_FP32 dims: [ -1, 384 ] RAGGED }'

STEPS = {
    "tokenize": ([_TEXT], [_IDS, _MASK]),
    "minilm": ([_IDS, _MASK], [_TOKENS]),
    "pool": ([_TOKENS, _MASK], [_EMBEDDING]),
}
"""Inputs and outputs by step. Between the steps, a tensor has the same name on both sides."""


def check(environment: Path) -> None:
    """Ends the program, with what to do, when a package is missing in `environment`."""
    missing = [name for name in NEEDED if not list(environment.glob(f"lib/python3*/site-packages/{name}"))]
    if missing:
        sys.exit(
            f"--triton-venv {environment}: it has no {', '.join(missing)}: run `make .venv-triton/.installed`, install "
            "onnxruntime and tokenizers into .venv-triton with pip, and name that folder"
        )


@contextmanager
def serving(environment: Path, shoals: Path, padded: str, threads: int, work: Path) -> Iterator[tuple[str, int]]:
    """Serves the ensemble `embed` until the block ends: its address and its process.

    Args:
        environment: the virtual environment with the wheel, onnxruntime and tokenizers.
        shoals: the repository that examples/embeddings/build.py wrote, for the ONNX file and the tokenizer.
        padded: `batch` or `own`, see triton_embeddings/minilm.py.
        work: an empty folder.
    """
    before = _children()
    root = _write(work / "repository", shoals, padded, threads)
    (work / "server").mkdir()
    with triton_process.running(environment, root, work / "server") as address:
        [pid] = _children() - before
        yield address, pid


def _children() -> set[int]:
    return {int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}


def _write(root: Path, shoals: Path, padded: str, threads: int) -> Path:
    for step, (inputs, outputs) in STEPS.items():
        (root / step / "1").mkdir(parents=True)
        shutil.copy(MODELS / f"{step}.py", root / step / "1/model.py")
        (root / step / "config.pbtxt").write_text(_step(inputs, outputs, {"padded": padded, "threads": str(threads)}))
    shutil.copy(shoals / "embed_tokenize/1/tokenizer.json", root / "tokenize/1")
    shutil.copy(shoals / "embed_minilm/1/model.onnx", root / "minilm/1")
    (root / "embed/1").mkdir(parents=True)
    (root / "embed/config.pbtxt").write_text(_ensemble())
    return root


def _step(inputs: list[str], outputs: list[str], parameters: dict[str, str]) -> str:
    settings = "\n".join(
        f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}' for key, value in parameters.items()
    )
    return f"""backend: "python"
max_batch_size: {ROWS}
input [ {", ".join(inputs).replace("RAGGED", "allow_ragged_batch: true")} ]
output [ {", ".join(outputs).replace("RAGGED", "")} ]
instance_group [ {{ kind: KIND_CPU count: 1 }} ]
dynamic_batching {{ }}
{settings}
"""


def _ensemble() -> str:
    steps = []
    for step, tensors in STEPS.items():
        maps = [
            f'{side}_map {{ key: "{name}" value: "{name}" }}'
            for side, each in zip(("input", "output"), tensors, strict=True)
            for name in (tensor.split('"')[1] for tensor in each)
        ]
        steps.append(f'{{ model_name: "{step}" model_version: -1 {" ".join(maps)} }}')
    return f"""platform: "ensemble"
max_batch_size: {ROWS}
input [ {_TEXT} ]
output [ {_EMBEDDING} ]
ensemble_scheduling {{ step [ {", ".join(steps)} ] }}
"""
