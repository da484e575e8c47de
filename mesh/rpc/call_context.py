"""Context of a call for its handler: the part of grpc.aio.ServicerContext that our handlers use."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NoReturn, Protocol

import grpc

from mesh.rpc.status import metadata

Metadata = Iterable[tuple[str, str | bytes]]


class RequestMemory(Protocol):
    """Memory of one request, in the account of its server."""

    @property
    def sender(self) -> Hashable:
        """Identity of the connection and tenant that sent the request: equal for all its requests."""

    @property
    def room(self) -> int:
        """Bytes that `hold_response` may count now."""

    def hold(self, size: int) -> None:
        """Count `size` bytes more of memory until the call ends. Raises ResourceExhausted when there is no room."""

    def hold_response(self, size: int) -> None:
        """Count `size` bytes of a response that is being written, as `hold`. It may take all that is free."""

    def release(self, size: int) -> None:
        """Release bytes that were held, before the call ends."""


class CallMemory(RequestMemory, Protocol):
    """Memory of one call, which may have several requests."""

    message_bytes: int
    """Size of the message that was read last."""


class CallContext:
    """Context of one call. `headers` are the request's; `deadline` is on `clock`, infinite without a timeout."""

    def __init__(
        self,
        headers: Sequence[tuple[bytes, bytes]],
        peer: str,
        deadline: float,
        clock: Callable[[], float],
        memory: CallMemory,
    ) -> None:
        self._headers = headers
        self._peer = peer
        self._deadline = deadline
        self._clock = clock
        self.memory = memory
        self.status: tuple[int, str] = (0, "")
        self.trailing: Metadata = ()
        self.leading: Metadata = ()
        self.cause = ""
        """Trace of the call whose failure ends this one; empty: none is known."""

    def invocation_metadata(self) -> Sequence[tuple[str, str | bytes]]:
        return metadata(self._headers)

    def time_remaining(self) -> float | None:
        return None if self._deadline == math.inf else max(self._deadline - self._clock(), 0.0)

    def peer(self) -> str:
        return self._peer

    async def send_initial_metadata(self, initial_metadata: Metadata) -> None:
        self.leading = tuple(initial_metadata)

    def set_trailing_metadata(self, trailing_metadata: Metadata) -> None:
        self.trailing = tuple(trailing_metadata)

    def set_code(self, code: grpc.StatusCode) -> None:
        self.status = (code.value[0], self.status[1])

    def set_details(self, details: str) -> None:
        self.status = (self.status[0], details)

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Metadata = ()) -> NoReturn:
        self.status = (code.value[0], details)
        self.trailing = tuple(trailing_metadata)
        raise grpc.aio.AbortError("the handler ended its call")

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{name} of a gRPC context is not supported by mesh.rpc.call_context")
