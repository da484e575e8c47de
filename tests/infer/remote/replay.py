"""A server that responds as it was recorded: exactly when the bytes of a request are right."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc

RECORDED = Path(__file__).resolve().parent / "recorded"


@dataclass
class Replay(grpc.GenericRpcHandler):
    """Of one folder of `recorded`."""

    exchanges: dict[tuple[str, bytes], tuple[str, str, bytes]]
    unknown: list[tuple[str, bytes]] = field(default_factory=list)
    """Requests that were never recorded."""
    address: str = ""

    @staticmethod
    def of(name: str) -> Replay:
        found = {}
        for exchange in json.loads((RECORDED / name / "exchanges.json").read_text()):
            request = (RECORDED / name / f"{exchange['name']}.request").read_bytes()
            path = RECORDED / name / f"{exchange['name']}.response"
            response = path.read_bytes() if exchange["code"] == "OK" else b""
            found[exchange["method"], request] = (exchange["code"], exchange["message"], response)
        return Replay(found)

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        return grpc.unary_unary_rpc_method_handler(lambda data, context: self._respond(details.method, data, context))

    def _respond(self, method: str, data: bytes, context: grpc.ServicerContext) -> bytes:
        if (method, data) not in self.exchanges:
            self.unknown.append((method, data))
            context.abort(grpc.StatusCode.UNIMPLEMENTED, f"never recorded: {method} {data!r}")
        code, message, response = self.exchanges[method, data]
        if code != "OK":
            context.abort(grpc.StatusCode[code], message)
        return response

    @contextmanager
    def serving(self) -> Iterator[Replay]:
        """Serves on a loopback port until the block ends."""
        with ThreadPoolExecutor(4) as threads:
            server = grpc.server(threads, handlers=[self])
            self.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
            server.start()
            try:
                yield self
            finally:
                server.stop(None).wait()
