"""Model repositories of the examples: the example's configurations, with model files from other sources."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path


def build(models: Path, into: Path, files: Mapping[str, Path | bytes]) -> Path:
    """Copy the configurations of `models` to `into`, create version 1 of each model, add `files`, and return `into`.

    `files` maps a path in the repository (`minilm/1/model.onnx`) to a file to copy, or to content.
    """
    shutil.copytree(models, into, dirs_exist_ok=True)
    for model in models.iterdir():
        (into / model.name / "1").mkdir(exist_ok=True)
    for path, content in files.items():
        if isinstance(content, Path):
            shutil.copyfile(content, into / path)
        else:
            (into / path).write_bytes(content)
    return into
