"""What the contract of connectors needs of a broker: real ones, each behind the same few methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from shoal.inference.v2 import inference_pb2

MODEL = "echo"


@dataclass(frozen=True)
class Received:
    """A message that came out of a connector."""

    value: bytes
    headers: dict[str, str]


class Broker(Protocol):
    """A stream in, one out, and one for dead letters: new for each test."""

    table: dict[str, dict[str, Any]]
    """`source`, `sink` and `dead_letters` of a connector of these. Empty: a client's own stream."""
    keeps_order: bool
    """Whether what comes after a message that is under way stays unsettled."""

    async def publish(self, values: Sequence[bytes]) -> None:
        """Puts messages into the stream in."""

    async def answers(self) -> list[Received]:
        """All that came out so far."""

    async def dead(self) -> list[Received]:
        """All dead letters so far."""

    async def settled(self) -> int:
        """How many of the published messages would not be delivered again."""


def message(n: int, data: bytes = b"") -> bytes:
    """The n-th message: a request whose id is its number."""
    return inference_pb2.ModelInferRequest(
        model_name="not the connector's", id=str(n), raw_input_contents=[data or f"{n}".encode()]
    ).SerializeToString()


def number(received: Received) -> int:
    """Which message an answer belongs to."""
    return int(inference_pb2.ModelInferResponse.FromString(received.value).id)


def toml(name: str, table: dict[str, dict[str, Any]], **settings: Any) -> str:
    """The file of one connector."""
    top = {"model": MODEL, "format": "protobuf", "writes": "protobuf", **settings, **table}
    return f"[connectors.{name}]\n" + "".join(f"{key} = {_said(value)}\n" for key, value in top.items())


def _said(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f'"{key}" = {_said(each)}' for key, each in value.items()) + " }"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int | float) else f'"{value}"'
