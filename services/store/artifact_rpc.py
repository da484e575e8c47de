"""Servicer methods of shoal.store.v1.StoreService for artifacts, blobs and backups."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc

from mesh.rpc.places import Places
from mesh.rpc.tenant_scope import Scopes, TenantScope
from services.store.artifacts import digest
from services.store.artifacts.artifacts import Artifacts
from services.store.artifacts.stored import Stored
from services.store.artifacts.uploads import Upload
from services.store.backups.backup import Backup
from services.store.backups.progress import BackupProgress
from services.store.backups.restore import Restore
from services.store.garbage.collector import Collector
from services.store.garbage.references import References, check_name, check_tenant
from services.store.garbage.verification import Finding, Verification, VerificationProgress
from services.store.results.result_documents import timestamp
from services.store.usage.messages import message_of
from services.store.usage.quotas import Quotas
from shoal.errors import InvalidArgument, PermissionDenied
from shoal.store.v1 import store_pb2 as pb
from shoal.store.v1 import store_pb2_grpc

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

READS_AT_ONCE = 64
"""GetArtifact streams of tenants at a time. Each has a window of 4 MiB in memory for as long as its client reads."""
_NAMED = 1_000


@dataclass(frozen=True)
class ArtifactParts:
    """Domain objects that serve these calls."""

    artifacts: Artifacts
    references: References
    collector: Collector
    verification: Verification
    backup: Backup
    restore: Restore
    quotas: Quotas
    upload_idle_s: float


class ArtifactRpc(store_pb2_grpc.StoreServiceServicer):
    """Base of the servicer: the methods for artifacts, blobs and backups."""

    def __init__(self, parts: ArtifactParts, scopes: Scopes) -> None:
        self._parts = parts
        self._scopes = scopes
        self._artifacts = parts.artifacts
        self._reads = Places(READS_AT_ONCE, "reads of artifacts")
        self.read_bytes = self.stored_bytes = 0
        """Bytes of artifacts that were sent, and that were stored as new ones."""

    async def PutArtifact(self, requests: AsyncIterator[pb.PutArtifactRequest], ctx: Context) -> pb.PutArtifactResponse:
        scope = self._scopes.of(ctx, "PutArtifact")
        upload = await Upload.opened(requests, self._parts.upload_idle_s, scope.tenant)
        _check_use(upload, scope)
        artifact, existed = await self._artifacts.put(upload, scope)
        self.stored_bytes += 0 if existed else artifact.size
        if upload.reference:
            await self._parts.references.make(upload.reference, artifact, upload.tenant)
        usage = None if upload.tenant is None else await self._parts.quotas.over(upload.tenant)
        over = None if usage is None else message_of(usage)
        return pb.PutArtifactResponse(artifact=_artifact(artifact), existed=existed, over_quota=over)

    async def StatArtifact(self, request: pb.StatArtifactRequest, ctx: Context) -> pb.StatArtifactResponse:
        scope = self._scopes.of(ctx, "StatArtifact", behalf=request.caller)
        artifact, received = await self._artifacts.stat(digest.checked(request.sha256, "sha256"), scope)
        return pb.StatArtifactResponse(artifact=_artifact(artifact) if artifact else None, received_bytes=received)

    async def GetArtifact(self, request: pb.GetArtifactRequest, ctx: Context) -> AsyncIterator[pb.GetArtifactResponse]:
        name, scope = digest.checked(request.sha256, "sha256"), self._scopes.of(ctx, "GetArtifact")
        # Services bound their own reads.
        with nullcontext() if scope.tenant is None else self._reads.take(scope.tenant):
            artifact, chunks = await self._artifacts.reader.read(name, request.offset, scope)
            yield pb.GetArtifactResponse(size_bytes=artifact.size)
            async for chunk in chunks:
                self.read_bytes += len(chunk)
                yield pb.GetArtifactResponse(chunk=chunk)

    async def ReleaseArtifacts(self, request: pb.ReleaseArtifactsRequest, ctx: Context) -> pb.ReleaseArtifactsResponse:
        return pb.ReleaseArtifactsResponse(released=await self._parts.references.release(request.references))

    async def ListReferences(self, request: pb.ListReferencesRequest, ctx: Context) -> pb.ListReferencesResponse:
        page = await self._parts.references.page(request.prefix, request.after, request.before, request.page_size)
        return pb.ListReferencesResponse(
            references=[pb.ListReferencesResponse.Reference(name=name, sha256=sha256) for name, sha256 in page]
        )

    async def VerifyStore(self, request: pb.VerifyStoreRequest, ctx: Context) -> AsyncIterator[pb.VerifyStoreResponse]:
        async with aclosing(self._parts.verification.run(sizes_only=request.sizes_only)) as steps:
            async for seen in steps:
                yield _seen(seen)

    async def CollectArtifacts(self, request: pb.CollectArtifactsRequest, ctx: Context) -> pb.CollectArtifactsResponse:
        done = await self._parts.collector.collect(strays=request.strays)
        return pb.CollectArtifactsResponse(
            condemned=done.marked, collected=done.artifacts, removed=done.blobs, strays=done.strays
        )

    async def BackUp(self, request: pb.BackUpRequest, ctx: Context) -> AsyncIterator[pb.BackUpResponse]:
        async with aclosing(self._parts.backup.run(request.to, trust_sizes=request.trust_sizes)) as steps:
            async for progress in steps:
                yield pb.BackUpResponse(progress=_progress(progress))

    async def Restore(self, request: pb.RestoreRequest, ctx: Context) -> AsyncIterator[pb.RestoreResponse]:
        async with aclosing(self._parts.restore.run(request.source, request.backup_id)) as steps:
            async for progress in steps:
                yield pb.RestoreResponse(progress=_progress(progress))


def _check_use(upload: Upload, scope: TenantScope) -> None:
    """Check the reference and the tenant of an upload, before its first byte is read."""
    if scope.access is not None and (upload.reference or upload.tenant is not None):
        raise PermissionDenied("header.reference, header.tenant: only services refer to artifacts: leave both out")
    if upload.reference:
        check_name(upload.reference, "header.reference")
    elif upload.tenant is not None:
        raise InvalidArgument("header.tenant: a reference counts for a tenant: give header.reference, or leave it out")
    check_tenant(upload.tenant, "header.tenant")


def _artifact(artifact: Stored) -> pb.Artifact:
    return pb.Artifact(sha256=artifact.digest, size_bytes=artifact.size, created_at=timestamp(artifact.created_at))


def _seen(seen: VerificationProgress) -> pb.VerifyStoreResponse:
    finding = _finding(seen.finding) if seen.finding else None
    return pb.VerifyStoreResponse(blobs=seen.blobs, blobs_in_all=seen.blobs_in_all, bytes=seen.bytes, finding=finding)


def _finding(found: Finding) -> pb.VerifyStoreResponse.Finding:
    return pb.VerifyStoreResponse.Finding(
        kind=pb.VerifyStoreResponse.Kind.Name(found.kind.value),
        key=found.key,
        message=found.message,
        sha256=found.sha256,
        users=found.users,
    )


def _progress(progress: BackupProgress) -> pb.BackupProgress:
    return pb.BackupProgress(
        backup_id=progress.backup_id,
        documents=progress.documents,
        blobs=progress.blobs,
        blobs_in_all=progress.blobs_in_all,
        copied=progress.copied,
        copied_bytes=progress.copied_bytes,
        missing=progress.missing[:_NAMED],
        repaired=progress.repaired,
        cluster_time=progress.cluster_time,
        complete=progress.is_complete,
    )
