"""Reader of a model's configuration in Triton's JSON form, for model processes, which do not import protobuf."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def datatype_name(data_type: str) -> str:
    """Return the protocol's name of a configuration's data type: `FP32` for `TYPE_FP32`."""
    name = data_type.removeprefix("TYPE_")
    return "BYTES" if name == "STRING" else name


def specs(config: Mapping[str, Any], role: str) -> list[tuple[str, str, Sequence[int]]]:
    """Return name, datatype and whole shape of each tensor of the configuration; `role` is `input` or `output`."""
    batch = [-1] if config.get("max_batch_size") else []
    return [
        (tensor["name"], datatype_name(tensor["data_type"]), [*batch, *(int(dim) for dim in tensor.get("dims", ()))])
        for tensor in config.get(role, ())
    ]
