"""Calls that a model makes of another model of this server ("business logic scripting").

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

from services.infer.model_process.channel import Message
from services.infer.model_process.payload import Tensor, TensorPart
from services.infer.model_process.request_info import SEQUENCE_END, SEQUENCE_START
from shoal.errors import ShoalError
from shoal.inference.v2 import inference_pb2 as pb
from shoal.oip.datatypes import BY_NAME
from shoal.oip.tensors import to_raw

log = logging.getLogger(__name__)

Reply = Callable[[dict[str, Any], Sequence[TensorPart]], None]

_TEXT = 1000
_FIELDS = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}


class Core(Protocol):
    """What answers: the InferenceServer."""

    async def infer(self, request: pb.ModelInferRequest, deadline: float = ...) -> pb.ModelInferResponse: ...


class InnerCalls:
    """An `isolation.session.InnerCall`. Refuses until it is bound to a core."""

    def __init__(self) -> None:
        self._core: Core | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def bind(self, core: Core) -> None:
        """From now on `core` answers, on the running loop."""
        self._core, self._loop = core, asyncio.get_running_loop()

    def __call__(self, message: Message, reply: Reply) -> None:
        """Begins with a call, from any thread; `reply` gets its answer, on another one."""
        if self._core is None:
            reply({"error": "the server is not ready for calls of models", "code": "UNAVAILABLE"}, ())
            return
        try:
            self._loop.call_soon_threadsafe(self._begin, self._core, message, reply)
        except RuntimeError:
            pass  # The server is on its way out, and the process with it.

    def _begin(self, core: Core, message: Message, reply: Reply) -> None:
        task = asyncio.create_task(self._run(core, message, reply))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, core: Core, message: Message, reply: Reply) -> None:
        parts: Sequence[TensorPart] = ()
        try:
            timeout_us = message.header.get("timeout_us") or 0
            deadline = time.monotonic() + timeout_us / 1e6 if timeout_us else math.inf
            response = await core.infer(_request(message), deadline)
            header: dict[str, Any] = {}
            parts = [
                _part(given, raw) for given, raw in zip(response.outputs, response.raw_output_contents, strict=True)
            ]
        except ShoalError as err:
            header = {"error": err.message[:_TEXT], "code": err.code.name}
        except (TypeError, ValueError, KeyError) as err:
            header = {"error": f"the request cannot be read: {err}"[:_TEXT], "code": "INVALID_ARGUMENT"}
        except Exception:
            log.exception("unexpected error in a call that a model made")
            header = {"error": "internal error: the log of the service has the cause", "code": "INTERNAL"}
        await asyncio.to_thread(reply, header, parts)  # The model's process may be slow to read.


def _request(message: Message) -> pb.ModelInferRequest:
    said = message.header
    asked = pb.ModelInferRequest(model_name=said["model"], model_version=said["version"], id=said["request_id"])
    for name, value in said["parameters"].items():
        setattr(asked.parameters[name], _FIELDS[type(value)], value)
    if said.get("sequence_id"):
        _put_sequence(asked, said["sequence_id"], int(said["flags"]))
    for name, datatype, array in message.tensors:
        asked.inputs.add(name=name, datatype=datatype, shape=array.shape)
        asked.raw_input_contents.append(to_raw(array, BY_NAME[datatype]))
    for name in said["outputs"]:
        asked.outputs.add(name=name)
    return asked


def _put_sequence(asked: pb.ModelInferRequest, id: int | str, flags: int) -> None:
    if isinstance(id, str):
        asked.parameters["sequence_id"].string_param = id
    else:
        asked.parameters["sequence_id"].uint64_param = id
    asked.parameters["sequence_start"].bool_param = bool(flags & SEQUENCE_START)
    asked.parameters["sequence_end"].bool_param = bool(flags & SEQUENCE_END)


def _part(given: pb.ModelInferResponse.InferOutputTensor, raw: bytes) -> TensorPart:
    array: Tensor = np.frombuffer(raw, np.uint8)  # BYTES, too: they are laid out as on the wire.
    return TensorPart(given.name, given.datatype, tuple(given.shape), (array,), len(raw))
