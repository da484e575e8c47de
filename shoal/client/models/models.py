"""Client of a node's models: registered in its store, served by its infer instances."""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from google.protobuf.json_format import MessageToDict

from shoal.client.models import bundle, download, readiness, repository
from shoal.client.models.push import Push, PushOptions
from shoal.client.models.registry import ModelPush, ModelVersion, Progress, Pushed, of_model
from shoal.client.models.serving import IndexEntry, ModelMetadata, ModelStatistics, of_metadata, of_statistics
from shoal.client.transport import methods
from shoal.client.transport.calls import Caller
from shoal.errors import InvalidArgument, NotFound
from shoal.inference.v2 import inference_pb2 as oip
from shoal.store.v1 import store_pb2 as store

READ_S = 10.0
"""Timeout of a read, from memory or by an indexed query: longer than an election of the database."""

READY_S = 120.0
"""Timeout of download, load and warm-up of a large model on every instance."""


def ignore(progress: Progress) -> None:
    """Ignore the progress."""


def ignore_outcome(outcome: ModelPush) -> None:
    """Ignore the outcome of one model."""


class AsyncModels:
    """`client.models`: push, list, alias, pull and remove models; read what the servers know of them."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    async def push(
        self,
        path: str | Path,
        name: str | None = None,
        version: int | None = None,
        *,
        alias: str = "",
        labels: Mapping[str, str] | None = None,
        renumber: bool = False,
        check: bool = True,
        progress: Callable[[Progress], None] = ignore,
        wait: bool = True,
        timeout: float | None = READY_S,
    ) -> builtins.list[Pushed]:
        """Upload, try and register a model, wait until it is ready everywhere, and point `alias` at its newest version.

        `path` is one of
        - a bare `.onnx` file, which becomes `version`, or the next version;
        - a model folder in Triton's layout: all its versions, or only `version`. With `renumber` the folder must have
          one version, which becomes `version`, or the next version;
        - a folder of model folders (a repository), see `push_all`. The error follows when all others are pushed.

        With `check`, one instance loads and warms each new version first. A model that cannot be loaded is not
        registered. All versions are registered, or none. Files that the store has are not sent again. `progress`
        receives the upload's progress. `timeout` limits the trial, and then the wait; the upload has its own limit.

        Raises:
            InvalidArgument, NotFound: `path` is not a model, or is a repository with `name` or `version` set.
            AlreadyExists: a version is registered with other content.
            FailedPrecondition: a file cannot be read, the model cannot be loaded, or the model's version policy serves
                none of the pushed versions; the message says which.
            Unavailable: no infer instance is ready to try the model.
            DeadlineExceeded: the trial took too long; or the model is registered, but was not ready everywhere in time.
        """
        folders = repository.models_in(Path(path))
        if folders:
            if not (name is None and version is None):
                raise InvalidArgument(
                    f"{path} is a repository of models ({', '.join(folder.name for folder in folders[:5])}): a name or "
                    f"a version needs one model: push that model's folder, such as {folders[-1]}"
                )
            outcomes = await self.push_all(path, alias=alias, labels=labels, check=check, wait=wait, timeout=timeout)
            return _all_pushed(outcomes)
        bundles = bundle.read(Path(path), name=name, version=None if renumber else version)
        if renumber:
            bundles = [bundle.renumbered(bundles, version)]
        return await Push(self._caller, PushOptions(alias, labels or {}, check, wait, timeout)).model(bundles, progress)

    async def push_all(
        self,
        path: str | Path,
        *,
        alias: str = "",
        labels: Mapping[str, str] | None = None,
        check: bool = True,
        settled: Callable[[ModelPush], None] = ignore_outcome,
        wait: bool = True,
        timeout: float | None = READY_S,
    ) -> builtins.list[ModelPush]:
        """Push all models of the repository `path`, several at a time, each as `push` does; return their outcomes.

        A model that fails has its error in its outcome, and does not keep the others from being pushed. Ensembles
        follow their models. `settled` receives each outcome when it is known.

        Raises:
            InvalidArgument: `path` is no repository.
        """
        folders = repository.models_in(Path(path))
        if not folders:
            raise InvalidArgument(f"{path} is not a folder of model folders")
        options = PushOptions(alias, labels or {}, check, wait, timeout)
        return await Push(self._caller, options).repository(folders, settled)

    async def list(self, name: str = "", *, timeout: float | None = READ_S) -> builtins.list[ModelVersion]:
        """Return the versions in the registry, or those of one model, ordered by name and version."""
        response = await self._caller.call(
            methods.LIST_MODELS, store.ListModelsRequest(name=name), timeout_s=timeout, doing="list models"
        )
        return [of_model(model) for model in response.models]

    async def remove(
        self, name: str, version: int | None = None, *, timeout: float | None = READ_S
    ) -> builtins.list[ModelVersion]:
        """Remove one version, or all, from the registry and from service. Return the removed versions.

        Raises:
            NotFound: no such model or version.
        """
        response = await self._caller.call(
            methods.REMOVE_MODEL,
            store.RemoveModelRequest(name=name, version=_version(version)),
            timeout_s=timeout,
            doing=f"remove {name}",
        )
        return [of_model(model) for model in response.removed]

    async def alias(
        self, name: str, alias: str, version: int | None, *, timeout: float | None = READ_S
    ) -> ModelVersion | None:
        """Point `alias` (such as `stable`) at a version; None removes the alias.

        Raises:
            NotFound: no such version.
        """
        response = await self._caller.call(
            methods.SET_ALIAS,
            store.SetAliasRequest(name=name, alias=alias, version=_version(version)),
            timeout_s=timeout,
            doing=f"alias {name}",
        )
        return of_model(response.model) if response.HasField("model") and response.model.name else None

    async def pull(
        self,
        name: str,
        version: int | None = None,
        *,
        into: str | Path = ".",
        progress: Callable[[Progress], None] = ignore,
    ) -> Path:
        """Download a version (None: the newest) to `into`/<name>/<version> and verify it. Return `into`/<name>.

        Raises:
            NotFound: no such model or version.
            DataLoss: the received bytes have another digest than the registered ones.
        """
        versions = {model.version: model for model in await self.list(name)}
        number = max(versions, default=0) if version is None else version
        if number not in versions:
            known = f"; versions: {', '.join(map(str, versions))}" if versions else ""
            what = f"version {version} of model" if version is not None else "model"
            raise NotFound(f"no {what} {name!r}{known}")
        return await download.pull(self._caller, versions[number], Path(into), progress)

    async def ready(self, name: str, version: int | str = "", *, timeout: float | None = READ_S) -> bool:
        """Return True when the responding instance has the version (empty: any) of the model ready."""
        request = oip.ModelReadyRequest(name=name, version=str(version))
        response = await self._caller.call(methods.MODEL_READY, request, timeout_s=timeout)
        return response.ready

    async def wait_ready(self, name: str, version: int | None = None, *, timeout: float | None = READY_S) -> None:
        """Wait until every infer instance that takes traffic has the version (None: any) of the model ready.

        Raises:
            FailedPrecondition: the model cannot be loaded, or its version policy does not serve the version.
            DeadlineExceeded: an instance was not ready in time; the message names it.
        """
        if await readiness.wait_ready(self._caller, name, [version], timeout):
            raise readiness.not_served(name, version)

    async def metadata(self, name: str, version: int | str = "", *, timeout: float | None = READ_S) -> ModelMetadata:
        """Return the versions, inputs and outputs of a model.

        Raises:
            NotFound: no such model or version.
        """
        request = oip.ModelMetadataRequest(name=name, version=str(version))
        return of_metadata(await self._caller.call(methods.MODEL_METADATA, request, timeout_s=timeout))

    async def config(self, name: str, version: int | str = "", *, timeout: float | None = READ_S) -> dict[str, Any]:
        """Return the configuration of a model, completed by the server, with the names of Triton's `config.pbtxt`.

        Raises:
            NotFound: no such model or version.
        """
        request = oip.ModelConfigRequest(name=name, version=str(version))
        response = await self._caller.call(methods.MODEL_CONFIG, request, timeout_s=timeout)
        return MessageToDict(response.config, preserving_proto_field_name=True)

    async def load(
        self,
        name: str,
        *,
        config: Mapping[str, Any] | str | None = None,
        files: Mapping[str, bytes] | None = None,
        timeout: float | None = READY_S,
    ) -> None:
        """Load a model of the responding instance's repository, or load it again, and wait until it is ready.

        `config` (as of `config`, or JSON) replaces the model's configuration for this load. `files` (`1/model.onnx`:
        its bytes) replace the model's files, and need a `config`. The server must allow it: `--model-control explicit`.

        Raises:
            InvalidArgument: the model cannot be loaded; the message has the reason.
            FailedPrecondition: the server does not allow it. Triton and others answer Unavailable or PermissionDenied.
        """
        request = oip.RepositoryModelLoadRequest(model_name=name)
        if config is not None:
            text = config if isinstance(config, str) else json.dumps(config)
            request.parameters["config"].string_param = text
        for path, content in (files or {}).items():
            request.parameters[f"file:{path}"].bytes_param = content
        await self._caller.call(methods.MODEL_LOAD, request, timeout_s=timeout, doing=f"load {name}")

    async def unload(self, name: str, *, dependents: bool = False, timeout: float | None = READY_S) -> None:
        """Stop serving a model at the responding instance, until it is loaded again; requests in flight finish.

        With `dependents`, the models that an ensemble consists of are unloaded, too.

        Raises:
            FailedPrecondition: the server does not allow it, as in `load`.
        """
        request = oip.RepositoryModelUnloadRequest(model_name=name)
        if dependents:
            request.parameters["unload_dependents"].bool_param = True
        await self._caller.call(methods.MODEL_UNLOAD, request, timeout_s=timeout, doing=f"unload {name}")

    async def statistics(
        self, name: str = "", version: int | str = "", *, timeout: float | None = READ_S
    ) -> builtins.list[ModelStatistics]:
        """Return the statistics of one model, or all, summed over the node's instances.

        Raises:
            InvalidArgument: no such model.
            Unavailable: an instance does not respond, so the sums would lack its counts.
        """
        request = oip.ModelStatisticsRequest(name=name, version=str(version))
        response = await self._caller.call(methods.MODEL_STATISTICS, request, timeout_s=timeout)
        return [of_statistics(entry) for entry in response.model_stats]

    async def index(self, *, timeout: float | None = READ_S) -> builtins.list[IndexEntry]:
        """Return every model that the responding instance knows, with its state there, and why it is unavailable."""
        response = await self._caller.call(methods.REPOSITORY_INDEX, oip.RepositoryIndexRequest(), timeout_s=timeout)
        return [IndexEntry(entry.name, entry.version, entry.state, entry.reason) for entry in response.models]


def _all_pushed(outcomes: Sequence[ModelPush]) -> builtins.list[Pushed]:
    """Return the pushed versions. Raises an error of the first failure's class, with the reasons of all failures."""
    failed = {each.name: each.error for each in outcomes if each.error is not None}
    if failed:
        reasons = "; ".join(f"{name}: {error.message}" for name, error in failed.items())
        raise type(next(iter(failed.values())))(f"{len(failed)} of {len(outcomes)} models were not pushed: {reasons}")
    return [pushed for each in outcomes for pushed in each.pushed]


def _version(version: int | None) -> int:
    if version is not None and version < 1:
        raise InvalidArgument(f"version {version}: versions count from 1")
    return version or 0
