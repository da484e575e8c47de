"""Servicer of shoal.store.v1.StoreService: translates messages into one domain call, and its result into messages."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import aclosing
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import grpc

from mesh.process.tasks import uninterrupted
from mesh.rpc.auditing import Auditing, Respond
from mesh.rpc.copied import copy_all
from mesh.rpc.fast_call import FastHandler
from mesh.rpc.task_methods import Headers, TaskMethods
from mesh.rpc.tenant_scope import Scopes, TenantScope
from services.store.artifact_rpc import ArtifactParts, ArtifactRpc
from services.store.audit import messages as audit_messages
from services.store.audit.chain import AuditChain
from services.store.audit.verification import AuditVerification
from services.store.documents import Collections
from services.store.exports.exports import Exports
from services.store.registry.model_rules import File
from services.store.registry.registry import Draft, Registry, Version
from services.store.registry.registry_watch import RegistryWatch
from services.store.results.result_documents import timestamp
from services.store.results.result_rules import check_wait
from services.store.results.result_stream import ResultStream
from services.store.results.result_watch import ResultWatch
from services.store.results.results import Results
from services.store.retention.messages import message_of, rule_of
from services.store.retention.rule_repository import RuleRepository
from services.store.usage.messages import usage_of
from services.store.usage.quotas import Quotas
from shoal.access.rpc_groups import LIST_MODELS, REMOVE, SET_ALIAS
from shoal.errors import InvalidArgument, Unimplemented
from shoal.store.v1 import store_pb2 as pb

SERVICE = "shoal.store.v1.StoreService"
PUT_RESULTS = "/shoal.store.v1.StoreService/PutResults"
GET_RESULT = "/shoal.store.v1.StoreService/GetResult"

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


@dataclass(frozen=True)
class AuditParts:
    """Domain objects that serve the calls of the audit log."""

    collections: Collections
    chain: AuditChain
    verification: AuditVerification


class StoreRpc(ArtifactRpc):
    """The gRPC servicer. The server's interceptor translates errors.

    The methods that every job calls have a second form without a context, for the fast path (`fast_methods`).
    """

    def __init__(
        self,
        artifacts: ArtifactParts,
        registry: Registry,
        registry_watch: RegistryWatch,
        results: Results,
        result_watch: ResultWatch,
        result_stream: ResultStream,
        exports: Exports,
        retention: RuleRepository,
        quotas: Quotas,
        scopes: Scopes,
        audit: AuditParts,
    ) -> None:
        super().__init__(artifacts, scopes)
        self._audit = audit
        self._registry = registry
        self._registry_watch = registry_watch
        self._results = results
        self._result_watch = result_watch
        self._result_stream = result_stream
        self._exports = exports
        self._retention = retention
        self._quotas = quotas

    def fast_methods(self, tasks: TaskMethods, auditing: Auditing | None) -> dict[str, FastHandler]:
        """Return the handlers of the methods that every job calls, for a server's fast path."""
        get_result: Respond[pb.GetResultRequest, pb.GetResultResponse] = self._fast_get_result
        if auditing is not None:
            get_result = auditing.counted(GET_RESULT, get_result)
        return {
            **tasks.method(PUT_RESULTS, pb.PutResultsRequest.FromString, self._fast_put_results),
            **tasks.method(GET_RESULT, pb.GetResultRequest.FromString, get_result),
        }

    async def RegisterModel(self, request: pb.RegisterModelRequest, ctx: Context) -> pb.RegisterModelResponse:
        scope = self._scopes.of(ctx, "RegisterModel")
        drafts = [_draft(model) for model in (request.model, *request.others)]
        registered = await self._registry.register(drafts, scope)
        first, *others = (
            pb.RegisterModelResponse(model=_version(version), existed=existed) for version, existed in registered
        )
        first.others.extend(others)
        return first

    async def ListModels(self, request: pb.ListModelsRequest, ctx: Context) -> pb.ListModelsResponse:
        scope, response = self._scopes.of(ctx, "ListModels"), pb.ListModelsResponse()
        async with self._registry.list_turns.take(scope.tenant or ""):
            versions = await uninterrupted(self._registry.versions(request.name))
            async for version in self._registry.each(versions):
                if scope.allows(LIST_MODELS, version.name):
                    response.models.add().CopyFrom(_version(version))
        return response

    async def RemoveModel(self, request: pb.RemoveModelRequest, ctx: Context) -> pb.RemoveModelResponse:
        self._scopes.of(ctx, "RemoveModel").check(REMOVE, request.name)
        response = pb.RemoveModelResponse()
        async for version in self._registry.each(await self._registry.remove(request.name, request.version)):
            response.removed.add().CopyFrom(_version(version))
        return response

    async def SetAlias(self, request: pb.SetAliasRequest, ctx: Context) -> pb.SetAliasResponse:
        scope = self._scopes.of(ctx, "SetAlias")
        scope.check(SET_ALIAS, request.name)
        version = await self._registry.set_alias(request.name, request.alias, request.version, scope)
        return pb.SetAliasResponse(model=_version(version) if version else None)

    async def WatchModels(self, request: pb.WatchModelsRequest, ctx: Context) -> AsyncIterator[pb.WatchModelsResponse]:
        scope, watch = self._scopes.of(ctx, "WatchModels"), self._registry_watch
        async with aclosing(watch.follow(request.name, scope.tenant)) as snapshots:
            shown: tuple[Version, ...] | None = None
            async for versions in snapshots:
                async with watch.turn:
                    # Others go on between two watchers.
                    await asyncio.sleep(0)
                    each = self._registry.each(versions)
                    readable = tuple([version async for version in each if scope.allows(LIST_MODELS, version.name)])
                    # A change of a model that the caller may not read is none for it.
                    response = None if readable == shown else await self._snapshot(readable, scope.tenant)
                shown = readable
                if response is not None:
                    yield response
                # A watch keeps no message while nothing changes.
                del response, versions

    async def _snapshot(self, versions: Iterable[Version], tenant: str | None) -> pb.WatchModelsResponse:
        """Return the message for a caller of `tenant`; only services, which have none, see the tenants of versions."""
        response = pb.WatchModelsResponse()
        async for version in self._registry.each(versions):
            message = _version(version)
            if not tenant:
                message.tenant = version.tenant
            response.snapshot.add().CopyFrom(message)
        return response

    async def RecordAudit(self, request: pb.RecordAuditRequest, ctx: Context) -> pb.RecordAuditResponse:
        return await audit_messages.record(self._audit.chain, request)

    async def StreamAudit(self, request: pb.StreamAuditRequest, ctx: Context) -> AsyncIterator[pb.StreamAuditResponse]:
        async with aclosing(audit_messages.stream(self._audit.collections, request)) as pages:
            async for page in pages:
                yield page

    async def VerifyAudit(self, request: pb.VerifyAuditRequest, ctx: Context) -> AsyncIterator[pb.VerifyAuditResponse]:
        async with aclosing(audit_messages.verify(self._audit.verification)) as steps:
            async for step in steps:
                yield step

    async def PutResults(self, request: pb.PutResultsRequest, ctx: Context) -> pb.PutResultsResponse:
        return await self.put_results(request)

    async def GetResult(self, request: pb.GetResultRequest, ctx: Context) -> pb.GetResultResponse:
        return await self.get_result(request, self._scopes.of(ctx, "GetResult"))

    async def _fast_put_results(self, request: pb.PutResultsRequest, headers: Headers) -> pb.PutResultsResponse:
        return await self.put_results(request)

    async def _fast_get_result(self, request: pb.GetResultRequest, headers: Headers) -> pb.GetResultResponse:
        return await self.get_result(request, self._scopes.of_headers(headers, "GetResult"))

    async def put_results(self, request: pb.PutResultsRequest) -> pb.PutResultsResponse:
        entries = [
            pb.PutResultsResponse.Entry(job_id=standing.job_id, recorded=recorded, standing=standing)
            for recorded, standing in await self._results.put(request.results)
        ]
        return pb.PutResultsResponse(entries=entries)

    async def get_result(self, request: pb.GetResultRequest, scope: TenantScope) -> pb.GetResultResponse:
        wait_s = check_wait(request.wait) if request.HasField("wait") else 0.0
        response = pb.GetResultResponse()
        response.result.CopyFrom(await self._results.get(request.job_id, wait_s, scope))
        return response

    async def QueryResults(self, request: pb.QueryResultsRequest, ctx: Context) -> pb.QueryResultsResponse:
        scope = self._scopes.of(ctx, "QueryResults")
        request.tenant = scope.owner("tenant", request.tenant)
        results, token = await self._results.query(request, scope)
        response = pb.QueryResultsResponse(next_page_token=token)
        copy_all(results, response.results)
        return response

    async def WatchResults(
        self, request: pb.WatchResultsRequest, ctx: Context
    ) -> AsyncIterator[pb.WatchResultsResponse]:
        request.tenant = self._scopes.of(ctx, "WatchResults").owner("tenant", request.tenant)
        async with aclosing(self._result_watch.follow(request)) as items:
            async for result, token in items:
                response = pb.WatchResultsResponse(resume_token=token)
                if result is not None:
                    response.result.CopyFrom(result)
                yield response
                del response, result

    async def StreamResults(
        self, request: pb.StreamResultsRequest, ctx: Context
    ) -> AsyncIterator[pb.StreamResultsResponse]:
        tenant = self._scopes.of(ctx, "StreamResults").owner("filter.tenant", request.filter.tenant)
        request.filter.tenant = tenant
        async with aclosing(self._result_stream.follow(request)) as pieces:
            async for piece in pieces:
                response = pb.StreamResultsResponse(
                    cursor=piece.cursor, watch_token=piece.watch_token, complete=piece.complete
                )
                copy_all(piece.results, response.results)
                yield response

    async def ExportResults(
        self, request: pb.ExportResultsRequest, ctx: Context
    ) -> AsyncIterator[pb.ExportResultsResponse]:
        scope = self._scopes.of(ctx, "ExportResults")
        request.filter.tenant = scope.owner("filter.tenant", request.filter.tenant)
        async with aclosing(self._exports.run(request, scope.verified_tenant)) as running:
            async for progress in running:
                fields = asdict(progress)
                yield pb.ExportResultsResponse(bytes=fields.pop("size"), **fields)

    async def SetRetention(self, request: pb.SetRetentionRequest, ctx: Context) -> pb.SetRetentionResponse:
        await self._retention.put(rule_of(request.rule), remove=request.remove)
        return pb.SetRetentionResponse(rules=map(message_of, (await self._retention.read()).rules))

    async def ListRetention(self, request: pb.ListRetentionRequest, ctx: Context) -> pb.ListRetentionResponse:
        return pb.ListRetentionResponse(rules=map(message_of, (await self._retention.read()).rules))

    async def ApplyRetention(self, request: pb.ApplyRetentionRequest, ctx: Context) -> pb.ApplyRetentionResponse:
        raise Unimplemented("ApplyRetention: the store applies retention by itself, see SHOAL_STORE_RETENTION_MS")

    async def SetQuota(self, request: pb.SetQuotaRequest, ctx: Context) -> pb.SetQuotaResponse:
        tenant = request.tenant if request.HasField("tenant") else None
        if request.remove == request.HasField("bytes"):
            raise InvalidArgument("bytes, remove: set one of them")
        await self._quotas.put(tenant, None if request.remove else request.bytes)
        return pb.SetQuotaResponse()

    async def ListUsage(self, request: pb.ListUsageRequest, ctx: Context) -> pb.ListUsageResponse:
        return await usage_of(self._quotas, request)


def _draft(model: pb.ModelVersion) -> Draft:
    files = tuple(File(file.path, file.sha256, file.size_bytes) for file in model.files)
    return Draft(model.name, model.version, files, dict(model.labels))


def _version(version: Version) -> pb.ModelVersion:
    return pb.ModelVersion(
        name=version.name,
        version=version.version,
        files=[pb.ModelFile(path=file.path, sha256=file.sha256, size_bytes=file.size) for file in version.files],
        content_digest=version.content_digest,
        created_at=timestamp(version.created_at),
        labels=dict(version.labels),
        aliases=version.aliases,
    )
