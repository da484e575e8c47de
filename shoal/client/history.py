"""History of a cluster: figures of the last hour by model, tenant or instance, from the memory of its leading coord."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from shoal.client.models.registry import of_time
from shoal.client.transport import methods
from shoal.client.transport.calls import Caller
from shoal.client.transport.deadline import Timeout
from shoal.coord.v1 import coord_pb2 as coord

By = Literal["model", "tenant", "instance"]


@dataclass(frozen=True)
class HistoryNode:
    """A node whose metrics are read."""

    name: str
    address: str
    answered_at: datetime | None
    """The last answer; None: none yet."""
    missing: bool
    """True when it did not answer the last time: its figures are missing."""


@dataclass(frozen=True)
class History:
    """Figures of the past, in points of equal time."""

    coord: str
    """The leading coord, which keeps the history: `<node>/coord-<n>`."""
    since: datetime | None
    """The beginning of the history: the first time that this coord led since its start."""
    until: datetime | None
    """The end of the last point."""
    step_seconds: float
    """Time of one point; the first one may cover less."""
    rows: Mapping[str, Mapping[str, tuple[float, ...]]]
    """Points by name and field, oldest first; NaN: no figure. The fields are those of `GetHistory`."""
    nodes: tuple[HistoryNode, ...]
    left_out: int
    """Names that the memory of the history had no place for."""


async def fetch_history(caller: Caller, by: By, seconds: float, points: int, timeout_s: Timeout) -> History:
    """Return the history by model, tenant or instance."""
    request = coord.GetHistoryRequest(by=by, seconds=seconds, points=points)
    found = await caller.call(methods.GET_HISTORY, request, timeout_s=timeout_s)
    return History(
        coord=found.coord,
        since=of_time(found, "since"),
        until=of_time(found, "until"),
        step_seconds=found.step_seconds,
        rows={
            row.name: {field.name: tuple(values) for field, values in row.ListFields() if field.name != "name"}
            for row in found.rows
        },
        nodes=tuple(
            HistoryNode(node.name, node.address, of_time(node, "answered_at"), node.missing) for node in found.nodes
        ),
        left_out=found.left_out,
    )
