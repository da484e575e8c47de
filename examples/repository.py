"""Model repositories of the examples: configurations that lie in the example, and files that lie elsewhere."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path


def build(models: Path, into: Path, files: Mapping[str, Path | bytes]) -> Path:
    """Copies the configurations of `models` to `into`, gives each model a version 1, and puts `files` in.

    `files` are by path in the repository (`minilm/1/model.onnx`): a file to copy, or content. Returns `into`.
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
