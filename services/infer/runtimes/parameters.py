"""The `parameters` of a model's configuration, as texts and as numbers."""

from __future__ import annotations

from collections.abc import Mapping

from services.infer.error_text import quoted
from shoal.errors import FailedPrecondition
from shoal.inference.v2 import model_config_pb2 as pb


def texts(config: pb.ModelConfig) -> dict[str, str]:
    """All of them, by key."""
    return {key: parameter.string_value for key, parameter in config.parameters.items()}


def number(values: Mapping[str, str], key: str, default: int, least: int, most: int) -> int:
    """The number that `key` says; `default` where it says nothing. Raises FailedPrecondition that names it."""
    said = values.get(key, "").strip()
    if not said:
        return default
    if not said.isascii() or not said.isdecimal() or len(said) > 9 or not least <= int(said) <= most:
        raise FailedPrecondition(f"parameter {key} {quoted(said)}: expected a number from {least} to {most}")
    return int(said)
