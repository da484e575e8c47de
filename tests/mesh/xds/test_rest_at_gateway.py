"""REST through a real Envoy to services in this process: inferences that become jobs, and streams as JSON with curl."""

from __future__ import annotations

import asyncio
import gzip
import json
import shutil
import subprocess
from typing import Any

import grpc
import pytest

from mesh.xds.extensions import gateway_access
from services.coord.traffic import PUBLIC
from services.ingest.rest import BODY_BYTES
from shoal.access import tokens
from shoal.inference.v2 import inference_pb2, inference_pb2_grpc
from shoal.ingest.v1 import ingest_pb2
from shoal.store.v1 import store_pb2
from tests.access.policies import key, policy
from tests.breakable import until
from tests.mesh.xds.test_json_calls import JOB, STEPS, Gateway, cpu_seconds, gateway, running

__all__ = ["gateway"]

pytestmark = [pytest.mark.envoy, pytest.mark.asyncio(loop_scope="module")]

INFER = "/v2/models/a%2Fb/infer"
INPUT = {"name": "x", "shape": [1, 2], "datatype": "FP32"}
ASYNC = {"prefer": "respond-async"}


def curl(gateway: Gateway, path: str, *arguments: str) -> tuple[int, str, str]:
    """Return the exit status of curl, the content type, and the body as it has arrived."""
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    command = ["curl", "-N", "--silent", "--noproxy", "*", "--max-time", "30", "--write-out", "\n%{content_type}"]
    done = subprocess.run(
        [*command, *arguments, f"http://{gateway.envoy.gateway}{path}"], capture_output=True, text=True, check=False
    )
    text, _, kind = done.stdout.rpartition("\n")
    return done.returncode, kind, text


async def test_an_inference_that_prefers_it_is_a_job(gateway: Gateway) -> None:
    body = {"id": "7", "parameters": {"p": 1}, "inputs": [{**INPUT, "data": [1, 2.5]}]}
    for prefer in ("respond-async", "handling=lenient, Respond-Async;x, wait=10"):
        status, found, headers = await gateway.call(
            "POST", INFER, body, kind=None, prefer=prefer, idempotency_key='"k 1"'
        )
        assert (status, found["job"]["id"], found["existed"]) == (202, JOB, False)
        assert (headers["location"], headers["preference-applied"]) == (f"/shoal/v1/jobs/{JOB}", "respond-async")
        wanted = ingest_pb2.SubmitRequest(idempotency_key="k 1")
        wanted.request.MergeFrom(
            ingest_pb2.SubmitRequest(
                request={
                    "model_name": "a/b",
                    "id": "7",
                    "parameters": {"p": {"int64_param": 1}},
                    "inputs": [INPUT],
                    "raw_input_contents": [b"\x00\x00\x80?\x00\x00 @"],
                }
            ).request
        )
        assert gateway.ingest.requests[-1] == wanted
    head = json.dumps({"inputs": [{**INPUT, "parameters": {"binary_data_size": 8}}]}).encode()
    status, _, _ = await gateway.call(
        "POST",
        "/v2/models/m/versions/3/infer",
        head + b"12345678",
        **ASYNC,
        inference_header_content_length=str(len(head)),
        idempotency_key="bare",
    )
    made = gateway.ingest.requests[-1]
    assert isinstance(made, ingest_pb2.SubmitRequest)
    assert (status, made.request.model_version, made.idempotency_key) == (202, "3", "bare")
    assert list(made.request.raw_input_contents) == [b"12345678"]


async def test_without_the_preference_and_at_other_paths_it_is_none(gateway: Gateway) -> None:
    before = len(gateway.ingest.requests)
    for path, prefer in (
        (INFER, "wait=10"),
        (INFER, 'x="a, respond-async, b"'),
        (INFER, "respond-asynchronous"),
        ("/v2/models/m/generate", "respond-async"),
        ("/v2/models/m/infer/x", "respond-async"),
    ):
        status, _ = await gateway.text("POST", path, {"inputs": []}, prefer=prefer)
        # The server of inference is gRPC's alone here.
        assert status == 415, path
    assert (await gateway.text("GET", INFER, prefer="respond-async"))[0] == 415
    assert len(gateway.ingest.requests) == before


