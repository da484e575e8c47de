"""The real Envoy speaks TLS to clients: trusted ones are served, others are refused, a renewal closes nothing.

One Envoy, configured as the one of `shoal serve`, and a small server behind it serve all tests.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import ssl
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2

import shoal
from mesh.process.tasks import end
from shoal.client import RetryPolicy
from shoal.client.transport import methods
from shoal.client.transport.methods import Method
from shoal.discovery import pointer_path
from shoal.errors import FailedPrecondition, Unavailable
from shoal.inference.v2 import inference_pb2 as pb
from shoal.node.envoy_edge import Edge
from shoal.node.probes import health
from shoal.node.tls.own_ca import OwnCa
from shoal.node.tls.served import Files, ServedCertificate
from tests.breakable import until
from tests.certificates import NAMES, ca_in, now, write_pair, written
from tests.client.served import Served
from tests.free_ports import free_port

pytestmark = [pytest.mark.envoy, pytest.mark.asyncio(loop_scope="module")]

STREAMS = 16
HEALTH = Method("/grpc.health.v1.Health/Check", health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse)


class Front:
    """An Envoy with a certificate of `ca`, in front of `served`."""

    def __init__(self, folder: Path, served: Served) -> None:
        self.ca: OwnCa = ca_in(folder)
        self.folder = folder
        self.served = served
        self.files = write_pair(folder / "server", self.ca.issue(NAMES, now()))
        self.certificate = ServedCertificate(folder / "tls", Files(*self.files))
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"

    async def run(self, stack: AsyncExitStack) -> None:
        edge = Edge(
            host="127.0.0.1",
            port=self.port,
            workers=[str(self.folder / "worker.sock")],
            folder=self.folder,
            threads=1,
            report=lambda name, status, again_in_s: None,
            sds=str(self.certificate.sds),
        )
        running = asyncio.create_task(edge.run())
        stack.push_async_callback(end, running)
        await until(edge.is_ready, "Envoy ready")
        await until(lambda: health_of(self), "the worker is reached through TLS")

    def client(self, address: str = "", **options: Any) -> shoal.AsyncClient:
        """A client that trusts the CA, unless `ca` says otherwise, and tries once."""
        trusted = {"ca": self.ca.path, "retry": RetryPolicy(attempts=1), **options}
        return shoal.AsyncClient(address or f"https://{self.address}", **trusted)

    def channel(self) -> grpc.aio.Channel:
        credentials = grpc.ssl_channel_credentials(self.ca.path.read_bytes())
        # A connection of its own for each channel.
        options = (("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0))
        return grpc.aio.secure_channel(self.address, credentials, options=options)

    async def serial(self) -> str:
        """The serial number of the certificate that a new connection gets."""
        context = ssl.create_default_context(cafile=self.ca.path)
        _, writer = await asyncio.open_connection("127.0.0.1", self.port, ssl=context, server_hostname="localhost")
        found = str(writer.get_extra_info("peercert")["serialNumber"])
        writer.close()
        return found


async def health_of(front: Front) -> bool:
    async with front.client() as client:
        try:
            return await client.live(timeout=5)
        except shoal.errors.ShoalError:
            return False


async def live(request: pb.ServerLiveRequest, context: Any) -> pb.ServerLiveResponse:
    return pb.ServerLiveResponse(live=True)


async def same(request: pb.ModelInferRequest, context: Any) -> pb.ModelInferResponse:
    [sent] = request.inputs
    output = pb.ModelInferResponse.InferOutputTensor(name="y", datatype=sent.datatype, shape=sent.shape)
    return pb.ModelInferResponse(outputs=[output], raw_output_contents=request.raw_input_contents)


async def check(request: health_pb2.HealthCheckRequest, context: Any) -> health_pb2.HealthCheckResponse:
    return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)


async def echo(requests: AsyncIterator[pb.ModelInferRequest], context: Any) -> AsyncIterator[Any]:
    async for request in requests:
        yield pb.ModelStreamInferResponse(infer_response=pb.ModelInferResponse(id=request.id))


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def front() -> AsyncIterator[Front]:
    folder = Path(tempfile.mkdtemp(prefix="shoal-tls-"))
    served = Served()
    served.on(methods.SERVER_LIVE, live)
    served.on(HEALTH, check)
    served.on(methods.MODEL_INFER, same)
    served.on(methods.MODEL_STREAM_INFER, echo, "stream_stream")
    await asyncio.to_thread(served.start, f"unix:{folder}/worker.sock")
    async with AsyncExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        stack.push_async_callback(asyncio.to_thread, served.close)
        made = Front(folder, served)
        await made.run(stack)
        yield made


@pytest.fixture(params=["lean", "grpc"])
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both transports of the client: to this machine, and as if the server were on another."""
    if request.param == "grpc":
        monkeypatch.setattr("shoal.client.transport.calls.is_local", lambda address: False)


