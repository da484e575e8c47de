"""Repositories with ensembles."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.infer import onnx_files
from tests.infer.conftest import Repository


class EnsembleRepository(Repository):
    """A folder of models, some of which are made of others."""

    def ensemble(self, name: str, *steps: str, more: str = "", version: int = 1) -> Path:
        """`steps` as `step` writes them; `more`: the rest of the configuration."""
        folder = self.root / name
        (folder / str(version)).mkdir(parents=True, exist_ok=True)
        (folder / "config.pbtxt").write_text(written(*steps, more=more))
        return folder


def written(*steps: str, more: str = "") -> str:
    return f'platform: "ensemble" ensemble_scheduling {{ {" ".join(steps)} }}\n{more}'


def step(model: str, given: dict[str, str], gives: dict[str, str], version: int = -1) -> str:
    """One step: the ensemble's tensors by the model's inputs, and by its outputs."""
    maps = [
        f'{field} {{ key: "{key}" value: "{tensor}" }}'
        for field, pairs in (("input_map", given), ("output_map", gives))
        for key, tensor in pairs.items()
    ]
    return f'step {{ model_name: "{model}" model_version: {version} {" ".join(maps)} }}'


def parameter(key: str, value: str) -> str:
    return f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}\n'


def tensor(kind: str, name: str, dims: str = "4", datatype: str = "FP32") -> str:
    return f'{kind} {{ name: "{name}" data_type: TYPE_{datatype} dims: [ {dims} ] }}\n'


@pytest.fixture
def models_folder(tmp_path: Path) -> EnsembleRepository:
    """double y = 2x, triple y = 3x, both [n,4]; add sum = a + b, difference = a - b, [n,k]."""
    folder = EnsembleRepository(tmp_path / "models")
    folder.bare("double", onnx_files.scale(2.0))
    folder.bare("triple", onnx_files.scale(3.0))
    folder.bare("add", onnx_files.add())
    return folder


FAN = (
    step("double", {"x": "x"}, {"y": "d"}),
    step("triple", {"x": "x"}, {"y": "t"}),
    step("add", {"a": "d", "b": "t"}, {"sum": "s", "difference": "f"}),
)
"""s = 5x, f = -x."""
