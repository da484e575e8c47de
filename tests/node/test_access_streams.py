"""Open streams of a node with a policy, in every form: gRPC, NDJSON, server-sent events and gRPC-Web.

They end with their key or grant, whether or not their client reads, and nothing else ends them.
"""

from __future__ import annotations

import base64
import http.client
import json
import re
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from shoal.errors import Code
from shoal.inference.v2 import inference_pb2 as pb
from shoal.inference.v2 import inference_pb2_grpc
from shoal.ingest.v1 import ingest_pb2
from tests.access.policies import issuer, signed
from tests.http2 import framed
from tests.infer.conftest import request
from tests.node.conftest import IN_PROCESS
from tests.node.test_access_attacks import (
    GRANTS,
    OPEN,
    PAGE,
    PATIENCE_S,
    REVOKED,
    WEB,
    WEB_TEXT,
    NodeWorld,
    X,
    node_world,  # noqa: F401 - a fixture.
    rest,
)

pytestmark = [pytest.mark.timeout(300)]

WATCH_JOB = "/shoal.ingest.v1.IngestService/WatchJob"
NDJSON, EVENTS = "application/x-ndjson", "text/event-stream"
WEB_FORMS = (WEB, WEB_TEXT)
FORMS = (NDJSON, EVENTS, *WEB_FORMS)
EACH = 13
"""Streams of each of five forms: 65."""

ENDLESS = """
import numpy as np

class Model:
    inputs = {"x": ("FP32", [-1, 4])}
    outputs = {"y": ("FP32", [-1, 4096])}

    def predict(self, batch):
        number = 0
        while True:
            number += 1
            yield {"y": np.full((1, 4096), number, np.float32)}
"""


class Stream:
    """One streamed response over HTTP/1.1, on a connection of its own."""

    def __init__(self, world: NodeWorld, form: str, token: str, method: str, path: str, body: bytes | None) -> None:
        self.form = form
        headers = {"authorization": f"Bearer {token}", "accept": form}
        headers["content-type"] = form if form in WEB_FORMS else "application/json"
        self._connection = http.client.HTTPConnection(world.address, timeout=2 * PATIENCE_S)
        self._connection.request(method, path, body, headers)
        self.response = self._connection.getresponse()
        assert self.response.status == 200, self.response.read()
        self._held = b""

    def close(self) -> None:
        self._connection.close()

    def record(self) -> Any:
        """Return the next record: a job's state, or `(code, text)` of the error that ends the stream."""
        if self.form in WEB_FORMS:
            return self._frame()
        while line := self.response.readline():
            text = line.strip().removeprefix(b"data: ")
            if text and not text.startswith(b":"):
                found = json.loads(text)
                error = found.get("error")
                return (error["code"], error["message"]) if error else found["job"]["state"]
        return None

    def _frame(self) -> Any:
        head = self._bytes(5)
        if not head:
            return None
        data = self._bytes(int.from_bytes(head[1:], "big"))
        if not head[0] & 0x80:
            return ingest_pb2.JobState.Name(ingest_pb2.WatchJobResponse.FromString(data).job.state)
        trailers = dict(line.split(":", 1) for line in data.decode().strip().split("\r\n"))
        code = int(trailers["grpc-status"])
        return (code, urllib.request.unquote(trailers.get("grpc-message", ""))) if code else None

    def _bytes(self, size: int) -> bytes:
        """Return so many bytes of the body; none at its end."""
        while len(self._held) < size:
            if self.form == WEB_TEXT:
                # Each part of the text has its own padding, and comes in whole groups of four characters.
                piece = self.response.read1(1 << 16)
                while len(piece) % 4:
                    piece += self.response.read(1)
                self._held += b"".join(base64.b64decode(part) for part in re.findall(rb"[^=]+=*", piece))
            else:
                piece = self.response.read1(1 << 16)
                self._held += piece
            if not piece:
                assert not self._held
                return b""
        found, self._held = self._held[:size], self._held[size:]
        return found


@pytest.fixture
def world(node_world: NodeWorld) -> NodeWorld:  # noqa: F811
    return node_world


@contextmanager
def waiting_job(world: NodeWorld) -> Iterator[str]:
    """Yield the id of a job of acme that waits for an hour; it is cancelled in the end."""
    tensor = {"name": "x", "shape": [1, 4], "datatype": "FP32", "contents": {"fp32_contents": [1, 2, 3, 4]}}
    body = {"request": {"model_name": OPEN, "inputs": [tensor]}, "delay": "3600s"}
    status, found = rest(world, "POST", "/shoal/v1/jobs", world.key().text, body, content_type="application/json")
    assert status == 200, found
    try:
        yield found["job"]["id"]
    finally:
        cancel(world, found["job"]["id"])


def cancel(world: NodeWorld, job: str) -> None:
    assert rest(world, "POST", f"/shoal/v1/jobs/{job}:cancel", world.key().text)[0] == 200


def watched(world: NodeWorld, job: str, form: str, token: str) -> Stream:
    """Return a watch of a job whose first record has been read."""
    if form in WEB_FORMS:
        body = framed(ingest_pb2.WatchJobRequest(id=job).SerializeToString())
        stream = Stream(world, form, token, "POST", WATCH_JOB, base64.b64encode(body) if form == WEB_TEXT else body)
    else:
        stream = Stream(world, form, token, "GET", f"/shoal/v1/jobs/{job}:watch", None)
    assert stream.record() == "JOB_STATE_QUEUED"
    return stream


