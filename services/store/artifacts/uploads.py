"""Upload stream of PutArtifact: one header, then chunks, each within the idle timeout."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator

from services.store.artifacts.digest import checked
from shoal.errors import DeadlineExceeded, InvalidArgument
from shoal.store.v1.store_pb2 import PutArtifactRequest

MAX_CHUNK_BYTES = 4 << 20


class Upload:
    """PutArtifact stream whose header has been read and checked. `chunks` reads the rest."""

    def __init__(
        self,
        header: PutArtifactRequest.Header,
        rest: AsyncIterator[PutArtifactRequest],
        idle_s: float,
        uploader: str | None = None,
    ) -> None:
        self.digest = checked(header.sha256, "header.sha256")
        self.size = header.size_bytes
        self.offset = header.offset
        self.reference = header.reference
        self.tenant = header.tenant if header.HasField("tenant") else None
        self.uploader = uploader
        """Tenant of the caller; None: of no tenant."""
        self.staged_name = staged_name(self.digest, uploader)
        if self.size < 0:
            raise InvalidArgument(f"header.size_bytes: expected 0 or more, got {self.size}")
        if not 0 <= self.offset <= self.size:
            raise InvalidArgument(f"header.offset: expected 0 to size_bytes ({self.size}), got {self.offset}")
        self._rest = rest
        self._idle_s = idle_s

    @classmethod
    async def opened(
        cls, requests: AsyncIterator[PutArtifactRequest], idle_s: float, uploader: str | None = None
    ) -> Upload:
        """Read the header and return the upload of a caller of the tenant `uploader`.

        Raises:
            InvalidArgument: the header is missing or invalid.
            DeadlineExceeded: no message arrived for `idle_s`.
        """
        first = await _next(requests, idle_s)
        if first is None or first.WhichOneof("part") != "header":
            raise InvalidArgument("the first message of an upload must be its header (sha256, size_bytes, offset)")
        return cls(first.header, requests, idle_s, uploader)

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the chunks, at most `size_bytes` bytes in all.

        Raises:
            InvalidArgument: a second header, an empty message, a chunk that is too large or beyond `size_bytes`.
            DeadlineExceeded: no message arrived for the idle time.
        """
        at = self.offset
        while (request := await _next(self._rest, self._idle_s)) is not None:
            if (part := request.WhichOneof("part")) != "chunk":
                raise InvalidArgument(f"at byte {at} of the upload: expected a chunk, got {part or 'an empty message'}")
            if (length := len(request.chunk)) > MAX_CHUNK_BYTES:
                raise InvalidArgument(f"chunk at byte {at}: {length} bytes; at most {MAX_CHUNK_BYTES} are allowed")
            if (at := at + length) > self.size:
                raise TooLong(f"the upload goes beyond size_bytes ({self.size}): {at} bytes or more were sent")
            yield request.chunk


def staged_name(digest: str, uploader: str | None) -> str:
    """Return the name of the unfinished uploads of one tenant: no other tenant learns of them, or goes on with them."""
    return digest if uploader is None else f"{digest}-{hashlib.sha256(uploader.encode()).hexdigest()[:16]}"


class TooLong(InvalidArgument):
    """More bytes arrived than the header announced: the content cannot be what the digest names."""


async def _next(requests: AsyncIterator[PutArtifactRequest], idle_s: float) -> PutArtifactRequest | None:
    try:
        async with asyncio.timeout(idle_s):
            return await anext(requests, None)
    except TimeoutError as err:
        raise DeadlineExceeded(f"the upload sent nothing for {idle_s:g} s: resume it when the client is ready") from err
