"""A service made for the contract of the server: each call says in its header `x-do` (JSON) what shall be done with it.

    {"do": "echo"}                          answers with what came
    {"do": "fail", "code": 5, "message": "..", "after": 250}      raises that ShoalError
    {"do": "raise", "kind": "SystemExit"}   raises that exception
    {"do": "wait", "mark": "a"}             waits for ever; `Seen` tells what became of it
    {"do": "sleep", "ms": 50}               answers after so long
    {"do": "block", "mark": "a"}            waits for a thread that never ends
    {"do": "size", "bytes": 100}            answers with so many bytes; streams: `count` times
    {"do": "metadata"}                      sends back every header that begins with `x-`, leading and trailing
    {"do": "connection"}                    answers with the number of the client's connection to Envoy (`Short`)
    {"do": "die" | "child"}    ends the process; a child's signal mask

Four methods, one of each kind, and two that are answered on the fast path: `Short`, and `Tasked`, whose answer is
awaited.
"""

from __future__ import annotations

import asyncio
import builtins
import json
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool
from google.protobuf.message import DecodeError
from google.protobuf.wrappers_pb2 import BytesValue

from mesh.rpc.fast_call import FastCall, FastHandler
from mesh.rpc.server import Rpc
from mesh.rpc.task_methods import TaskMethods
from shoal.errors import InvalidArgument, from_status

NAME = "shoal.test.Fronts"
METHODS = {
    "Unary": (False, False),
    "Short": (False, False),
    "Tasked": (False, False),
    "ServerStream": (False, True),
    "ClientStream": (True, False),
    "Bidi": (True, True),
    "Seen": (False, False),
}
"""Whether requests, and answers, are streams."""


def path(method: str) -> str:
    return f"/{NAME}/{method}"


