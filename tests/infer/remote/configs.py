"""Configurations of remote models, as text."""

from __future__ import annotations

import shutil
from pathlib import Path

from services.infer.runtimes.runtime import About
from shoal.inference.v2 import model_config_pb2 as pb


def text(more: str = "", /, **parameters: str) -> str:
    """A config.pbtxt; `metadata_x` is the parameter `metadata.x`."""
    lines = ['backend: "remote"', more]
    for key, value in parameters.items():
        name = key.replace("metadata_", "metadata.")
        lines.append(f'parameters {{ key: "{name}" value {{ string_value: "{value}" }} }}')
    return "\n".join(lines) + "\n"


def put(root: Path, name: str, more: str = "", /, **parameters: str) -> Path:
    """Writes the model `name` into the repository `root`: a configuration is all there is of it."""
    folder = root / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "config.pbtxt").write_text(text(more, **parameters))
    return folder


def about(name: str = "m", folder: Path | None = None, /, **parameters: str) -> About:
    """What a runtime is told of a model."""
    config = pb.ModelConfig(backend="remote")
    for key, value in parameters.items():
        config.parameters[key.replace("metadata_", "metadata.")].string_value = value
    return About(name, folder=folder, config=config)