async def test_a_path_that_nobody_serves_is_refused_with_a_text(gateway: Gateway) -> None:
    for path in ("/", "/metrics", "/V2/models/m", "//v2", "/v1/chat/completions", "/api.Service/Call"):
        assert await gateway.text("POST", path, {}) == (404, "there is no such call: check the path and the method")


async def test_a_request_that_is_no_inference_is_refused_in_the_form_of_its_protocol(gateway: Gateway) -> None:
    before = len(gateway.ingest.requests)
    for body, more, wanted, words in (
        (b"{", {}, 400, "failed to parse the request JSON buffer"),
        ({"inputs": [{**INPUT, "data": [1]}]}, {}, 400, "got 1 values"),
        ({}, {}, 400, "inputs"),
        (b"12345678", {"inference_header_content_length": "0"}, 400, "a job needs the JSON of its inputs"),
        ({"inputs": []}, {"idempotency_key": "\xe4"}, 400, "Idempotency-Key"),
        (b"x" * (BODY_BYTES + 1), {}, 413, f"at most {BODY_BYTES} bytes"),
        (b"[" * (9 << 20), {}, 400, "bytes, at most"),
    ):
        status, found, _ = await gateway.call("POST", INFER, body, **ASYNC, **more)
        assert (status, found.keys()) == (wanted, {"error"})
        assert words in found["error"]
    assert len(gateway.ingest.requests) == before


async def test_curl_reads_streams_and_an_error_at_the_end(gateway: Gateway) -> None:
    queued = {"id": JOB, "state": "JOB_STATE_QUEUED"}
    code, kind, text = await asyncio.to_thread(curl, gateway, f"/shoal/v1/jobs/{JOB}:watch")
    first, last = (json.loads(line) for line in text.splitlines())
    assert (code, kind) == (0, "application/x-ndjson")
    assert {name: first["job"][name] for name in queued} == queued
    assert last == {"error": {"code": 14, "message": "the job database is away", "details": []}}
    code, kind, text = await asyncio.to_thread(
        curl, gateway, "/shoal/v1/results:stream?filter.model_name=m", "-H", "accept: text/event-stream", "--compressed"
    )
    assert (code, kind) == (0, "text/event-stream")
    first, last = (json.loads(event.removeprefix("data: ")) for event in text.rstrip().split("\n\n"))
    assert (first["cursor"], last["complete"], last["results"][0]["job_id"]) == ("c", True, JOB)
    assert gateway.store.requests[-1] == store_pb2.StreamResultsRequest(filter={"model_name": "m"})
    assert await gateway.error("GET", "/shoal/v1/jobs/none:watch") == (404, 5, "no job 'none'")
    status, code, message = await gateway.error("GET", "/shoal/v1/results:stream?modelname=m")
    assert (status, code, "no field 'modelname'" in message) == (400, 3, True)
    assert (await gateway.error("POST", "/shoal/v1/results:stream"))[:2] == (404, 5)


async def test_a_client_that_leaves_ends_the_watch_behind_the_gateway(gateway: Gateway) -> None:
    reader, writer = await asyncio.open_connection(*gateway.envoy.gateway.split(":"))
    writer.write(b"GET /shoal/v1/jobs/endless:watch HTTP/1.1\r\nhost: localhost\r\n\r\n")
    async with asyncio.timeout(30):
        await reader.readuntil(b"JOB_STATE_QUEUED")
    assert gateway.ingest.watches == 1
    writer.close()
    await until(lambda: gateway.ingest.watches == 0, "the watch ends")


