"""Models that need the group `code` to be registered: they may run code, or reach files and other addresses.

A model is harmless when its backend and its files are known to be, and when no setting of it names a path, a variable
or a library. What cannot be read counts as code.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from google.protobuf import text_format

from services.store.registry.model_rules import File
from shoal.inference.v2.model_config_pb2 import ModelConfig

CONFIG_PATH = "../config.pbtxt"
CONFIG_BYTES = 1 << 20
"""Largest configuration that is read for the decision: those of real models have some kilobytes."""
_HARMLESS = frozenset({"onnxruntime", "onnxruntime_onnx", "kernels", "ensemble"})
_CODE_SUFFIXES = (".py", ".pyc", ".so")
# Settings of paths, of variables and files of the server, and of addresses in its memory.
_REACHING = ("/", "${")
_ADDRESSES = ("gpu_external_", "user_compute_stream")


@dataclass(frozen=True)
class Content:
    """Content of a version that decides who may register it."""

    has_code: bool
    """True: its registration needs the group `code`."""
    called: tuple[str, ...] = ()
    """Names of the models that it calls, as an ensemble."""


def config_of(files: Sequence[File]) -> File | None:
    """Return the configuration among the files of a version."""
    return next((file for file in files if file.path == CONFIG_PATH), None)


def content_of(files: Sequence[File], config: bytes | None) -> Content:
    """Return the content of a version with these files and this configuration. A long one takes two seconds."""
    has_code = any(file.path.lower().endswith(_CODE_SUFFIXES) for file in files)
    if config is None:
        return Content(has_code)
    if (parsed := _parsed(config)) is None:
        return Content(has_code=True)
    called = dict.fromkeys(step.model_name for step in parsed.ensemble_scheduling.step)
    return Content(has_code or _runs_code(parsed), tuple(called))


def _runs_code(config: ModelConfig) -> bool:
    named = {name for name in (config.backend, config.platform, config.runtime) if name}
    return not named <= _HARMLESS or any(_reaches(key, value) for key, value in _settings(config))


def _parsed(config: bytes) -> ModelConfig | None:
    """Return the configuration; None when it cannot be read, as by infer, which refuses unknown fields, too."""
    # protobuf skips unknown fields in a time that is quadratic in the length of a line: minutes for 1 MiB.
    try:
        return text_format.Parse(config.decode(), ModelConfig())
    except (ValueError, text_format.ParseError, RecursionError):
        return None


def _settings(config: ModelConfig) -> Iterator[tuple[str, str]]:
    yield from ((key, value.string_value) for key, value in config.parameters.items())
    accelerators = config.optimization.execution_accelerators
    groups: Sequence[Mapping[str, str]] = [
        each.parameters for each in (*accelerators.gpu_execution_accelerator, *accelerators.cpu_execution_accelerator)
    ]
    for parameters in groups:
        yield from parameters.items()


def _reaches(key: str, value: str) -> bool:
    return key.startswith(_ADDRESSES) or any(part in value for part in _REACHING)
