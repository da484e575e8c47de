"""Jobs over REST: an inference that is to respond later (RFC 7240), and the watch of a job as JSON.

    POST /v2/models/M/infer, Prefer: respond-async ──gateway──> Submit ──> 202, Location: /shoal/v1/jobs/ID

Submit decides as over gRPC. The gateway chooses by the header, after it has allowed ModelInfer; Submit is allowed here.
"""

from __future__ import annotations

from dataclasses import replace

from mesh.rest.app import RestApp
from mesh.rest.call import Reply, RestCall, header_length, json_reply
from mesh.rest.handlers import unary
from mesh.rest.infer_request import Wanted, read
from mesh.rest.json_streams import transcoded
from mesh.rest.json_text import JSON_BYTES, as_object
from mesh.rpc.grpc_app import GrpcApp
from services.ingest.limits import REQUEST_BYTES
from shoal.access.rpc_groups import SUBMIT
from shoal.errors import InvalidArgument
from shoal.ingest.v1 import ingest_pb2 as pb

KEY_HEADER = b"idempotency-key"
"""Header with the idempotency key of a job; quotes around it are no part of the key."""

BODY_BYTES = REQUEST_BYTES + JSON_BYTES
"""Body of an inference that becomes a job: its tensors, and JSON before them."""


def rest_app(grpc: GrpcApp) -> RestApp:
    """Return the application of requests that are not gRPC."""
    return RestApp(
        grpc,
        {"infer": _submit},
        rpcs={"infer": SUBMIT},
        streams={"watch job": pb.WatchJobRequest},
        message_bytes=BODY_BYTES,
    )


async def _submit(call: RestCall) -> Reply:
    body = await call.body()
    length = header_length(call, len(body))
    if length == 0:
        raise InvalidArgument("a job needs the JSON of its inputs: no model is asked for its only input here")
    submit = pb.SubmitRequest(idempotency_key=_key(call))
    end = len(body) if length is None else length
    async with call.parsed(body[:end]) as document:
        # The form of the outputs is for a response; the result has its own.
        message, raw = await read(as_object(document, "the request"), memoryview(body)[end:], call.target, Wanted())
    # The message, and its serialised form in the job.
    call.hold(2 * sum(map(len, raw)))
    submit.request.CopyFrom(message)
    submit.request.raw_input_contents.extend(map(bytes, raw))
    response = await unary(call, SUBMIT, submit)
    address = f"/shoal/v1/jobs/{response.job.id}".encode()
    fields = ((b"location", address), (b"preference-applied", b"respond-async"))
    return replace(json_reply(transcoded(response), 202), fields=fields)


def _key(call: RestCall) -> str:
    text = (call.header(KEY_HEADER) or b"").decode("latin-1")
    if len(text) > 1 and text[0] == text[-1] == '"':
        text = text[1:-1]
    if not text.isascii() or not text.isprintable():
        raise InvalidArgument("Idempotency-Key: expected printable ASCII characters")
    return text