class Service:
    """What the service knows of its calls."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        """`<event> <mark>` in the order in which it happened."""
        self.tasks = TaskMethods()

    async def Unary(self, request: BytesValue, context: Any) -> BytesValue:
        return await self._one(_order(context.invocation_metadata()), request, context)

    async def Short(self, request: BytesValue, context: Any) -> BytesValue:
        return await self.Unary(request, context)

    async def Tasked(self, request: BytesValue, context: Any) -> BytesValue:
        return await self.Unary(request, context)

    async def ServerStream(self, request: BytesValue, context: Any) -> AsyncIterator[BytesValue]:
        order = _order(context.invocation_metadata())
        for number in range(order.get("count", 3)):
            self._note("sent", order, number)
            yield await self._one({"do": "echo", **order}, request, context)
        if (then := order.get("then")) is not None:
            yield await self._one(then, request, context)

    async def ClientStream(self, requests: AsyncIterator[BytesValue], context: Any) -> BytesValue:
        order = _order(context.invocation_metadata())
        if order["do"] != "echo":
            return await self._one(order, BytesValue(), context)
        got = [len(request.value) async for request in requests] if not order.get("mark") else []
        if mark := order.get("mark"):  # Takes one, and then no more: the rest has to wait outside.
            await anext(aiter(requests))
            self.seen.append(f"started {mark}")
            await asyncio.Event().wait()
        return BytesValue(value=json.dumps(got).encode())

    async def Bidi(self, requests: AsyncIterator[BytesValue], context: Any) -> AsyncIterator[BytesValue]:
        order = _order(context.invocation_metadata())
        try:
            async for request in requests:
                yield await self._one(order, request, context)
            self._note("half-closed", order)
        except (asyncio.CancelledError, GeneratorExit):  # The latter when an answer could not be sent.
            self._note("cancelled", order)
            raise

    async def Seen(self, request: BytesValue, context: Any) -> BytesValue:
        """Return all events, or those of the request, a JSON list, that have happened."""
        seen = self.seen
        if request.value:
            seen = [event for event in json.loads(request.value) if event in seen]
        return BytesValue(value=json.dumps(seen).encode())

    async def _one(self, order: dict[str, Any], request: BytesValue, context: Any) -> BytesValue:
        what = order["do"]
        if what in ("wait", "sleep"):
            self._note("started", order)
            try:
                await (asyncio.Event().wait() if what == "wait" else asyncio.sleep(order["ms"] / 1000))
            except asyncio.CancelledError:
                self._note("cancelled", order)
                raise
            self._note("finished", order)
        if what == "block":
            self._note("started", order)
            await asyncio.to_thread(threading.Event().wait)
        if what == "metadata":
            given = [(k, v) for k, v in context.invocation_metadata() if k.startswith("x-") and k != "x-do"]
            await context.send_initial_metadata(given)
            context.set_trailing_metadata(given)
        if what == "left":
            return BytesValue(value=repr(context.time_remaining()).encode())
        return BytesValue(value=done(order, request.value))

    def _note(self, event: str, order: Mapping[str, Any], number: int | None = None) -> None:
        if mark := order.get("mark"):
            self.seen.append(f"{event} {mark}" + ("" if number is None else f" {number}"))

    def short(self, body: bytes, call: FastCall) -> None:
        """`Short` on the fast path."""
        order = _order([(key.decode(), value.decode()) for key, value in call.headers.items()])
        try:
            value = BytesValue.FromString(body[5:]).value
        except DecodeError as err:
            raise InvalidArgument(str(err)) from err
        if order["do"] == "wait":
            self._note("started", order)
            call.on_end = lambda: self._note("cancelled", order)
        elif order["do"] == "connection":
            self._reply(call, call._stream.client or b"")
        elif order["do"] == "sleep":
            self._note("started", order)
            timer = asyncio.get_running_loop().call_later(order["ms"] / 1000, self._reply, call, value)
            call.on_end = timer.cancel
        else:
            self._reply(call, done(order, value))

    def awaited(self, body: bytes, call: FastCall) -> None:
        """`Tasked` on the fast path."""
        order = _order([(key.decode(), value.decode()) for key, value in call.headers.items()])

        async def answer(request: BytesValue, headers: object) -> BytesValue:
            return await self._one(order, request, None)

        (handle,) = self.tasks.method(path("Tasked"), BytesValue.FromString, answer).values()
        handle(body, call)

    def _reply(self, call: FastCall, value: bytes) -> None:
        data = BytesValue(value=value).SerializeToString()
        call.reply((data,), len(data))


def done(order: Mapping[str, Any], value: bytes) -> bytes:
    """The answer to an order that needs no waiting."""
    match order["do"]:
        case "fail":
            message = order.get("message", "as told") * order.get("times", 1)
            raise from_status(order["code"], message, retry_after_ms=order.get("after"))
        case "raise":
            raise getattr(builtins, order["kind"])("secret")
        case "size":
            return bytes(order["bytes"])
        case "die":
            os._exit(3)
        case "child":
            return subprocess.run([sys.executable, "-c", _CHILD], capture_output=True, check=True).stdout
    return value


_CHILD = """
import os, signal
print(os.environ.get("LD_PRELOAD"), os.environ.get("PYTHONPATH"), signal.pthread_sigmask(signal.SIG_BLOCK, []))
"""


def _order(metadata: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    order: dict[str, Any] = json.loads(dict(metadata).get("x-do", '{"do": "echo"}'))
    return order


def rpc(service: Service) -> Rpc:
    """The service as a server takes it. Registers its descriptor, so that reflection finds it."""

    def add(server: Any) -> None:
        handlers = {}
        for name, kinds in METHODS.items():
            kind = "_".join("stream" if streams else "unary" for streams in kinds)
            make: Callable[..., Any] = getattr(grpc, f"{kind}_rpc_method_handler")
            handlers[name] = make(getattr(service, name), BytesValue.FromString, BytesValue.SerializeToString)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(NAME, handlers),))
        server.add_registered_method_handlers(NAME, handlers)

    return Rpc(_descriptor(), add)


def fast_methods(service: Service) -> dict[str, FastHandler]:
    return {path("Short"): service.short, path("Tasked"): service.awaited}


def _descriptor() -> Any:
    package, _, service = NAME.rpartition(".")
    file = descriptor_pb2.FileDescriptorProto(name="fronts.proto", package=package, syntax="proto3")
    file.dependency.append("google/protobuf/wrappers.proto")
    described = file.service.add(name=service)
    kind = ".google.protobuf.BytesValue"
    for name, (asks, answers) in METHODS.items():
        described.method.add(
            name=name, input_type=kind, output_type=kind, client_streaming=asks, server_streaming=answers
        )
    pool = descriptor_pool.Default()
    pool.AddSerializedFile(file.SerializeToString())
    return pool.FindServiceByName(NAME)
