"""Figures of `shoal top`: of one node, from its own page of metrics, or of all nodes, from the history of coord."""

from __future__ import annotations

import contextlib
import math
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, Any, cast

from shoal.cli import admin_page, endpoints
from shoal.cli.here import SERVE
from shoal.errors import InvalidArgument, ShoalError, Unavailable, Unimplemented

if TYPE_CHECKING:
    from shoal.client import Client, History
    from shoal.client.history import By
    from shoal.rates import Change, Row

SPARK_WIDTH = 10
"""Earlier rates of a row, for its bars."""
EVERY_S = 5.0
"""Interval of the history."""
_READ_S = 10.0
# Longest wait for a process that stands still, which would hold up the figures of the others.
_PROCESS_S = 2.0
# Longest wait for the history of a node, whose figures of now do not need it.
_PAST_S = 2.0


class Figures(ABC):
    """Rows of a view, as they were read last."""

    views: tuple[str, ...]
    where: str
    """The source, for the head of the screen."""
    seconds = 0.0
    """Time that the figures are about; 0: there are none yet."""
    shortest_s = 0.0
    """Shortest time between two readings with other figures."""

    @abstractmethod
    def read(self, view: str) -> None:
        """Read anew. Raises ShoalError when nothing answers."""

    @abstractmethod
    def rows(self, view: str) -> list[Row]:
        """Return the rows of the view, in no order."""

    @abstractmethod
    def past(self, view: str) -> dict[str, Any] | None:
        """Return the history of the view in 60 points, as JSON data with null where there is no figure; None: none."""

    def notes(self) -> list[str]:
        """Return remarks on what was read: when it begins, and what is missing."""
        return []


class NodeFigures(Figures):
    """Figures between the last two pages of one node; the rates before the first page are those of the history.

    Args:
        admin: admin address of the node.
        client: client of the node's gateway; None: there is no history.
    """

    views = ("model", "execution", "tenant", "instance")

    def __init__(self, admin: str, client: Client | None = None) -> None:
        from shoal.rates import Counters

        self.where = admin
        self._client = client
        self._counters = Counters()
        self._change: Change | None = None
        self._calls: Mapping[str, tuple[int, int]] = {}
        # By view and name.
        self._rates: dict[tuple[str, str], deque[float]] = {}

    def read(self, view: str) -> None:
        """Read a page.

        Raises:
            Unavailable: the node does not answer, or not with metrics.
        """
        text, at, calls = self._fetch()
        try:
            change = self._counters.take(text, at)
        except ValueError as err:
            raise Unavailable(f"the admin address {self.where} has no metrics: {err}") from err
        before, self._calls = self._calls, calls
        if change is None:
            self._rates = self._of_history()
            return
        grown = {
            name: (max(0, sent - before[name][0]), max(0, failed - before[name][1]))
            for name, (sent, failed) in calls.items()
            if name in before
        }
        self._change = replace(change, calls=grown)
        self.seconds = change.seconds
        known, self._rates = self._rates, {}
        for each in self.views:
            for row in self._now(each):
                self._rates[each, row.name] = known.get((each, row.name)) or deque(maxlen=SPARK_WIDTH)
                self._rates[each, row.name].append(row.rate)

    def _fetch(self) -> tuple[str, float, Mapping[str, tuple[int, int]]]:
        from shoal.rates import EXECUTIONS, PAGE

        names = "&".join(f"name[]={name}" for name in (*PAGE, *EXECUTIONS))
        # The processes are read at once; the page may then wait for one that stands still.
        at = time.monotonic()
        text = admin_page.read(self.where, f"/metrics?within={_PROCESS_S:g}&{names}", timeout_s=_READ_S)
        # `shoal serve` has no page of its Envoy.
        with contextlib.suppress(Unavailable):
            return text, at, endpoints.by_instance(endpoints.fetch(self.where))
        return text, at, {}

    def _of_history(self) -> dict[tuple[str, str], deque[float]]:
        """Return the rates of the last readings of coord; none where it reads several nodes, whose sum they are."""
        found: dict[tuple[str, str], deque[float]] = {}
        if self._client is None:
            return found
        # A node without coord, or a caller who may not: the rates begin now.
        with contextlib.suppress(ShoalError):
            for view in ClusterFigures.views:
                history = self._client.history(
                    cast("By", view), seconds=SPARK_WIDTH * EVERY_S, points=SPARK_WIDTH, timeout=_PAST_S
                )
                if len(history.nodes) != 1:
                    return {}
                for name, fields in history.rows.items():
                    own = name.removeprefix(f"{history.nodes[0].name}/") if view == "instance" else name
                    found[view, own] = deque(_known(fields["rate"]), maxlen=SPARK_WIDTH)
        return found

    def _now(self, view: str) -> list[Row]:
        from shoal import rates

        of: dict[str, Callable[[Change], list[Row]]] = {
            "model": rates.models,
            "execution": rates.executions,
            "tenant": rates.tenants,
            "instance": rates.instances,
        }
        return [] if self._change is None else of[view](self._change)

    def rows(self, view: str) -> list[Row]:
        """Return the rows of the view."""
        rows = self._now(view)
        for row in rows:
            row.rates = list(self._rates.get((view, row.name), ()))
        return rows

    def past(self, view: str) -> dict[str, Any] | None:
        """Return the history of the view; None when nobody keeps one, or it does not answer in time."""
        if self._client is not None and view in ClusterFigures.views:
            with contextlib.suppress(ShoalError):
                return document_of(self._client.history(cast("By", view), timeout=_PAST_S))
        return None