def test_changes_of_policy_keys_and_signers_end_no_stream_of_any_form(world: NodeWorld) -> None:
    token = world.key().text
    bearer = (("authorization", f"Bearer {token}"),)
    changed = threading.Event()

    def messages() -> Iterator[pb.ModelInferRequest]:
        yield request(OPEN, x=X)
        changed.wait(4 * PATIENCE_S)
        yield request(OPEN, x=X)

    with ExitStack() as stack, world.client() as client:
        job = stack.enter_context(waiting_job(world))
        stack.callback(changed.set)
        channel = stack.enter_context(world.channel())
        infer = inference_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer
        running = [infer(messages(), metadata=bearer, timeout=600) for _ in range(EACH)]
        watch = channel.unary_stream(WATCH_JOB, response_deserializer=ingest_pb2.WatchJobResponse.FromString)
        asked = ingest_pb2.WatchJobRequest(id=job).SerializeToString()
        watching = [watch(asked, metadata=bearer, timeout=600) for _ in range(EACH)]
        for stream in (*running, *watching):
            next(stream)
        streams = [watched(world, job, form, token) for form in (NDJSON, EVENTS, WEB) for _ in range(EACH)]
        for one in streams:
            stack.callback(one.close)

        limits = [{"name": "wide", "requests_per_second": 1e6, "requests_in_flight": 10_000}]
        denied = [*GRANTS, {"name": "none", "tenants": ["globex"], "deny": ["infer"], "models": ["*"]}]
        with world.with_policy(grants=denied, revoked=[REVOKED, "k-x"], cors={"origins": [PAGE]}, limits=limits):
            world.until(lambda: world.infer(world.key("globex").text) != "OK")
            made = client.access.create_key(tenant="acme", role="user")
            world.secrets.add(made.key)
            client.access.revoke_key(made.info.id, timeout=4 * PATIENCE_S)
            client.access.rotate_signer()
        changed.set()
        cancel(world, job)
        assert [len(list(stream)) for stream in running] == [1] * EACH
        assert [[one.job.state for one in stream] for stream in watching] == [[ingest_pb2.JOB_STATE_CANCELLED]] * EACH
        assert {(one.record(), one.record()) for one in streams} == {("JOB_STATE_CANCELLED", None)}


@pytest.mark.parametrize("cause", ["revoked", "expired", "grant"])
def test_streams_over_rest_and_grpc_web_end_with_their_key_and_no_others_do(world: NodeWorld, cause: str) -> None:
    foreign = world.document["issuers"][-1]
    exact = {"issuers": [issuer(world.signer, clock_skew_s=1), foreign]} if cause == "expired" else {}
    with ExitStack() as stack:
        job = stack.enter_context(waiting_job(world))
        stack.enter_context(world.with_policy(**exact))
        made = world.key(subject="eve")
        token = made.text
        if cause == "expired":
            token = signed(world.signer, exp=int(time.time()) + 15)
            world.secrets.add(token)
        other = watched(world, job, NDJSON, world.key().text)
        streams = [watched(world, job, form, token) for form in FORMS]
        for one in (other, *streams):
            stack.callback(one.close)
        if cause == "revoked":
            with world.client() as client:
                client.access.revoke_key(made.id, timeout=4 * PATIENCE_S)
        if cause == "grant":
            world.set_policy(grants=[*GRANTS, {"name": "eve", "subjects": ["eve"], "deny": ["jobs"], "models": ["*"]}])
        code, text = {
            "revoked": (Code.PERMISSION_DENIED, f"the key {made.id} is revoked"),
            "expired": (Code.UNAUTHENTICATED, "the token has expired"),
            "grant": (Code.PERMISSION_DENIED, "grant 'eve' denies jobs"),
        }[cause]
        for one in streams:
            found = one.record()
            assert found[0] == code, (one.form, found)
            assert text in found[1]
            assert one.record() is None
        cancel(world, job)
        assert (other.record(), other.record()) == ("JOB_STATE_CANCELLED", None)


@pytest.fixture(scope="module")
def endless(node_world: NodeWorld) -> str:  # noqa: F811
    """A model whose response never ends."""
    folder = node_world.folder / "endless"
    (folder / "1").mkdir(parents=True)
    (folder / "1" / "model.py").write_text(ENDLESS)
    (folder / "config.pbtxt").write_text("model_transaction_policy { decoupled: true }\n" + IN_PROCESS)
    with node_world.client() as client:
        assert client.models.push(folder)[0].ready
    return "endless"


def generated(world: NodeWorld, token: str) -> Stream:
    return Stream(world, EVENTS, token, "POST", "/v2/models/endless/generate_stream", b'{"x": [1, 2, 3, 4]}')


@pytest.mark.parametrize("read", [0, 1, 100])
def test_a_client_that_leaves_a_stream_ends_the_run_of_its_model(world: NodeWorld, endless: str, read: int) -> None:
    # One request runs at a time: if it went on, the next one would have no response.
    for _ in range(3):
        one = generated(world, world.key().text)
        for _ in range(read):
            assert one.response.readline()
        one.close()


def test_a_stream_whose_client_does_not_read_ends_with_its_key(world: NodeWorld, endless: str) -> None:
    made = world.key()
    one = generated(world, made.text)
    try:
        assert one.response.readline().startswith(b"data: ")
        with world.client() as client:
            client.access.revoke_key(made.id, timeout=4 * PATIENCE_S)
        generated(world, world.key().text).close()
        # What was sent before the revocation is left, and then the reason.
        assert f"the key {made.id} is revoked" in one.response.read()[-400:].decode()
    finally:
        one.close()
