"""Submit on the fast path: without a task or a coroutine; a job is a future in the group that is written next.

body ──parsed──> intake ──durable──> response
"""

from __future__ import annotations

import asyncio
import time
from functools import partial

from mesh.rpc.fast_call import FastCall
from mesh.rpc.framing import PREFIX_BYTES
from mesh.rpc.parsing import TURN_BYTES, Parser, parse_in_turn
from mesh.rpc.tenant_scope import Scopes
from services.ingest.intake.intake import Accepted, Intake
from services.ingest.messages import message_of
from shoal.errors import Unavailable
from shoal.ingest.v1 import ingest_pb2 as pb

_PARSER = Parser(pb.SubmitRequest.FromString)


class FastSubmit:
    """FastHandler (mesh.rpc.fast_call) of Submit."""

    def __init__(self, intake: Intake, scopes: Scopes) -> None:
        self._intake = intake
        self._scopes = scopes
        self._tasks: set[asyncio.Task[None]] = set()

    def __call__(self, body: bytes, call: FastCall) -> None:
        if len(body) <= TURN_BYTES:
            self._begin(_PARSER(body, PREFIX_BYTES), call)
            return
        task = asyncio.create_task(self._begin_in_turn(body, call))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        call.on_end = task.cancel  # type: ignore[assignment]
        call.is_task = True

    async def _begin_in_turn(self, body: bytes, call: FastCall) -> None:
        try:
            self._begin(await parse_in_turn(call.heavy, call.tenant, _PARSER, body, PREFIX_BYTES), call)
        except asyncio.CancelledError:
            call.refuse(_stopping())
            raise
        except BaseException as err:
            call.refuse(err)

    def _begin(self, request: pb.SubmitRequest, call: FastCall) -> None:
        scope = self._scopes.of_headers(call.headers, "Submit")
        future = self._intake.begin(request, call.traceparent, scope)
        # When the caller disconnects before its write begins, the job is not written. The boolean that `cancel` returns
        # is not used.
        call.on_end = future.cancel  # type: ignore[assignment]
        future.add_done_callback(partial(_reply, call, time.monotonic()))


def _reply(call: FastCall, began: float, future: asyncio.Future[Accepted]) -> None:
    if future.cancelled():
        call.refuse(_stopping())
    elif (error := future.exception()) is not None:
        call.refuse(error, time.monotonic() - began)
    else:
        accepted = future.result()
        message = pb.SubmitResponse(job=message_of(accepted.job), existed=accepted.existed).SerializeToString()
        call.reply_after((message,), len(message), time.monotonic() - began)


def _stopping() -> Unavailable:
    return Unavailable("this instance is stopping: retry at another instance")
