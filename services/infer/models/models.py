"""All models of this instance: a task per model makes the served versions match the desired ones.

want(...) ──> a task for each model (`model`): load missing versions ──> unload versions that are not desired
                                          |
                    requests: use(name, version)   index, readiness
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from types import TracebackType

from mesh.process.tasks import all_to_the_end, end
from mesh.process.watched import Watched
from services.infer.error_text import quoted
from services.infer.model_files.wanted_models import WantedModel
from services.infer.models.load_context import LoadContext
from services.infer.models.model import IndexRow, Model
from services.infer.models.version import Version
from services.infer.scheduling.tenant_counts import TenantCounts
from shoal.access.policy import Objective
from shoal.errors import InvalidArgument, NotFound, Unavailable

log = logging.getLogger(__name__)

_NUMBER = re.compile(r"[0-9]{1,19}")

ReadySet = tuple[tuple[str, tuple[int, ...], bool, str], ...]
"""For each model: name, ready versions (both ascending), True for sequences, and the slow path's reason or ''."""


def version_number(text: str) -> int | None:
    """Return the version number that a request names; None for an empty text.

    Raises:
        InvalidArgument: it is not a number from 1 to 2**63 - 1.
    """
    if not text:
        return None
    if not _NUMBER.fullmatch(text) or not 0 < int(text) < 1 << 63:
        raise InvalidArgument(
            f"failed to get model version from specified version string {quoted(text)}: "
            "expected a whole number, 1 or more"
        )
    return int(text)


# Time for requests whose callers the server has just disconnected.
_MIN_DRAIN_S = 0.5

# Time for the clean-up code of models when the time of the stop is over.
_MIN_END_S = 0.5

# Pause after a publication, as a multiple of its time. Each publication walks all models here, in coord and in Envoy's
# configuration. With this pause, 500 models that are pushed at a time take a sixth less processor time.
_PAUSE_SHARE, _LONGEST_PAUSE_S = 30, 0.25