class ClusterFigures(Figures):
    """Figures of all nodes of a cluster, from the history of its leading coord.

    Args:
        since_s: the figures are those of this time before now; 0: those of the last reading.
    """

    views = ("model", "tenant", "instance")
    shortest_s = EVERY_S

    def __init__(self, client: Client, since_s: float = 0.0) -> None:
        self._client = client
        self._since_s = since_s
        self._history: History | None = None
        self._whole: History | None = None
        self.where = f"{client.address}, all nodes"

    def read(self, view: str) -> None:
        """Read the history.

        Raises:
            Unavailable: no coord leads at present. PermissionDenied: the caller may not operate the cluster.
            InvalidArgument: it is no node, but a `shoal serve`.
        """
        seconds = self._since_s or SPARK_WIDTH * EVERY_S
        try:
            self._history = self._client.history(cast("By", view), seconds=seconds, points=SPARK_WIDTH)
        except Unimplemented as err:
            remedy = "A `shoal serve` has none: leave --since out." if self._since_s else SERVE
            raise InvalidArgument(f"{self._client.address} keeps no history. {remedy}") from err
        self._whole = self._history
        if self._since_s:
            self._whole = self._client.history(cast("By", view), seconds=seconds, points=1)
        self.seconds = self._whole.step_seconds

    def rows(self, view: str) -> list[Row]:
        """Return the rows of the view that was read."""
        if self._whole is None or self._history is None:
            return []
        found = []
        for name, fields in self._whole.rows.items():
            row = _row(name, fields)
            if row is not None:
                row.rates = _known(self._history.rows.get(name, {}).get("rate", ()))
                found.append(row)
        return found

    def past(self, view: str) -> dict[str, Any]:
        """Return the history of the view. Raises as `read`."""
        return document_of(self._client.history(cast("By", view), seconds=self._since_s))

    def notes(self) -> list[str]:
        """Return when the history began, and which nodes and names are missing."""
        if (read := self._history) is None:
            return []
        found = [f"since {_clock(read.since)}, when the history of {read.coord} began; until {_clock(read.until)}"]
        for node in read.nodes:
            if node.missing:
                last = f"last answer {_clock(node.answered_at)}" if node.answered_at else "it has not answered yet"
                found.append(f"node {node.name} is missing: {node.address} does not answer ({last})")
        if read.left_out:
            found.append(f"{read.left_out} names are left out: the memory of the history is full")
        return found


def document_of(history: History) -> dict[str, Any]:
    """Return a history as JSON data, with null where there is no figure."""
    from shoal.cli.output import plain

    document = cast("dict[str, Any]", plain(history))
    for fields in document["rows"].values():
        for name, values in fields.items():
            fields[name] = [None if math.isnan(value) else value for value in values]
    return document


def parse_since(written: str) -> float:
    """Return the seconds of `--since`: an age of at most an hour.

    Raises:
        InvalidArgument: it is none, or a longer one.
    """
    from shoal.cli import amounts

    seconds = amounts.age(written, "--since").total_seconds()
    if not 0 < seconds <= 3_600:
        raise InvalidArgument(f"--since {written!r}: the history has an hour: expected 1m to 60m")
    return seconds


def _clock(at: datetime | None) -> str:
    return "-" if at is None else at.astimezone().strftime("%H:%M:%S")


def _known(values: Sequence[float]) -> list[float]:
    """Return the values without those before the first figure, and 0 for the others that are missing."""
    found = list(values)
    while found and math.isnan(found[0]):
        del found[0]
    return [0.0 if math.isnan(value) else value for value in found]


def _row(name: str, fields: Mapping[str, Sequence[float]]) -> Row | None:
    """Return the last point as a row; None when it has no figures."""
    from shoal.rates import Row

    last = {field: values[-1] for field, values in fields.items() if values and not math.isnan(values[-1])}
    return Row(name, **cast("Any", last)) if "rate" in last else None
