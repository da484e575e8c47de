"""Models that need the group `code` to be registered: they may run code, or reach files and other addresses.

A model is harmless when its backend and its files are known to be, and when no setting of it names a path, a variable
or a library. What cannot be read counts as code.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

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


def config_of(files: Sequence[File]) -> File | None:
    """Return the configuration among the files of a version."""
    return next((file for file in files if file.path == CONFIG_PATH), None)


def has_code(files: Sequence[File], config: bytes | None) -> bool:
    """Return True when a version with these files and this configuration needs the group `code`."""
    if any(file.path.lower().endswith(_CODE_SUFFIXES) for file in files):
        return True
    if config is None:
        return False
    if (parsed := _parsed(config)) is None:
        return True
    named = {name for name in (parsed.backend, parsed.platform, parsed.runtime) if name}
    return not named <= _HARMLESS or any(_reaches(key, value) for key, value in _settings(parsed))


def called(config: bytes) -> list[str]:
    """Return the names of the models that an ensemble with this configuration calls."""
    parsed = _parsed(config)
    steps = () if parsed is None else parsed.ensemble_scheduling.step
    return list(dict.fromkeys(step.model_name for step in steps))


def _parsed(config: bytes) -> ModelConfig | None:
    try:
        return text_format.Parse(config.decode(), ModelConfig(), allow_unknown_field=True)
    except (ValueError, text_format.ParseError):
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
