"""Translation of ListUsage requests and of usage messages."""

from __future__ import annotations

from services.store.results.result_documents import timestamp
from services.store.usage.quotas import MAX_PAGE, Quotas, Usage
from shoal.errors import InvalidArgument
from shoal.store.v1 import store_pb2 as pb

_TOKEN = "after:"


async def usage_of(quotas: Quotas, request: pb.ListUsageRequest) -> pb.ListUsageResponse:
    """Return one page of usage, after a recount when the request demands one.

    Raises:
        InvalidArgument: a bad page size or token.
    """
    if not 0 <= request.page_size <= MAX_PAGE:
        raise InvalidArgument(f"page_size: expected 1 to {MAX_PAGE}, or 0 for {MAX_PAGE}; got {request.page_size}")
    if request.page_token and not request.page_token.startswith(_TOKEN):
        raise InvalidArgument("page_token: not a token of this service: leave it out for the first page")
    if request.recount and not request.page_token:
        await quotas.recount()
    after = request.page_token.removeprefix(_TOKEN) if request.page_token else None
    usages, following = await quotas.list(after, request.page_size or MAX_PAGE, over=request.over_quota)
    count, size = (0, 0) if request.over_quota else await quotas.artifacts()
    token = "" if following is None else _TOKEN + following
    return pb.ListUsageResponse(
        usages=map(message_of, usages), next_page_token=token, artifacts=count, artifact_bytes=size
    )


def message_of(usage: Usage) -> pb.TenantUsage:
    """Return the message of a tenant's usage."""
    counted = None if usage.recounted_at is None else timestamp(usage.recounted_at)
    return pb.TenantUsage(
        tenant=usage.tenant,
        results=usage.results,
        bytes=usage.bytes,
        payloads=usage.payloads,
        payload_bytes=usage.payload_bytes,
        quota_bytes=usage.quota_bytes,
        recounted_at=counted,
    )