async def test_streams_and_jobs_need_the_groups_of_their_rpcs(tmp_path: Any) -> None:
    signer = tokens.create_signer(tmp_path / "ours")
    async with running(gateway_access(policy(signer), [*PUBLIC])) as guarded:
        streams = (f"/shoal/v1/jobs/{JOB}:watch", "/shoal/v1/results:stream")
        user, viewer = (f"Bearer {key(signer, role=role).text}" for role in ("user", "viewer"))
        for path in streams:
            assert (await guarded.text("GET", path, authorization=user))[0] == 200
            assert (await guarded.error("GET", path, authorization=viewer))[:2] == (403, 7)
            assert (await guarded.error("GET", path))[:2] == (401, 16)
        status, found, _ = await guarded.call("POST", INFER, {"inputs": []}, authorization=user, **ASYNC)
        assert (status, found["job"]["id"]) == (202, JOB)
        for authorization, wanted in (({"authorization": viewer}, 403), ({}, 401)):
            status, found, _ = await guarded.call("POST", INFER, {"inputs": []}, **authorization, **ASYNC)
            assert (status, found.keys()) == (wanted, {"error"})


IDS = (1, 127, 128, 300, 2**31, 2**45, "a", "x y", "1", "e" * 128)
DECOY = '"sequence_id":999'


async def test_steps_of_a_sequence_go_to_one_replica_over_rest_and_grpc() -> None:
    async with running(sequenced=3) as sequenced:

        async def replica(document: Any, more: bytes = b"", **headers: str) -> int:
            head = json.dumps(document).encode()
            headers = {"inference_header_content_length": str(len(head)), **headers} if more else headers
            path = f"/v2/models/{STEPS}/infer"
            status, found, _ = await sequenced.call("POST", path, head + more, kind=None, **headers)
            assert (status, found["bytes"]) == (200, len(head) + len(more))
            return int(found["replica"])

        seen = set()
        async with grpc.aio.insecure_channel(sequenced.envoy.gateway) as channel:
            stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
            for number in IDS:
                parameters = {"sequence_id": number}
                found = await replica({"parameters": parameters, "inputs": []})
                seen.add(found)
                # A text that looks like the member, and bytes behind the JSON that do.
                for document in (
                    {"id": DECOY, "parameters": parameters},
                    {"inputs": [{"data": [DECOY, "sequence_id"]}], "parameters": {"a": 1, **parameters}},
                ):
                    assert await replica(document) == await replica(document, DECOY.encode() * 9) == found, number
                kind = "int64_param" if isinstance(number, int) else "string_param"
                request = inference_pb2.ModelInferRequest(model_name=STEPS, parameters={"sequence_id": {kind: number}})
                assert int((await stub.ModelInfer(request, timeout=30)).id) == found, number
        assert len(seen) > 1, "they are spread"
        # Without a sequence, or one that cannot be read, each request goes to any replica.
        for document, more in (({}, b""), ({}, DECOY.encode()), ({"id": "x" * (9 << 20)}, b""), ([], b"")):
            assert {await replica(document, more) for _ in range(12)} != {0}
        # A number that no sequence has is not in a header: a long one would end the connection of all callers.
        for size in (21, 300_000):
            body = b'{"parameters": {"sequence_id": %b}}' % (b"1" * size)
            status, found, _ = await sequenced.call("POST", f"/v2/models/{STEPS}/infer", body, kind=None)
            assert (status, found["bytes"]) == (200, len(body))
        # Names without a colon, and spaces, before the member. Its search takes no time of a thread that others miss.
        before = cpu_seconds(sequenced.envoy.pid)
        for text in ("1" * 8_000_000, '"sequence_id", ' * 500_000):
            body = b'{"a": [%b], "sequence_id" \n :\t5}' % text.encode()
            found = {
                (await sequenced.call("POST", f"/v2/models/{STEPS}/infer", body, kind=None))[1]["replica"]
                for _ in range(8)
            }
            assert len(found) == 1
        assert cpu_seconds(sequenced.envoy.pid) - before < 1
        path, body = f"/v2/models/{STEPS}/infer", gzip.compress(b'{"parameters": {"sequence_id": 1}}')
        assert (await sequenced.call("POST", path, body, kind=None, content_encoding="gzip"))[0] == 200
        status, _ = await sequenced.text("POST", path, None)
        assert status == 200, "a request without a body waits for nothing"
