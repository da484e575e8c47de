"""Readers of the `parameters` of a model's configuration, as texts and as numbers."""

from __future__ import annotations

from collections.abc import Mapping

from services.infer.error_text import quoted
from shoal.errors import FailedPrecondition
from shoal.inference.v2 import model_config_pb2 as pb


def texts(config: pb.ModelConfig) -> dict[str, str]:
    """Return the text of each parameter by key."""
    return {key: parameter.string_value for key, parameter in config.parameters.items()}


def number(values: Mapping[str, str], key: str, default: int, least: int, most: int) -> int:
    """Return the parameter `key` as a number, or `default` when it is absent or empty.

    Raises:
        FailedPrecondition: the text is not a number from `least` to `most`; the message names the parameter.
    """
    text = values.get(key, "").strip()
    if not text:
        return default
    if not text.isascii() or not text.isdecimal() or len(text) > 9 or not least <= int(text) <= most:
        raise FailedPrecondition(f"parameter {key} {quoted(text)}: expected a number from {least} to {most}")
    return int(text)
