"""The table of handlers: filled by the generated `add_..._to_server` functions, as a grpc server's is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mesh.server import Served


def methods_of(served: Served) -> dict[str, Any]:
    """`/package.Service/Method` to its grpc.RpcMethodHandler, the interceptor around it."""
    methods = _Methods(served.interceptor.wrap)
    served.add_to(methods)
    return methods.by_path


class _Methods:
    """Stands where generated code expects a grpc server. `wrap` is put around each handler."""

    def __init__(self, wrap: Callable[[str, Any], Any]) -> None:
        self._wrap = wrap
        self.by_path: dict[str, Any] = {}

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        """Called by generated code."""
        for name, handler in handlers.items():
            path = f"/{service}/{name}"
            self.by_path[path] = self._wrap(path, handler)

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """Called by generated code, with the same handlers in another form."""
