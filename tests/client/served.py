"""Small servers that answer as a test tells them, on the real wire."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import grpc

from shoal.client.transport.transport import MESSAGE_BYTES


class Served:
    """A grpc.aio server in a thread of its own: handlers by method path, and how often each was called."""

    def __init__(self) -> None:
        self.handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
        self.calls: dict[str, int] = {}
        self.metadata: list[dict[str, str]] = []
        self.address = ""
        self._loop = asyncio.new_event_loop()
        self._server: Any = None
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def on(self, method: Any, behaviour: Callable[..., Any], kind: str = "unary_unary") -> None:
        """`behaviour(request, context)` (a coroutine function, or an async generator function) answers `method`."""
        make = getattr(grpc, f"{kind}_rpc_method_handler")
        self.handlers[method.path] = make(
            behaviour, method.request.FromString, lambda message: message.SerializeToString()
        )

    def start(self, address: str = "127.0.0.1:0") -> Served:
        self.run(self._start(address))
        return self

    def stop(self) -> None:
        """Ends the server; `start(address)` may follow."""
        self.run(self._server.stop(0))

    def run(self, coroutine: Any) -> Any:
        future: Future[Any] = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        return future.result(20)

    def close(self) -> None:
        if self._server is not None:
            self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _start(self, address: str) -> None:
        served = self

        class Handlers(grpc.GenericRpcHandler):
            def service(self, handler_call_details: Any) -> Any:
                path = handler_call_details.method
                served.calls[path] = served.calls.get(path, 0) + 1
                served.metadata.append(dict(handler_call_details.invocation_metadata))
                return served.handlers.get(path)

        options = [("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", MESSAGE_BYTES)]
        self._server = grpc.aio.server(options=[*options, ("grpc.max_send_message_length", MESSAGE_BYTES)])
        self._server.add_generic_rpc_handlers((Handlers(),))
        port = self._server.add_insecure_port(address)
        self.address = address if address.startswith("unix:") else f"127.0.0.1:{port}"
        await self._server.start()

    def count(self, method: Any) -> int:
        return self.calls.get(method.path, 0)
