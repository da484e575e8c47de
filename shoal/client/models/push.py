"""Push of models into a node.

files ──> stored ──> trial load ──> registered ──> ready everywhere ──> alias
            │             └── fails: nothing is registered
            └── files that no version refers to: the store collects them
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from shoal.client.models import bundle, readiness, repository, trial, upload
from shoal.client.models.registry import ModelPush, Progress, Pushed, of_model
from shoal.client.transport import methods
from shoal.client.transport.calls import Caller
from shoal.errors import FailedPrecondition, Internal, InvalidArgument, ShoalError
from shoal.store.v1 import store_pb2 as store

AT_ONCE = 8
"""Models of a repository that are uploaded, tried and registered at a time. Each waits for disks most of its time."""

_REGISTRY_S = 10.0


@dataclass(frozen=True)
class PushOptions:
    """Options of a push, for each of its models."""

    alias: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    check: bool = True
    """Try each version on one instance before it is registered."""
    wait: bool = True
    timeout_s: float | None = None
    """Time limit of the trials of a model, and again of the wait until it is ready."""


class Push:
    """Pushes models, one or several at a time."""

    def __init__(self, caller: Caller, options: PushOptions) -> None:
        self._caller = caller
        self._options = options
        self._polls = readiness.Polls(caller)

    async def model(self, bundles: Sequence[bundle.Bundle], progress: Callable[[Progress], None]) -> list[Pushed]:
        """Push versions of one model: all are registered, or none. Raises as AsyncModels.push."""
        return await self._ready(await self._registered(bundles, progress))

    async def repository(self, folders: Sequence[Path], settled: Callable[[ModelPush], None]) -> list[ModelPush]:
        """Push the models of a repository, several at a time, each after the models that it consists of.

        `settled` receives each outcome. A model that fails stops only the ensembles that need it.
        """
        slots = asyncio.Semaphore(AT_ONCE)
        pushing: dict[str, asyncio.Task[ModelPush]] = {}

        circles = repository.circles(folders)

        async def push(folder: Path, members: Iterable[str]) -> ModelPush:
            try:
                if folder.name in circles:
                    raise InvalidArgument(f"ensembles contain each other: {circles[folder.name]}")
                for member in [await pushing[member] for member in members]:
                    if member.error is not None:
                        raise FailedPrecondition(f"its model {member.name} was not pushed")
                    if self._options.check and not self._options.wait:
                        # The trial of an ensemble needs its models.
                        await self._waited(list(member.pushed))
                async with slots:
                    registered = await self._registered(bundle.read(folder), _ignore)
                outcome = ModelPush(folder.name, tuple(await self._ready(registered)))
            except ShoalError as err:
                outcome = ModelPush(folder.name, error=err)
            except OSError as err:
                outcome = ModelPush(
                    folder.name, error=FailedPrecondition(f"cannot read {err.filename}: {err.strerror}")
                )
            # A fault of one push must not cancel the others.
            except Exception as err:
                error = Internal(f"a fault of the client: {type(err).__name__}: {err}")
                error.__cause__ = err
                outcome = ModelPush(folder.name, error=error)
            settled(outcome)
            return outcome

        async with asyncio.TaskGroup() as tasks:
            for folder in folders:
                members = repository.members(folder) & pushing.keys()
                pushing[folder.name] = tasks.create_task(push(folder, members), name=f"push-{folder.name}")
        return [task.result() for task in pushing.values()]

    async def _registered(self, bundles: Sequence[bundle.Bundle], progress: Callable[[Progress], None]) -> list[Pushed]:
        """Upload the versions, try the new ones, and register all or none."""
        # First of all, so that an unreachable node is reported at once: an upload has more patience.
        known = await self._known(bundles[0].name)
        files = dict.fromkeys(file for each in bundles for _, file in each.files)
        artifacts = {file: await upload.digest(file) for file in files}
        sent = await self._upload(artifacts.values(), progress)
        models = [self._message(each, artifacts) for each in bundles]
        if self._options.check:
            await self._try(models, known)
        response = await self._caller.call(
            methods.REGISTER_MODEL,
            store.RegisterModelRequest(model=models[0], others=models[1:]),
            timeout_s=_REGISTRY_S,
            doing=f"register {bundles[0].name}",
        )
        return [
            Pushed(of_model(each.model), each.existed, sum(sent[sha256] for sha256 in {f.sha256 for f in model.files}))
            for each, model in zip((response, *response.others), models, strict=True)
        ]

    async def _known(self, name: str) -> Mapping[int, Mapping[str, str]]:
        """Return the contents of the registered versions."""
        listed = await self._caller.call(
            methods.LIST_MODELS, store.ListModelsRequest(name=name), timeout_s=_REGISTRY_S, doing="list models"
        )
        return {each.version: _content(each) for each in listed.models}

    async def _try(self, models: Sequence[store.ModelVersion], known: Mapping[int, Mapping[str, str]]) -> None:
        """Try each version that the registry lacks. Raises as `trial.run`."""
        deadline = self._caller.deadline(self._options.timeout_s)
        newest = known.get(max(known, default=0))
        for model in models:
            # An equal version is not registered again, and a different one of this number is refused.
            is_known = model.version in known if model.version else _content(model) == newest
            if not is_known:
                await trial.run(self._caller, model, deadline)

    async def _ready(self, pushed: list[Pushed]) -> list[Pushed]:
        """Wait until a served version is ready everywhere, and set the alias."""
        options = self._options
        if options.wait:
            pushed = await self._waited(pushed)
        newest = pushed[-1].model
        if options.alias:
            request = store.SetAliasRequest(name=newest.name, alias=options.alias, version=newest.version)
            aliased = await self._caller.call(
                methods.SET_ALIAS, request, timeout_s=_REGISTRY_S, doing=f"alias {newest.name}"
            )
            pushed[-1] = replace(pushed[-1], model=of_model(aliased.model))
        if options.wait and not any(each.ready for each in pushed):
            # The version policy left them out. `stable` is always served, so the alias may have changed that.
            pushed = await self._waited(pushed) if options.alias else pushed
            if not any(each.ready for each in pushed):
                raise readiness.not_served(newest.name, newest.version)
        return pushed

    async def _waited(self, pushed: list[Pushed]) -> list[Pushed]:
        versions = [each.model.version for each in pushed]
        name, timeout_s = pushed[0].model.name, self._options.timeout_s
        not_served = await readiness.wait_ready(self._caller, name, versions, timeout_s, self._polls)
        return [replace(each, ready=each.model.version not in not_served) for each in pushed]

    async def _upload(
        self, artifacts: Iterable[upload.Artifact], progress: Callable[[Progress], None]
    ) -> Mapping[str, int]:
        """Upload each distinct artifact once. Return the bytes sent, by digest."""
        distinct = {artifact.sha256: artifact for artifact in artifacts}
        total = sum(artifact.size_bytes for artifact in distinct.values())
        done = 0
        sent: dict[str, int] = {}
        for sha256, artifact in distinct.items():
            start = done

            def report(offset: int, artifact: upload.Artifact = artifact, start: int = start) -> None:
                progress(Progress(artifact.path.name, start + offset, total))

            sent[sha256] = await upload.put(self._caller, artifact, report)
            done += artifact.size_bytes
        return sent

    def _message(self, each: bundle.Bundle, artifacts: Mapping[Path, upload.Artifact]) -> store.ModelVersion:
        model = store.ModelVersion(name=each.name, version=each.version, labels=self._options.labels)
        for relative_path, file in each.files:
            model.files.add(path=relative_path, sha256=artifacts[file].sha256, size_bytes=artifacts[file].size_bytes)
        return model


def _content(model: store.ModelVersion) -> dict[str, str]:
    return {file.path: file.sha256 for file in model.files}


def _ignore(progress: Progress) -> None:
    """Ignore the progress of one model."""
