"""The steps of examples/embeddings and examples/ocr as ensembles of a real Triton, from the wheel `nvidia-pytriton`.

The wheel has no ONNX Runtime backend, so every step is a model of Triton's python backend (triton_embeddings/,
triton_ocr/). A step calls tokenizers, ONNX Runtime and NumPy, or for OCR the components of rapidocr-onnxruntime. Each
step has one instance in one process, and gets all waiting requests together. An ensemble of Triton cannot call a model
per line of a page. So lines are packed into tensors; a step unpacks them and runs lines of several requests together.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.infer.triton import triton_process

NEEDED = ("pytriton", "onnxruntime", "tokenizers", "rapidocr_onnxruntime")
ROWS = 64


@dataclass(frozen=True)
class Ensemble:
    """Definition of an ensemble in Triton's model repository."""

    name: str
    folder: Path
    """Folder with the Python file of each step: <step>.py."""
    steps: Mapping[str, tuple[Sequence[str], Sequence[str]]]
    """Inputs and outputs by step. Between the steps, a tensor has the same name on both sides."""
    inputs: Sequence[str]
    outputs: Sequence[str]
    parameters: Mapping[str, str]
    files: Mapping[str, Sequence[Path]] = field(default_factory=dict)
    """Further files by step."""


_TEXT = '{ name: "text" data_type: TYPE_STRING dims: 1 }'
_EMBEDDING = '{ name: "embedding" data_type: TYPE_FP32 dims: 384 }'
# Without `allow_ragged_batch`, Triton would batch only requests of one length.
_IDS = '{ name: "input_ids" data_type: TYPE_INT64 dims: -1 RAGGED }'
_MASK = '{ name: "attention_mask" data_type: TYPE_INT64 dims: -1 RAGGED }'
_TOKENS = '{ name: "token_embeddings" data_type: TYPE_FP32 dims: [ -1, 384 ] RAGGED }'


def embeddings(shoals: Path, padded: str, threads: int) -> Ensemble:
    """Return the ensemble that corresponds to examples/embeddings.

    Args:
        shoals: the repository that examples/embeddings/build.py wrote, for the ONNX file and the tokenizer.
        padded: `batch` or `own`, see triton_embeddings/minilm.py.
    """
    return Ensemble(
        "embed",
        Path(__file__).with_name("triton_embeddings"),
        {
            "tokenize": ([_TEXT], [_IDS, _MASK]),
            "minilm": ([_IDS, _MASK], [_TOKENS]),
            "pool": ([_TOKENS, _MASK], [_EMBEDDING]),
        },
        [_TEXT],
        [_EMBEDDING],
        {"padded": padded, "threads": str(threads)},
        {
            "tokenize": [shoals / "embed_tokenize/1/tokenizer.json"],
            "minilm": [shoals / "embed_minilm/1/model.onnx"],
        },
    )


_IMAGE = '{ name: "image" data_type: TYPE_STRING dims: 1 }'
_PAGE = '{ name: "page" data_type: TYPE_UINT8 dims: [ -1, -1, 3 ] RAGGED }'
_FRAME = '{ name: "frame" data_type: TYPE_FP32 dims: 5 }'
_CORNERS = '{ name: "corners" data_type: TYPE_FP32 dims: [ -1, 4, 2 ] RAGGED }'
_PIXELS = '{ name: "pixels" data_type: TYPE_UINT8 dims: -1 RAGGED }'
_UPRIGHT = '{ name: "upright" data_type: TYPE_UINT8 dims: -1 RAGGED }'
_SIZES = '{ name: "sizes" data_type: TYPE_INT32 dims: [ -1, 2 ] RAGGED }'
_TEXTS = '{ name: "texts" data_type: TYPE_STRING dims: -1 }'
_SCORES = '{ name: "scores" data_type: TYPE_FP32 dims: -1 }'
_BOXES = '{ name: "boxes" data_type: TYPE_FP32 dims: [ -1, 4, 2 ] }'


def ocr(together: int, threads: int) -> Ensemble:
    """Return the ensemble that corresponds to examples/ocr, made of the package's components with default settings.

    Args:
        together: number of lines that are recognised together, padded to the longest; the package's default is 6.
        threads: threads of each model.
    """
    folder = Path(__file__).with_name("triton_ocr")
    return Ensemble(
        "ocr",
        folder,
        {
            "decode": ([_IMAGE], [_PAGE, _FRAME]),
            "detect": ([_PAGE], [_CORNERS]),
            "crop": ([_PAGE, _FRAME, _CORNERS], [_PIXELS, _SIZES, _BOXES]),
            "angle": ([_PIXELS, _SIZES], [_UPRIGHT]),
            "recognise": ([_UPRIGHT, _SIZES], [_TEXTS, _SCORES]),
        },
        [_IMAGE],
        [_TEXTS, _SCORES, _BOXES],
        {"threads": str(threads), "together": str(together)},
        {step: [folder / "lines.py"] for step in ("crop", "angle", "recognise")},
    )


def check(environment: Path) -> None:
    """Exit with instructions when a package is missing in `environment`."""
    missing = [name for name in NEEDED if not list(environment.glob(f"lib/python3*/site-packages/{name}"))]
    if missing:
        sys.exit(
            f"--triton-venv {environment} lacks {', '.join(missing)}: create an environment with tools/venv.sh FOLDER "
            "locks/triton.txt; with its pip, install onnxruntime tokenizers rapidocr-onnxruntime 'numpy<2', then with "
            "--no-deps the opencv-python of locks/originals.txt, which resizes as Shoal's does; and name that folder"
        )


@contextmanager
def serving(environment: Path, ensemble: Ensemble, work: Path) -> Iterator[tuple[str, int]]:
    """Serve the ensemble during the block, and yield its address and pid.

    Args:
        environment: the virtual environment with the wheel and the imports of the steps.
        work: an empty folder.
    """
    before = _children()
    root = _write(work / "repository", ensemble)
    (work / "server").mkdir()
    with triton_process.running(environment, root, work / "server") as address:
        [pid] = _children() - before
        yield address, pid


def _children() -> set[int]:
    return {int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}


def _write(root: Path, ensemble: Ensemble) -> Path:
    for step, (inputs, outputs) in ensemble.steps.items():
        (root / step / "1").mkdir(parents=True)
        shutil.copy(ensemble.folder / f"{step}.py", root / step / "1/model.py")
        for file in ensemble.files.get(step, ()):
            shutil.copy(file, root / step / "1")
        (root / step / "config.pbtxt").write_text(_step(inputs, outputs, ensemble.parameters))
    (root / ensemble.name / "1").mkdir(parents=True)
    (root / ensemble.name / "config.pbtxt").write_text(_ensemble(ensemble))
    return root


def _step(inputs: Sequence[str], outputs: Sequence[str], parameters: Mapping[str, str]) -> str:
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


def _ensemble(ensemble: Ensemble) -> str:
    steps = []
    for step, tensors in ensemble.steps.items():
        maps = [
            f'{side}_map {{ key: "{name}" value: "{name}" }}'
            for side, each in zip(("input", "output"), tensors, strict=True)
            for name in (tensor.split('"')[1] for tensor in each)
        ]
        steps.append(f'{{ model_name: "{step}" model_version: -1 {" ".join(maps)} }}')
    return f"""platform: "ensemble"
max_batch_size: {ROWS}
input [ {", ".join(ensemble.inputs)} ]
output [ {", ".join(ensemble.outputs)} ]
ensemble_scheduling {{ step [ {", ".join(steps)} ] }}
"""
