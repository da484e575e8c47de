"""One model with its versions, and the task that makes them match the desired ones.

    want(...) ──> load missing versions ──> all replacements ready? ──> unload versions that are not desired
                                                  └── no: the old versions go on serving, and the index says why

A new version is loaded beside the old one. The old version is unloaded only when a desired one is ready in its place,
and after the requests that use the old one: clients notice nothing. New content under the number of a serving version
takes over only when everything that was loaded with it is ready, so a model never mixes old and new content.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from mesh.process.backoff import Backoff
from mesh.process.tasks import log_failure, together
from services.infer.ensembles.other_models import OtherModels
from services.infer.model_files.wanted_models import WantedModel, WantedVersion
from services.infer.models.load_context import LoadContext
from services.infer.models.version import State, Version

log = logging.getLogger(__name__)

# Delays between retries of a failed load: short at first, because the store or a remote server may be restarting.
_RETRY_FIRST_S, _RETRY_MAX_S = 0.2, 10.0


@dataclass(frozen=True)
class IndexRow:
    """One line of the repository index."""

    name: str
    version: int | None
    state: State
    reason: str


@dataclass(eq=False)
class Model:
    """One model. `versions`, `refused` and `default` are replaced, never mutated, so requests see them complete."""

    wanted: WantedModel
    context: LoadContext
    on_change: asyncio.Event
    """Set whenever a state changes."""
    versions: Mapping[int, Version] = field(default_factory=dict)
    refused: Mapping[int, Version] = field(default_factory=dict)
    """Versions that should have replaced a serving version, and failed."""
    default: Version | None = None
    """The version of requests that name none: that of the alias `stable` if it is ready, else the newest ready one."""
    loading: tuple[Version, ...] = ()
    leaving: set[Version] = field(default_factory=set)
    is_settled: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when every desired version has had its first attempt."""
    _unloaded: tuple[int, ...] = ()
    _is_again: bool = False
    _rewanted: asyncio.Event = field(default_factory=asyncio.Event)
    _unloads: set[asyncio.Task[None]] = field(default_factory=set)

    def want(self, wanted: WantedModel, *, again: bool = False) -> None:
        """Replace the desired state. An equal state changes nothing, but starts pending retries immediately.

        Args:
            again: retry everything that has failed.
        """
        self.is_settled.clear()
        self.wanted = wanted
        for version in self.loading:
            # A newer version does not end the load of the former one: after each of many pushes, one is served.
            if version.number not in wanted.available:
                version.given_up.set()
        self._is_again |= again
        self._choose_default()
        self._rewanted.set()

    def ready(self) -> list[Version]:
        """Return the ready versions, ascending."""
        return [version for _, version in sorted(self.versions.items()) if version.is_ready]

    def is_as_wanted(self) -> bool:
        """Return True when the model serves and no desired version has failed (refused new content does not count)."""
        failed = [version for version in self.versions.values() if version.state is State.UNAVAILABLE]
        return bool(self.ready()) and not failed

    def is_awaited(self) -> bool:
        """Return True when the model is desired, has no ready version, and may still get one."""
        return not self.ready() and any(self._is_pending(version) for version in self.wanted.versions)

    def _is_pending(self, wanted: WantedVersion) -> bool:
        tried = self.versions.get(wanted.version)
        return tried is None or tried.wanted.digest != wanted.digest or tried.may_retry

    def is_gone(self) -> bool:
        """Return True when no version is loaded, loading or unloading."""
        return not self.versions and not self.leaving and not self.loading

    def may_retry(self) -> bool:
        """Return True when a version has failed for a cause that may be temporary."""
        return any(version.may_retry for version in (*self.versions.values(), *self.refused.values()))

    def needs(self) -> set[str]:
        """Return the models that this ensemble's versions need."""
        return {name for version in (*self.versions.values(), *self.loading) for name in version.needs}

    def recheck(self, other_models: OtherModels) -> bool:
        """Check the versions of an ensemble after other models changed. Return True when one must be loaded again."""
        looked = [version.recheck(other_models) for version in (*self.versions.values(), *self.refused.values())]
        if any(looked):
            self.want(self.wanted, again=True)
            self.on_change.set()
        return any(looked)

    def failure(self) -> str:
        """Return the reason why a desired version is not served; empty when all are served."""
        wrong = [v for v in self.wanted.versions if not _is_ready(self.versions.get(v.version), v)]
        said = ((v.version, self.refused.get(v.version) or self.versions.get(v.version)) for v in wrong)
        return self.wanted.problem or "; ".join(
            f"version {number} is at UNAVAILABLE state: {version.reason if version else 'it was not loaded'}"
            for number, version in said
        )

    def rows(self) -> Iterator[IndexRow]:
        """Yield the model's rows of the repository index, one for each version."""
        seen: dict[int, IndexRow] = {}
        for version in (*self.leaving, *self.loading, *self.versions.values()):
            refused = self.refused.get(version.number)
            why = f"its newer content was refused: {refused.reason}" if refused and version.is_ready else version.reason
            seen[version.number] = IndexRow(self.wanted.name, version.number, version.state, why)
        if self.wanted.is_unloaded:
            for number in self._unloaded:
                seen.setdefault(number, IndexRow(self.wanted.name, number, State.UNAVAILABLE, "unloaded"))
        yield from (seen[number] for number in sorted(seen))
        if not seen and self.wanted.problem:
            yield IndexRow(self.wanted.name, None, State.UNAVAILABLE, self.wanted.problem)
        elif not seen and self.wanted.is_unloaded:
            yield IndexRow(self.wanted.name, None, State.UNKNOWN, "")

    async def converge(self) -> None:
        """Make the versions match the desired state, again and again, until cancelled."""
        backoff = Backoff(_RETRY_FIRST_S, _RETRY_MAX_S)
        while True:
            self._rewanted.clear()
            wanted = self.wanted
            await self._load_missing(wanted)
            if self.wanted is not wanted:
                continue
            self._unload_undesired(wanted)
            self.is_settled.set()
            self.on_change.set()
            failed = self.may_retry()
            if not failed:
                backoff.reset()
            try:
                await asyncio.wait_for(self._rewanted.wait(), backoff.next_s() if failed else None)
            except TimeoutError:
                log.info(
                    "model %(model)s: trying again to load it", {"event": "model.load_retrying", "model": wanted.name}
                )

    async def _load_missing(self, wanted: WantedModel) -> None:
        again, self._is_again = self._is_again, False
        self._forget_refused(wanted)
        missing = [version for version in wanted.versions if not self._is_tried(version, again=again)]
        self.loading = fresh = tuple(Version(wanted.name, version) for version in missing)
        if not fresh:
            return
        self.on_change.set()
        try:
            # Newest first, because requests without a version use the newest.
            await together(self._load(version) for version in reversed(fresh))
            self._replace(fresh)
        finally:
            self.loading = ()
            for version in fresh:
                if self.versions.get(version.number) is not version:
                    self._unload(version)

    async def _load(self, version: Version) -> None:
        await version.load(self.context)
        held = self.versions.get(version.number)
        if held is None or not held.is_ready:
            self.loading = tuple(other for other in self.loading if other is not version)
            self._put(version)

    def _replace(self, fresh: Sequence[Version]) -> None:
        """Replace the serving versions of the same numbers by all freshly loaded ones, or by none of them."""
        waiting = [version for version in fresh if self.versions.get(version.number) is not version]
        failed = [version for version in fresh if not version.is_ready]
        for version in waiting:
            if not failed:
                self._put(version)
            elif version.is_ready:
                version.reason = f"version {failed[0].number}, which was loaded with it, failed"
        if failed:
            self.refused = {**self.refused, **{version.number: version for version in waiting}}

    def _put(self, version: Version) -> None:
        replaced = self.versions.get(version.number)
        self.refused = {number: other for number, other in self.refused.items() if number != version.number}
        self.versions = {**self.versions, version.number: version}
        self._choose_default()
        if replaced is not None:
            self._unload(replaced)
        self.on_change.set()

    def _choose_default(self) -> None:
        ready = self.ready() if self.wanted.is_served else []
        stable = [version for version in ready if version.number == self.wanted.stable]
        self.default = (stable or ready)[-1] if ready else None

    def _is_tried(self, wanted: WantedVersion, *, again: bool) -> bool:
        if _is_ready(self.versions.get(wanted.version), wanted):
            return True
        for failed in (self.versions.get(wanted.version), self.refused.get(wanted.version)):
            if failed is not None and failed.wanted.digest == wanted.digest:
                return not (failed.may_retry or again)
        return False

    def _forget_refused(self, wanted: WantedModel) -> None:
        digests = {version.version: version.digest for version in wanted.versions}
        self.refused = {n: other for n, other in self.refused.items() if digests.get(n) == other.wanted.digest}

    def _unload_undesired(self, wanted: WantedModel) -> None:
        numbers = {version.version for version in wanted.versions}
        has_taken_over = any(version.is_ready for number, version in self.versions.items() if number in numbers)
        if wanted.is_unloaded:
            self._unloaded = tuple(self.versions) or self._unloaded
        for number, version in self.versions.items():
            is_needed = version.is_ready and number in wanted.available and not has_taken_over
            if number not in numbers and not is_needed:
                self.versions = {n: other for n, other in self.versions.items() if n != number}
                self._choose_default()
                self._unload(version)

    def _unload(self, version: Version, drain_s: float | None = None) -> None:
        """Start the unload of a loaded version, after its requests, or after `drain_s` when it is given."""
        if not version.is_loaded:
            return
        version.state = State.UNLOADING
        self.leaving.add(version)
        task = asyncio.create_task(self._finish(version, drain_s), name=f"unload-{version.name}-{version.number}")
        self._unloads.add(task)
        task.add_done_callback(self._unloads.discard)
        task.add_done_callback(log_failure)

    async def _finish(self, version: Version, drain_s: float | None) -> None:
        try:
            await version.unload(drain_s)
        finally:
            self.leaving.discard(version)
            self.on_change.set()

    async def left(self) -> None:
        """Wait until the versions that are unloading now have ended. Cancelling the wait stops no unload."""
        if self._unloads:
            await asyncio.wait(self._unloads)

    async def close(self, drain_s: float) -> None:
        """Unload all versions, each after the requests that use it or `drain_s`."""
        # Versions that were replaced wait for their last request: from now on, they have a limit, too.
        for version in self.leaving:
            version.end_within(drain_s)
        for version in self.versions.values():
            self._unload(version, drain_s)
        self.versions = {}
        await self.left()


def _is_ready(version: Version | None, wanted: WantedVersion) -> bool:
    return version is not None and version.is_ready and version.wanted.digest == wanted.digest
