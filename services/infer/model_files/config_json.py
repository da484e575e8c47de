"""Conversion of a model's configuration to and from the JSON form that Triton gives to its Python models.

Unlike in protobuf's own JSON, 64-bit numbers are numbers, and plain fields without a value are present.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from google.protobuf import json_format

from shoal.errors import FailedPrecondition
from shoal.inference.v2 import model_config_pb2 as pb


def from_json(said: Mapping[str, Any]) -> pb.ModelConfig:
    """Parse a configuration. Raises FailedPrecondition for an invalid one; the message names the field."""
    try:
        return json_format.ParseDict(dict(said), pb.ModelConfig())
    except (json_format.ParseError, TypeError, ValueError) as err:
        raise FailedPrecondition(f"the configuration that the model completed: {err}") from err
