"""The other models of the server, as an ensemble needs them."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Protocol

from services.infer.ensembles.graph import Graph
from services.infer.loading.loading import Loaded
from services.infer.response_cache.cache import ResponseCache
from services.infer.scheduling.decoupled import DecoupledScheduler
from services.infer.scheduling.request_scheduler import RequestScheduler
from services.infer.scheduling.statistics import Statistics
from services.infer.sequences.arrival_order import ArrivalOrder


class StepVersion(Protocol):
    """One version of one model: a models.version.Version. While it is entered, it is not unloaded."""

    name: str
    statistics: Statistics
    response_cache: ResponseCache | None
    decoupled: DecoupledScheduler | None
    line: ArrivalOrder | None
    graph: Graph | None

    @property
    def number(self) -> int: ...

    @property
    def sees_numbers_only(self) -> bool: ...

    @property
    def loaded(self) -> Loaded: ...

    @property
    def scheduler(self) -> RequestScheduler: ...

    def __enter__(self) -> StepVersion: ...

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None: ...


class OtherModels(Protocol):
    """A models.models.Models."""

    def find(self, name: str, version: str) -> StepVersion:
        """The version that a call means. Raises NotFound or Unavailable."""

    async def need(self, name: str, by: str) -> None:
        """The model `name` should be served because the ensemble `by` is made of it, unless somebody said it should
        not."""

    def needs(self, name: str) -> Iterable[str]:
        """The models that `name` is made of, as far as is known."""

    async def tried(self, name: str) -> None:
        """Waits until all that is wanted of the model `name` has had its first attempt."""