class Models:
    """The models of this instance. Use as `async with`: leaving unloads everything."""

    def __init__(self, context: LoadContext) -> None:
        self._context = replace(context, other_models=self)
        self.responses = context.responses
        """Results of all models with a response cache."""
        self.on_need: Callable[[str, str], Awaitable[None]] | None = None
        """Callback that has a model served because an ensemble needs it; takes the model's and the ensemble's name."""
        self._models: dict[str, Model] = {}
        self.tenants = TenantCounts()
        """Requests and rows by tenant, over all models."""
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()
        self._has_desired = asyncio.Event()
        self._stop_by = self._end_by = math.inf
        self.ready_set: Watched[ReadySet] = Watched(())
        """The models that were ready at the last publication, as a watched value."""
        self.awaited: Watched[tuple[str, ...] | None] = Watched(None)
        """The models that are desired, not ready, and not given up, sorted; None until the desired ones are known."""

    async def __aenter__(self) -> Models:
        self._publisher = asyncio.create_task(self._follow_changes(), name="ready-set")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        await end(*self._tasks.values(), self._publisher)
        drain_s = min(self._context.drain_s, max(self._stop_by - self._context.clock(), _MIN_DRAIN_S))
        closing = asyncio.ensure_future(all_to_the_end(model.close(drain_s) for model in self._models.values()))
        left_s = max(self._end_by - self._context.clock(), drain_s + _MIN_END_S)
        await asyncio.wait([closing], timeout=None if left_s == math.inf else left_s)
        if not closing.done():
            unended = sum(len(model.leaving) for model in self._models.values())
            log.warning(
                "%(versions)d model versions did not end in time: the process ends without waiting for them",
                {"event": "model.stop_does_not_wait", "versions": unended},
            )
            await end(closing)
        else:
            closing.result()

    def stop_by(self, requests_at: float, models_at: float) -> None:
        """Let the requests in progress end until `requests_at` when the block is left, and the models `models_at`.

        Both are times of the context's clock. Runs and clean-up code that take longer are not awaited.
        """
        self._stop_by, self._end_by = requests_at, models_at

    def shrink(self) -> None:
        """Free memory that the models keep for later runs. Called by any thread."""
        for model in list(self._models.values()):
            for version in list(model.versions.values()):
                version.shrink()

    def set_objectives(self, stated: tuple[Objective, ...]) -> None:
        """Count requests by the objectives of a policy, from now on. Most changes of a policy are changes of others."""
        if self._context.objectives.set(stated):
            for model in self._models.values():
                for version in (*model.leaving, *model.loading, *model.versions.values()):
                    version.set_objective(self._context.objectives)

    def want(self, wanted: Sequence[WantedModel]) -> None:
        """Serve exactly these models. Returns immediately; `settled` waits for the first attempts."""
        by_name = {model.name: model for model in wanted}
        for name in self._models.keys() - by_name.keys():
            by_name[name] = WantedModel(name, ())
        for name, model in by_name.items():
            known = self._models.get(name)
            if known is None or known.wanted != model or known.may_retry():
                self.want_one(model)
        self._has_desired.set()
        self._changed.set()

    def want_one(self, wanted: WantedModel, *, again: bool = False) -> Model:
        """Serve this model as described; the other models stay as they are.

        Args:
            again: retry everything that has failed.
        """
        model = self._models.get(wanted.name)
        if model is None:
            model = self._models[wanted.name] = Model(wanted, self._context, self._changed)
            self._tasks[wanted.name] = asyncio.create_task(model.converge(), name=f"model-{wanted.name}")
        else:
            model.want(wanted, again=again)
        self._changed.set()
        return model

    @property
    def has_desired(self) -> bool:
        """True once `want` has been called."""
        return self._has_desired.is_set()

    async def settled(self) -> None:
        """Wait until every desired version has had its first attempt, successful or not; publish what is ready."""
        await self._has_desired.wait()
        while waiting := [model for model in self._models.values() if not model.is_settled.is_set()]:
            await asyncio.gather(*(model.is_settled.wait() for model in waiting))
        self._publish()

    async def need(self, name: str, by: str) -> None:
        """Have the model `name` served for the ensemble `by`, unless an operator has unloaded it."""
        if self.on_need is not None:
            await self.on_need(name, by)

    def needs(self, name: str) -> set[str]:
        """Return the models that the ensemble `name` needs, as far as known; an empty set for any other model."""
        model = self._models.get(name)
        return model.needs() if model else set()

    async def tried(self, name: str) -> None:
        """Wait until every desired version of one model has had its first attempt. Returns for an unknown model."""
        model = self._models.get(name)
        if model is not None:
            await model.is_settled.wait()

    async def followed(self, name: str) -> None:
        """Wait until the ensembles that need the model `name` reflect its versions that are ready now."""
        self._update_ensembles()
        while waiting := [model for model in self._dependents(name) if not model.is_settled.is_set()]:
            await asyncio.gather(*(model.is_settled.wait() for model in waiting))
            self._update_ensembles()

    def _dependents(self, name: str) -> list[Model]:
        """Return the ensembles that need a model, directly or through other ensembles."""
        found: dict[str, Model] = {}
        new = {name}
        while new:
            nearest = {other: model for other, model in self._models.items() if not model.needs().isdisjoint(new)}
            new = nearest.keys() - found.keys()
            found |= nearest
        return list(found.values())

    def _update_ensembles(self) -> None:
        # Repeated, because an ensemble that changes may be a step of another one.
        while [model for model in list(self._models.values()) if model.recheck(self)]:
            pass

    def is_ready(self) -> bool:
        """True when the desired models are known, each of them serves, and none of their versions has failed."""
        return self.has_desired and all(
            model.is_as_wanted() for model in self._models.values() if model.wanted.is_served
        )

    def index(self) -> list[IndexRow]:
        """Return every version of every model, sorted by name and version."""
        return [row for rows in self.rows() for row in rows]

    def rows(self) -> Iterator[Iterator[IndexRow]]:
        """Yield the versions of each model, sorted by name. Models may come and go meanwhile."""
        for name in sorted(self._models):
            if (model := self._models.get(name)) is not None:
                yield model.rows()

    def knows(self, name: str) -> bool:
        """Return True when the model is desired, or something of it is still loaded."""
        return name in self._models

    def versions(self, name: str) -> list[Version]:
        """Return the ready versions of one model, ascending; an empty list for an unknown model."""
        model = self._models.get(name)
        return model.ready() if model else []

    def known(self) -> list[Version]:
        """Return every version in whatever state, one for each number: that of the requests, else the newest."""
        found: dict[tuple[str, int], Version] = {}
        for name in sorted(self._models):
            model = self._models[name]
            for version in (*model.leaving, *model.loading, *model.versions.values()):
                found[name, version.number] = version
        return list(found.values())

    def names(self) -> list[str]:
        """Return the names of the models with a ready version, sorted."""
        return [name for name in sorted(self._models) if self._models[name].ready()]

    def find(self, name: str, version: str) -> Version:
        """Return the version of a model that a request names; an empty `version` selects the default version.

        Raises:
            InvalidArgument: `version` is not a number.
            NotFound: no such model or version exists.
            Unavailable: the version exists and is not ready.
        """
        model = self._models.get(name)
        # Nearly every request: two look-ups.
        if not version and model is not None and (found := model.default) is not None:
            return found
        return _found(name, model, version_number(version))

    def use(self, name: str, version: str) -> Version:
        """Return the version of `find`, for a `with` block that keeps it loaded. Raises what `find` raises."""
        return self.find(name, version)

    async def _follow_changes(self) -> None:
        """Publish after each change. Changes during the pause after a publication are published together."""
        while True:
            await self._changed.wait()
            begun = self._context.clock()
            self._publish()
            await asyncio.sleep(min(_PAUSE_SHARE * (self._context.clock() - begun), _LONGEST_PAUSE_S))

    def _publish(self) -> None:
        """Publish the ready set, and drop models of which nothing is loaded or desired."""
        self._changed.clear()
        self._update_ensembles()
        for name, model in list(self._models.items()):
            if not model.wanted.is_served and not model.wanted.is_unloaded and model.is_gone():
                del self._models[name]
                self._tasks.pop(name).cancel()
        if self.has_desired:
            self.awaited.set(tuple(name for name in sorted(self._models) if self._models[name].is_awaited()))
        ready = ((name, self._models[name].ready()) for name in sorted(self._models))
        self.ready_set.set(tuple(_ready(name, versions) for name, versions in ready if versions))


