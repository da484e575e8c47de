"""Client of a node's models: registered in its store, served by its infer instances."""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from google.protobuf.json_format import MessageToDict

from shoal.client.models import bundle, download, readiness, repository, upload
from shoal.client.models.registry import ModelVersion, Progress, Pushed, of_model
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
        progress: Callable[[Progress], None] = ignore,
        wait: bool = True,
        timeout: float | None = READY_S,
    ) -> builtins.list[Pushed]:
        """Upload a model, register it, wait until it is ready everywhere, and point `alias` at its newest version.

        `path` is one of
        - a bare `.onnx` file, which becomes `version`, or the next version;
        - a model folder in Triton's layout: all its versions, or only `version`. With `renumber` the folder must have
          one version, which becomes `version`, or the next version;
        - a folder of model folders (a repository), pushed one by one, ensembles after their models. When one fails, the
          models pushed before it stay.

        Files that the store has are not sent again. `progress` receives the upload's progress. `timeout` limits the
        wait at the end; the upload has its own limit.

        Raises:
            InvalidArgument, NotFound: `path` is not a model, or is a repository with `name` or `version` set.
            AlreadyExists: the version is registered with other content.
            FailedPrecondition: a file cannot be read, the model cannot be loaded, or the model's version policy serves
                none of the pushed versions; the message says which.
            DeadlineExceeded: the model is registered, but was not ready everywhere in time.
        """
        folders = repository.models_in(Path(path))
        if folders and not (name is None and version is None):
            raise InvalidArgument(
                f"{path} is a repository of models ({', '.join(folder.name for folder in folders[:5])}): a name or a "
                f"version needs one model: push that model's folder, such as {folders[-1]}"
            )
        pushed: builtins.list[Pushed] = []
        for each in folders or [Path(path)]:
            bundles = bundle.read(each, name=name, version=None if renumber else version)
            if renumber:
                bundles = [bundle.renumbered(bundles, version)]
            pushed += await self._push(bundles, alias, labels or {}, progress, wait, timeout)
        return pushed

    async def _push(
        self,
        bundles: builtins.list[bundle.Bundle],
        alias: str,
        labels: Mapping[str, str],
        progress: Callable[[Progress], None],
        wait: bool,
        timeout: float | None,
    ) -> builtins.list[Pushed]:
        """Push all versions of one model."""
        files = dict.fromkeys(file for each in bundles for _, file in each.files)
        artifacts = {file: await upload.digest(file) for file in files}
        sent = await self._upload(artifacts.values(), progress)
        pushed = [await self._register(each, artifacts, labels, sent) for each in bundles]
        if wait:
            pushed = await self._wait_pushed(pushed, timeout)
        newest = pushed[-1].model
        if alias:
            aliased = await self.alias(newest.name, alias, newest.version)
            pushed[-1] = replace(pushed[-1], model=aliased or newest)
        if wait and not any(each_pushed.ready for each_pushed in pushed):
            # The version policy left them out. `stable` is always served, so the alias may have changed that.
            pushed = await self._wait_pushed(pushed, timeout) if alias else pushed
            if not any(each_pushed.ready for each_pushed in pushed):
                raise readiness.not_served(newest.name, newest.version)
        return pushed

    async def _wait_pushed(self, pushed: builtins.list[Pushed], timeout_s: float | None) -> builtins.list[Pushed]:
        name = pushed[0].model.name
        not_served = await readiness.wait_ready(self._caller, name, [each.model.version for each in pushed], timeout_s)
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

    async def _register(
        self,
        each: bundle.Bundle,
        artifacts: Mapping[Path, upload.Artifact],
        labels: Mapping[str, str],
        sent: Mapping[str, int],
    ) -> Pushed:
        model = store.ModelVersion(name=each.name, version=each.version, labels=labels)
        for relative_path, file in each.files:
            model.files.add(path=relative_path, sha256=artifacts[file].sha256, size_bytes=artifacts[file].size_bytes)
        response = await self._caller.call(
            methods.REGISTER_MODEL,
            store.RegisterModelRequest(model=model),
            timeout_s=READ_S,
            doing=f"register {each.name}",
        )
        sent_bytes = sum(sent[sha256] for sha256 in {file.sha256 for file in model.files})
        return Pushed(of_model(response.model), response.existed, sent_bytes)

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
        """Return the statistics of one model, or all, at the responding instance.

        Raises:
            InvalidArgument: no such model.
        """
        request = oip.ModelStatisticsRequest(name=name, version=str(version))
        response = await self._caller.call(methods.MODEL_STATISTICS, request, timeout_s=timeout)
        return [of_statistics(entry) for entry in response.model_stats]

    async def index(self, *, timeout: float | None = READ_S) -> builtins.list[IndexEntry]:
        """Return every model that the responding instance knows, with its state there, and why it is unavailable."""
        response = await self._caller.call(methods.REPOSITORY_INDEX, oip.RepositoryIndexRequest(), timeout_s=timeout)
        return [IndexEntry(entry.name, entry.version, entry.state, entry.reason) for entry in response.models]


def _version(version: int | None) -> int:
    if version is not None and version < 1:
        raise InvalidArgument(f"version {version}: versions count from 1")
    return version or 0
