"""The models of a node: pushed to its store, served by its infer instances."""

from __future__ import annotations

import builtins
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
"""Answered from memory or by an indexed query: ten seconds outlast an election of the database."""

READY_S = 120.0
"""Download, load and warm-up of a large model on every instance."""


def ignore(progress: Progress) -> None:
    """Tells nobody."""


class AsyncModels:
    """`client.models`."""

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
        timeout: float = READY_S,
    ) -> builtins.list[Pushed]:
        """Uploads a model, registers it, waits until it can be asked, and points `alias` at its newest version.

        `path` is a bare `.onnx` file, which becomes the next version unless `version` is given, or a model folder in
        Triton's layout, of which every version goes, or only `version`; with `renumber` the folder has one version,
        which becomes `version`, or the next one. A folder of several model folders (a repository) is pushed one after
        the other, an ensemble behind its models; when one of them fails, those before it stay.
        What the store has is not sent again.
        `progress` is told how far the upload is; `timeout` is for the wait at the end: the upload has its own.

        Raises:
            InvalidArgument, NotFound: `path` is no model; or it is a repository, and `name` or `version` is given.
            AlreadyExists: the version is registered with other content.
            FailedPrecondition: a file cannot be read, the model cannot be loaded, or none of what was pushed is served,
                because the model's version policy leaves it out; the message says which.
            DeadlineExceeded: it is registered, but not ready everywhere in time.
        """
        folders = repository.models_in(Path(path))
        if folders and not (name is None and version is None):
            raise InvalidArgument(
                f"{path} is a repository of models ({', '.join(folder.name for folder in folders[:5])}): a name or a "
                f"version is that of one model: push that one: {folders[-1]}"
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
        timeout: float,
    ) -> builtins.list[Pushed]:
        """All versions of one model."""
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
            # Left out by the version policy; `stable` is always served, so the alias may have mended that.
            pushed = await self._wait_pushed(pushed, timeout) if alias else pushed
            if not any(each_pushed.ready for each_pushed in pushed):
                raise readiness.left_out(newest.name, newest.version)
        return pushed

    async def _wait_pushed(self, pushed: builtins.list[Pushed], timeout_s: float) -> builtins.list[Pushed]:
        name = pushed[0].model.name
        left_out = await readiness.wait_ready(self._caller, name, [each.model.version for each in pushed], timeout_s)
        return [replace(each, ready=each.model.version not in left_out) for each in pushed]

    async def _upload(
        self, artifacts: Iterable[upload.Artifact], progress: Callable[[Progress], None]
    ) -> Mapping[str, int]:
        """Puts each once. Returns the bytes sent, by digest."""
        distinct = {artifact.sha256: artifact for artifact in artifacts}
        total = sum(artifact.size_bytes for artifact in distinct.values())
        done = 0
        sent: dict[str, int] = {}
        for sha256, artifact in distinct.items():
            start = done

            def told(offset: int, artifact: upload.Artifact = artifact, start: int = start) -> None:
                progress(Progress(artifact.path.name, start + offset, total))

            sent[sha256] = await upload.put(self._caller, artifact, told)
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
        for inside, file in each.files:
            model.files.add(path=inside, sha256=artifacts[file].sha256, size_bytes=artifacts[file].size_bytes)
        answer = await self._caller.call(
            methods.REGISTER_MODEL,
            store.RegisterModelRequest(model=model),
            timeout_s=READ_S,
            doing=f"register {each.name}",
        )
        sent_bytes = sum(sent[sha256] for sha256 in {file.sha256 for file in model.files})
        return Pushed(of_model(answer.model), answer.existed, sent_bytes)

    async def list(self, name: str = "", *, timeout: float = READ_S) -> builtins.list[ModelVersion]:
        """Every version in the registry, or those of one model, by name and version."""
        answer = await self._caller.call(
            methods.LIST_MODELS, store.ListModelsRequest(name=name), timeout_s=timeout, doing="list models"
        )
        return [of_model(model) for model in answer.models]

    async def remove(
        self, name: str, version: int | None = None, *, timeout: float = READ_S
    ) -> builtins.list[ModelVersion]:
        """Takes one version, or all of them, out of the registry, and so out of service. Returns what was removed.

        Raises:
            NotFound: no such model or version.
        """
        answer = await self._caller.call(
            methods.REMOVE_MODEL,
            store.RemoveModelRequest(name=name, version=_version(version)),
            timeout_s=timeout,
            doing=f"remove {name}",
        )
        return [of_model(model) for model in answer.removed]

    async def alias(
        self, name: str, alias: str, version: int | None, *, timeout: float = READ_S
    ) -> ModelVersion | None:
        """Points `alias` (such as `stable`) at a version; None takes the alias away.

        Raises:
            NotFound: no such version.
        """
        answer = await self._caller.call(
            methods.SET_ALIAS,
            store.SetAliasRequest(name=name, alias=alias, version=_version(version)),
            timeout_s=timeout,
            doing=f"alias {name}",
        )
        return of_model(answer.model) if answer.HasField("model") and answer.model.name else None

    async def pull(
        self,
        name: str,
        version: int | None = None,
        *,
        into: str | Path = ".",
        progress: Callable[[Progress], None] = ignore,
    ) -> Path:
        """Downloads a version (None: the newest) to `into`/<name>/<version>, verified. Returns `into`/<name>.

        Raises:
            NotFound: no such model or version.
            DataLoss: what came is not what was registered.
        """
        versions = {model.version: model for model in await self.list(name)}
        wanted = max(versions, default=0) if version is None else version
        if wanted not in versions:
            there = f": there are {', '.join(map(str, versions))}" if versions else ""
            raise NotFound(f"no model {name!r} version {version or 'of any kind'}{there}")
        return await download.pull(self._caller, versions[wanted], Path(into), progress)

    async def ready(self, name: str, version: int | str = "", *, timeout: float = READ_S) -> bool:
        """Whether the instance that answers has the model (any version, when none is given) ready."""
        request = oip.ModelReadyRequest(name=name, version=str(version))
        answer = await self._caller.call(methods.MODEL_READY, request, timeout_s=timeout)
        return answer.ready

    async def wait_ready(self, name: str, version: int | None = None, *, timeout: float = READY_S) -> None:
        """Waits until every infer instance that takes traffic has the model (any version, when None) ready.

        Raises:
            FailedPrecondition: it cannot be loaded, or the model's version policy leaves it out.
            DeadlineExceeded: not everywhere in time; the message says where not.
        """
        if await readiness.wait_ready(self._caller, name, [version], timeout):
            raise readiness.left_out(name, version)

    async def metadata(self, name: str, version: int | str = "", *, timeout: float = READ_S) -> ModelMetadata:
        """Its versions, inputs and outputs.

        Raises:
            NotFound: no such model or version.
        """
        request = oip.ModelMetadataRequest(name=name, version=str(version))
        return of_metadata(await self._caller.call(methods.MODEL_METADATA, request, timeout_s=timeout))

    async def config(self, name: str, version: int | str = "", *, timeout: float = READ_S) -> dict[str, Any]:
        """Its configuration as the server completed it, by the names of Triton's `config.pbtxt`.

        Raises:
            NotFound: no such model or version.
        """
        request = oip.ModelConfigRequest(name=name, version=str(version))
        answer = await self._caller.call(methods.MODEL_CONFIG, request, timeout_s=timeout)
        return MessageToDict(answer.config, preserving_proto_field_name=True)

    async def statistics(
        self, name: str = "", version: int | str = "", *, timeout: float = READ_S
    ) -> builtins.list[ModelStatistics]:
        """What the instance that answers has done, for one model or all.

        Raises:
            InvalidArgument: no such model.
        """
        request = oip.ModelStatisticsRequest(name=name, version=str(version))
        answer = await self._caller.call(methods.MODEL_STATISTICS, request, timeout_s=timeout)
        return [of_statistics(entry) for entry in answer.model_stats]

    async def index(self, *, timeout: float = READ_S) -> builtins.list[IndexEntry]:
        """Every model that the instance that answers knows, with its state there, and why one is unavailable."""
        answer = await self._caller.call(methods.REPOSITORY_INDEX, oip.RepositoryIndexRequest(), timeout_s=timeout)
        return [IndexEntry(entry.name, entry.version, entry.state, entry.reason) for entry in answer.models]


def _version(version: int | None) -> int:
    if version is not None and version < 1:
        raise InvalidArgument(f"version {version}: versions count from 1")
    return version or 0
