"""Foreign clients, unmodified, each a process of its own, against an instance started as a user starts it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.infer import onnx_files
from tests.infer.conformance import served_models
from tests.infer.conformance.instance import EXPLICIT, Instance

CONFIGS = {
    "double": "max_batch_size: 64",
    "patient": "max_batch_size: 4 dynamic_batching { max_queue_delay_microseconds: 60000000 }",
    "wide": "max_batch_size: 0",
    "classes": """
        max_batch_size: 8
        output [ { name: "y" data_type: TYPE_FP32 dims: [ 4 ] label_filename: "labels.txt" } ]
    """,
}


def write(root: Path) -> Path:
    """The models of the clients: double and patient (y = 2x, [N,4]), wide (the same, of any size), classes, repeat,
    decode, chain (an ensemble, y = 4x)."""
    for name, config in CONFIGS.items():
        model = onnx_files.identity() if name == "classes" else onnx_files.scale(2)
        (root / name / "1").mkdir(parents=True)
        (root / name / "1/model.onnx").write_bytes(model.SerializeToString())
        (root / name / "config.pbtxt").write_text(config)
    (root / "classes/labels.txt").write_text("ant\nbee\n")
    served_models.put_repeat(root)
    served_models.put_decode(root)
    served_models.put_chain(root)
    return root


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Instance]:
    """A running instance."""
    folder = tmp_path_factory.mktemp("clients")
    with Instance.serving(write(folder / "models"), folder / "serve.log", EXPLICIT) as running:
        yield running


Run = Callable[[Sequence[object]], str]


@pytest.fixture(scope="session")
def run() -> Run:
    """Runs a client to its end, which must be a good one; returns what it printed."""

    def call(command: Sequence[object]) -> str:
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=110, check=False)
        assert done.returncode == 0, f"{command[0]}: {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    return call
