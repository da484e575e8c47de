"""Inner calls: calls that a model makes of another model of this server (Triton's "business logic scripting").

model process ──"call"──> session ──> event loop: core.infer ──> "answer" ──> model process
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from mesh.h2.memory_account import MemoryAccount, Share
from mesh.rpc.framing import no_memory
from services.infer.model_process.channel import Message
from services.infer.model_process.payload import Tensor, TensorPart
from services.infer.model_process.request_info import SEQUENCE_END, SEQUENCE_START
from services.infer.requests.request_memory import UNCOUNTED, RequestMemory, RequestPart
from shoal.errors import ShoalError
from shoal.inference.v2 import inference_pb2 as pb
from shoal.oip.datatypes import BY_NAME
from shoal.oip.tensors import to_raw

log = logging.getLogger(__name__)

Reply = Callable[[dict[str, Any], Sequence[TensorPart]], None]

_MAX_ERROR_CHARACTERS = 1000
_FIELDS = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}


class Core(Protocol):
    """The InferenceServer, as far as inner calls need it."""

    async def infer(
        self,
        request: pb.ModelInferRequest,
        deadline: float = ...,
        *,
        memory: RequestMemory = ...,
        message_bytes: int = ...,
    ) -> pb.ModelInferResponse: ...


# Memory of a call beside its tensors.
_CALL_BYTES = 8 << 10


class _SharedMemory:
    """Memory of all inner calls: one share of the account of requests."""

    def __init__(self, share: Share) -> None:
        self._share = share

    def hold(self, size: int) -> None:
        if not self._share.has_room(size):
            raise no_memory()
        self._share.add(size)

    def release(self, size: int) -> None:
        self._share.remove(size)


class InnerCalls:
    """A `session.RunInnerCall` that runs calls on a core; rejects calls until `bind`."""

    def __init__(self) -> None:
        self._core: Core | None = None
        self._memory: RequestMemory = UNCOUNTED
        self._tasks: set[asyncio.Task[None]] = set()

    def bind(self, core: Core, account: MemoryAccount | None = None) -> None:
        """Run all later calls on `core`, in the running event loop, and count them in the account of requests."""
        self._core, self._loop = core, asyncio.get_running_loop()
        if account is not None:
            self._memory = _SharedMemory(account.share())

    def __call__(self, message: Message, reply: Reply) -> None:
        """Start a call, from any thread; `reply` gets the response on another thread."""
        if self._core is None:
            reply({"error": "the server is not ready for calls of models", "code": "UNAVAILABLE"}, ())
            return
        try:
            self._loop.call_soon_threadsafe(self._start, self._core, message, reply)
        # The loop is closed: the server is shutting down, and the model process with it.
        except RuntimeError:
            pass

    def _start(self, core: Core, message: Message, reply: Reply) -> None:
        task = asyncio.create_task(self._run(core, message, reply))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, core: Core, message: Message, reply: Reply) -> None:
        memory = RequestPart(self._memory, message.tensor_bytes)
        try:
            header, parts = await self._outcome(core, message, memory)
            # On a thread: the model process may be slow to read.
            await asyncio.to_thread(reply, header, parts)
        finally:
            memory.close()

    async def _outcome(
        self, core: Core, message: Message, memory: RequestPart
    ) -> tuple[dict[str, Any], Sequence[TensorPart]]:
        parts: Sequence[TensorPart] = ()
        size = memory.message_bytes
        try:
            # The tensors, and their copy in the request.
            memory.hold(_CALL_BYTES + 2 * size)
            timeout_us = message.header.get("timeout_us") or 0
            deadline = time.monotonic() + timeout_us / 1e6 if timeout_us else math.inf
            response = await core.infer(_request(message), deadline, memory=memory, message_bytes=size)
            header: dict[str, Any] = {}
            parts = [
                _part(output, raw) for output, raw in zip(response.outputs, response.raw_output_contents, strict=True)
            ]
        except ShoalError as err:
            header = {"error": err.message[:_MAX_ERROR_CHARACTERS], "code": err.code.name}
        except (TypeError, ValueError, KeyError) as err:
            text = f"the request cannot be read: {err}"[:_MAX_ERROR_CHARACTERS]
            header = {"error": text, "code": "INVALID_ARGUMENT"}
        except Exception:
            log.exception("unexpected error in a call that a model made")
            header = {"error": "internal error: the log of the service has the cause", "code": "INTERNAL"}
        return header, parts


def _request(message: Message) -> pb.ModelInferRequest:
    header = message.header
    request = pb.ModelInferRequest(model_name=header["model"], model_version=header["version"], id=header["request_id"])
    for name, value in header["parameters"].items():
        setattr(request.parameters[name], _FIELDS[type(value)], value)
    if header.get("sequence_id"):
        _set_sequence(request, header["sequence_id"], int(header["flags"]))
    for name, datatype, array in message.tensors:
        request.inputs.add(name=name, datatype=datatype, shape=array.shape)
        request.raw_input_contents.append(to_raw(array, BY_NAME[datatype]))
    for name in header["outputs"]:
        request.outputs.add(name=name)
    return request


def _set_sequence(request: pb.ModelInferRequest, id: int | str, flags: int) -> None:
    if isinstance(id, str):
        request.parameters["sequence_id"].string_param = id
    else:
        request.parameters["sequence_id"].uint64_param = id
    request.parameters["sequence_start"].bool_param = bool(flags & SEQUENCE_START)
    request.parameters["sequence_end"].bool_param = bool(flags & SEQUENCE_END)


def _part(output: pb.ModelInferResponse.InferOutputTensor, raw: bytes) -> TensorPart:
    # BYTES, too, have the layout of the wire here.
    array: Tensor = np.frombuffer(raw, np.uint8)
    return TensorPart(output.name, output.datatype, tuple(output.shape), (array,), len(raw))