def _ready(name: str, versions: Sequence[Version]) -> tuple[str, tuple[int, ...], bool, str]:
    numbers = tuple(version.number for version in versions)
    has_sequences = any(version.arrival_order is not None for version in versions)
    return name, numbers, has_sequences, next((reason for each in versions if (reason := each.slow_path_reason)), "")


def _found(name: str, model: Model | None, number: int | None) -> Version:
    unknown = f"Request for unknown model: {quoted(name)}"
    if model is None or not model.wanted.is_served:
        is_unloaded = model is not None and model.wanted.is_unloaded
        raise NotFound(f"{unknown} {'has no available versions: it is not loaded' if is_unloaded else 'is not found'}")
    if number is None:
        raise Unavailable(f"{unknown} has no version that is ready{_why(model)}")
    found = model.versions.get(number)
    if found is not None and found.is_ready:
        return found
    if found is None and number not in {loading.number for loading in model.loading}:
        raise NotFound(f"{unknown} version {number} is not found")
    raise Unavailable(f"{unknown} version {number} is not ready{_why(model, number)}")


def _why(model: Model, number: int | None = None) -> str:
    rows = [row for row in model.rows() if number in (None, row.version)]
    if not rows:
        return ""
    newest = rows[-1]
    return f" ({newest.state}{': ' if newest.reason else ''}{newest.reason})"
