"""A model's configuration in Triton's JSON form, read where protobuf is not at hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def datatype_name(data_type: str) -> str:
    """`TYPE_FP32` as the protocol calls it: `FP32`."""
    name = data_type.removeprefix("TYPE_")
    return "BYTES" if name == "STRING" else name


def specs(config: Mapping[str, Any], role: str) -> list[tuple[str, str, Sequence[int]]]:
    """Name, datatype and whole shape of each `input` or `output` (the role) of the configuration."""
    batch = [-1] if config.get("max_batch_size") else []
    return [
        (given["name"], datatype_name(given["data_type"]), [*batch, *(int(dim) for dim in given.get("dims", ()))])
        for given in config.get(role, ())
    ]
