"""Submit on the short way: no task, no coroutine; a job is a future in the group that is written next.

body ──parsed──> intake ──durable──> answer
"""

from __future__ import annotations

import asyncio
from functools import partial

from google.protobuf.message import DecodeError
from opentelemetry import propagate

from mesh.asgi.exchange import Exchange
from mesh.asgi.framing import PREFIX_BYTES
from mesh.interceptors import malformed
from services.ingest.intake.intake import Accepted, Intake
from services.ingest.messages import message_of
from services.ingest.tracing import traceparent_of
from shoal.errors import Unavailable
from shoal.ingest.v1 import ingest_pb2 as pb

SUBMIT = "/shoal.ingest.v1.IngestService/Submit"


class ShortSubmit:
    """A mesh.asgi.exchange.ShortHandler for Submit."""

    def __init__(self, intake: Intake) -> None:
        self._intake = intake

    def __call__(self, body: bytes, exchange: Exchange) -> None:
        future = self._intake.begin(_parsed(body), _trace(exchange))
        # A caller that has gone does not want its job written, if that has not begun.
        exchange.on_end = future.cancel  # type: ignore[assignment] # What it returns is nobody's.
        future.add_done_callback(partial(_answer, exchange))


def _trace(exchange: Exchange) -> str:
    """The caller's trace, if it is in one: the short way makes no span of its own."""
    if (parent := exchange.headers.get(b"traceparent")) is None:
        return ""
    return traceparent_of(propagate.extract({"traceparent": parent.decode("latin-1")}))


def _answer(exchange: Exchange, future: asyncio.Future[Accepted]) -> None:
    if future.cancelled():
        exchange.refuse(Unavailable("this instance is stopping: another one takes it"))
    elif (error := future.exception()) is not None:
        exchange.refuse(error)
    else:
        accepted = future.result()
        answer = pb.SubmitResponse(job=message_of(accepted.job), existed=accepted.existed).SerializeToString()
        exchange.reply((answer,), len(answer))


def _parsed(body: bytes) -> pb.SubmitRequest:
    try:
        return pb.SubmitRequest.FromString(body[PREFIX_BYTES:])
    except DecodeError as err:
        raise malformed(len(body) - PREFIX_BYTES, err) from err