async def test_an_unmodified_client_with_the_ca_is_served(front: Front) -> None:
    async with front.channel() as channel:
        call = channel.unary_unary(
            methods.SERVER_LIVE.path,
            request_serializer=pb.ServerLiveRequest.SerializeToString,
            response_deserializer=pb.ServerLiveResponse.FromString,
        )
        assert (await call(pb.ServerLiveRequest(), timeout=30)).live


async def test_the_client_sends_its_token_over_tls(front: Front, transport: None) -> None:
    async with front.client(token="s3cret") as client:
        assert client.address == f"https://{front.address}"
        assert await client.live(timeout=30)
    assert front.served.metadata[-1]["authorization"] == "Bearer s3cret"


async def test_large_messages_pass_in_both_directions(front: Front, transport: None) -> None:
    sent = np.arange(8 << 20, dtype=np.uint32).view(np.uint8)
    async with front.client() as client:
        answers = await asyncio.gather(*(client.infer("m", {"x": sent}, timeout=60) for _ in range(2)))
    assert all(np.array_equal(answer["y"], sent) for answer in answers)


async def test_a_client_of_this_machines_node_trusts_the_operators_certificate_by_its_own_name(
    front: Front, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for variable in ("SHOAL_GATEWAY", "SHOAL_CA"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    leaf = tmp_path / "server.pem"
    leaf.write_bytes(
        front.files[0].read_bytes().partition(b"-----END CERTIFICATE-----\n")[0] + b"-----END CERTIFICATE-----\n"
    )
    document = {"gateway": front.address, "admin": "127.0.0.1:1", "data_dir": "/d", "pids": {}}
    for name, is_right in (("localhost", True), ("other.example", False)):
        tls = {"ca": str(leaf), "name": name, "fingerprint": "", "has_own_ca": False}
        pointer_path(os.environ, os.getpid()).write_text(json.dumps({**document, "tls": tls}))
        async with shoal.AsyncClient(retry=RetryPolicy(attempts=1)) as client:
            assert client.address == f"https://{front.address}"
            if is_right:
                assert await client.live(timeout=30)
            else:
                with pytest.raises(FailedPrecondition, match="is for other names"):
                    await client.live(timeout=30)


async def test_a_client_that_does_not_trust_the_ca_ends_the_call_with_the_remedy(
    front: Front, transport: None, tmp_path: Path
) -> None:
    for ca in (None, ca_in(tmp_path).path):
        async with front.client(ca=ca) as client:
            with pytest.raises(FailedPrecondition, match=r"is not trusted \(.*\): give the CA .*shoal ca show"):
                await client.live(timeout=30)


async def test_a_client_that_calls_another_name_ends_the_call_with_the_remedy(front: Front, transport: None) -> None:
    # The front listens at 127.0.0.1 only.
    async with Relay("127.0.0.2", front.port), front.client(f"https://127.0.0.2:{front.port}") as client:
        with pytest.raises(FailedPrecondition, match=r"is for other names: .*--tls-name"):
            await client.live(timeout=30)


@pytest.mark.parametrize(("days", "why"), [((-2, -1), "has expired"), ((1, 2), "is not yet valid")])
async def test_a_client_of_a_server_whose_certificate_has_expired_is_told_so(
    transport: None, tmp_path: Path, days: tuple[int, int], why: str
) -> None:
    ca = ca_in(tmp_path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*written(tmp_path / "server", ca, days=days))
    context.set_alpn_protocols(["h2"])
    async with await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0, ssl=context) as server:
        address = f"https://localhost:{server.sockets[0].getsockname()[1]}"
        async with shoal.AsyncClient(address, ca=ca.path, retry=RetryPolicy(attempts=1)) as client:
            with pytest.raises(FailedPrecondition, match=f"the certificate of {address}, or its CA's, {why}"):
                await client.live(timeout=30)


class Relay:
    """A TCP relay at `host` to the same port of 127.0.0.1."""

    def __init__(self, host: str, port: int) -> None:
        self._at, self._port = (host, port), port

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = await asyncio.open_connection("127.0.0.1", self._port)
        await asyncio.gather(self._copy(reader, there[1]), self._copy(there[0], writer))

    async def _copy(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(1 << 16):
                target.write(data)
                await target.drain()
        target.close()

    async def __aenter__(self) -> None:
        self._server = await asyncio.start_server(self._forward, *self._at)

    async def __aexit__(self, *exc: object) -> None:
        self._server.close()


async def test_plaintext_to_the_port_is_refused_and_a_bystander_goes_on(front: Front, transport: None) -> None:
    async with front.client() as bystander, front.client(f"http://{front.address}", ca=None) as plain:
        assert await bystander.live(timeout=30)
        for _ in range(3):
            with pytest.raises(Unavailable, match=f"accepts TLS only, so call https://{front.address}"):
                await plain.live(timeout=30)
            assert await bystander.live(timeout=30)
    with socket.create_connection(("127.0.0.1", front.port), timeout=30) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert await asyncio.to_thread(sock.recv, 100) == b""


async def test_tls_to_a_plain_port_is_named(front: Front, transport: None) -> None:
    served = await asyncio.to_thread(Served().start)
    try:
        async with front.client(f"https://{served.address}") as client:
            with pytest.raises(FailedPrecondition, match=f"does not speak TLS: call http://{served.address}"):
                await client.live(timeout=30)
    finally:
        await asyncio.to_thread(served.close)


async def test_old_versions_of_tls_are_refused_and_http_2_is_agreed_upon(front: Front) -> None:
    context = ssl.create_default_context(cafile=front.ca.path)
    context.set_alpn_protocols(["h2", "http/1.1"])
    for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
        context.minimum_version = context.maximum_version = version
        _, writer = await asyncio.open_connection("127.0.0.1", front.port, ssl=context)
        assert writer.get_extra_info("ssl_object").selected_alpn_protocol() == "h2"
        writer.close()
    old = ssl.create_default_context(cafile=front.ca.path)
    old.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises(ssl.SSLError):
        await asyncio.open_connection("127.0.0.1", front.port, ssl=old)


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
async def test_curl_trusts_the_ca_and_nothing_else(front: Front) -> None:
    async def curl(*arguments: str) -> int:
        process = await asyncio.create_subprocess_exec(
            "curl", "--silent", "--noproxy", "*", "--max-time", "30", "--output", "/dev/null", *arguments
        )
        return await process.wait()

    url = f"https://localhost:{front.port}/"
    assert await curl("--cacert", str(front.ca.path), "--http2", url) == 0
    # 60: the certificate is not trusted. 52: the server closed the connection without a response.
    assert await curl(url) == 60
    assert await curl(f"http://localhost:{front.port}/") == 52


async def test_a_renewal_closes_no_stream_and_new_connections_get_the_new_certificate(front: Front) -> None:
    before = await front.serial()
    async with AsyncExitStack() as stack:
        streams = []
        for number in range(STREAMS):
            channel = await stack.enter_async_context(front.channel())
            stream = channel.stream_stream(
                methods.MODEL_STREAM_INFER.path,
                request_serializer=pb.ModelInferRequest.SerializeToString,
                response_deserializer=pb.ModelStreamInferResponse.FromString,
            )(timeout=60)
            streams.append(stream)
            await stream.write(pb.ModelInferRequest(id=f"{number} before"))
            assert (await stream.read()).infer_response.id == f"{number} before"
        said: list[str] = []
        write_pair(front.folder / "server", front.ca.issue(NAMES, now()))
        for _ in range(2):
            front.certificate.check(said.append)
        assert ["a renewed certificate is served" in text for text in said] == [True]

        async def is_renewed() -> bool:
            return await front.serial() != before

        await until(is_renewed, "new connections get the renewed certificate")
        for number, stream in enumerate(streams):
            await stream.write(pb.ModelInferRequest(id=f"{number} after"))
            assert (await stream.read()).infer_response.id == f"{number} after"
            await stream.done_writing()
            assert await stream.read() is grpc.aio.EOF
            assert await stream.code() == grpc.StatusCode.OK


async def test_a_wrong_renewal_is_told_and_not_served(front: Front) -> None:
    before, said = await front.serial(), []
    cert, _ = front.files
    kept = cert.read_bytes()
    cert.write_bytes(front.ca.issue(NAMES, now()).chain)
    for _ in range(3):
        front.certificate.check(said.append)
    assert ["the key belongs to another certificate" in text for text in said] == [True]
    assert await front.serial() == before
    cert.write_bytes(kept)


async def test_the_launchers_probe_speaks_tls(front: Front) -> None:
    assert await health(front.address, has_tls=True)
    assert not await health(front.address)
