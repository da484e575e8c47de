"""Protocols for the server's other models and their versions, as an ensemble uses them."""

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
    """One version of one model: a models.version.Version. An entered version is not unloaded."""

    name: str
    statistics: Statistics
    response_cache: ResponseCache | None
    decoupled: DecoupledScheduler | None
    arrival_order: ArrivalOrder | None
    graph: Graph | None

    @property
    def number(self) -> int: ...

    @property
    def sees_tensors_only(self) -> bool: ...

    @property
    def loaded(self) -> Loaded: ...

    @property
    def scheduler(self) -> RequestScheduler: ...

    def __enter__(self) -> StepVersion: ...

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None: ...


class OtherModels(Protocol):
    """The server's models: a models.models.Models."""

    def find(self, name: str, version: str) -> StepVersion:
        """Return the version that a request to `name` and `version` reaches. Raises NotFound or Unavailable."""

    async def need(self, name: str, by: str) -> None:
        """Request that the model `name` is served for the ensemble `by`. An explicit unload takes precedence."""

    def needs(self, name: str) -> Iterable[str]:
        """Return the models that `name` is known to call."""

    async def tried(self, name: str) -> None:
        """Wait until all desired versions of the model `name` had their first load attempt."""
