"""Submit on the fast path: without a task or a coroutine; a job is a future in the group that is written next.

body ──parsed──> intake ──durable──> response
"""

from __future__ import annotations

import asyncio
from functools import partial

from google.protobuf.message import DecodeError

from mesh.rpc.fast_call import FastCall
from mesh.rpc.framing import PREFIX_BYTES
from mesh.rpc.interceptors import malformed
from services.ingest.intake.intake import Accepted, Intake
from services.ingest.messages import message_of
from shoal.errors import Unavailable
from shoal.ingest.v1 import ingest_pb2 as pb

SUBMIT = "/shoal.ingest.v1.IngestService/Submit"


class FastSubmit:
    """FastHandler (mesh.rpc.fast_call) of Submit."""

    def __init__(self, intake: Intake) -> None:
        self._intake = intake

    def __call__(self, body: bytes, call: FastCall) -> None:
        future = self._intake.begin(_parsed(body), call.traceparent)
        # When the caller disconnects before its write begins, the job is not written. The boolean that `cancel` returns
        # is not used.
        call.on_end = future.cancel  # type: ignore[assignment]
        future.add_done_callback(partial(_reply, call))


def _reply(call: FastCall, future: asyncio.Future[Accepted]) -> None:
    if future.cancelled():
        call.refuse(Unavailable("this instance is stopping: retry at another instance"))
    elif (error := future.exception()) is not None:
        call.refuse(error)
    else:
        accepted = future.result()
        message = pb.SubmitResponse(job=message_of(accepted.job), existed=accepted.existed).SerializeToString()
        call.reply((message,), len(message))


def _parsed(body: bytes) -> pb.SubmitRequest:
    try:
        return pb.SubmitRequest.FromString(body[PREFIX_BYTES:])
    except DecodeError as err:
        raise malformed(len(body) - PREFIX_BYTES, err) from err
