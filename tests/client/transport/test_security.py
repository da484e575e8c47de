"""The files and the token that a client is given are checked when the client is made."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

import shoal
from shoal.client import RetryPolicy
from shoal.client.transport import methods
from shoal.errors import InvalidArgument, Unavailable
from shoal.inference.v2 import inference_pb2 as pb
from tests.certificates import ca_in, issued, written

FAR = "https://h.example:1"


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("SHOAL_GATEWAY", "SHOAL_CA", "SHOAL_TOKEN"):
        monkeypatch.delenv(variable, raising=False)


def test_wrong_files_are_named(tmp_path: Path) -> None:
    cert, _, ca = issued(tmp_path)
    junk = tmp_path / "junk"
    junk.write_text("junk")
    for options, named in (
        ({"ca": tmp_path / "none"}, r"ca='\S*none': no such file"),
        ({"ca": junk}, r"ca='\S*junk': no certificates in PEM form"),
        ({"cert": cert}, "cert and key are given together"),
        ({"cert": cert, "key": tmp_path / "none"}, r"the client's certificate: '\S*none': no such file"),
        ({"cert": cert, "key": written(tmp_path / "other")[1]}, "are no pair in PEM form"),
    ):
        with pytest.raises(InvalidArgument, match=named):
            shoal.AsyncClient(FAR, **options)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="ca, cert and key are for https: call https://h:1"):
        shoal.AsyncClient("h:1", ca=ca)


def test_a_token_is_never_in_an_error_and_in_plaintext_only_where_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for token, address, named in (
        ("s3cret", "h.example:1", r"the token is not sent to h\.example:1 in plaintext: use https"),
        ("s3 cret", FAR, "the token has characters"),
        ("s3cret\n", FAR, "the token has characters"),
    ):
        with pytest.raises(InvalidArgument, match=named) as caught:
            shoal.AsyncClient(address, token=token)
        assert "s3" not in caught.value.message
    shoal.AsyncClient("h.example:1", token="s3cret", plaintext_token=True)
    shoal.AsyncClient("127.0.0.1:1", token="s3cret")
    monkeypatch.setenv("SHOAL_TOKEN", "s3cret")
    shoal.AsyncClient(FAR)
    with pytest.raises(InvalidArgument, match="in plaintext"):
        shoal.AsyncClient("h.example:1")
    shoal.AsyncClient("h.example:1", token="")


@pytest.mark.parametrize("token", [b"s3cret", 5, 0, b"", ["s3cret"]], ids=repr)
def test_a_token_that_is_no_text_is_named_by_its_type(token: Any) -> None:
    with pytest.raises(InvalidArgument, match=f"token: expected text, got {type(token).__name__}") as caught:
        shoal.Client(FAR, token=token)
    assert "s3cret" not in caught.value.message


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"address": 5}, "address: expected HOST:PORT or https://HOST:PORT, got 5"),
        ({"address": 0}, "address: expected"),
        ({"address": b"h:1"}, "address: expected"),
        ({"address": FAR, "tenant": 5}, "tenant: expected text, got 5"),
        ({"address": FAR, "tenant": b"acme"}, "tenant: expected text"),
        ({"address": FAR, "retry": 3}, "retry: expected a RetryPolicy"),
        ({"address": FAR, "headers": 5}, "headers: expected a mapping of names to values, got int"),
        ({"address": FAR, "headers": [("x-a", "b")]}, "headers: expected a mapping"),
    ],
    ids=str,
)
def test_arguments_of_wrong_types_are_named(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidArgument, match=named):
        shoal.Client(**arguments)


async def test_a_token_in_headers_is_guarded_like_one_in_its_own_argument() -> None:
    bearer = {"authorization": "Bearer s3cret"}
    with pytest.raises(InvalidArgument, match=r"the token is not sent to h\.example:1 in plaintext") as caught:
        shoal.AsyncClient("http://h.example:1", headers=bearer)
    assert "s3cret" not in caught.value.message
    for address in (FAR, "127.0.0.1:1", "unix:/s"):
        shoal.AsyncClient(address, headers=bearer)
    shoal.AsyncClient("h.example:1", headers=bearer, plaintext_token=True)
    async with shoal.AsyncClient("h.example:1") as client:
        with pytest.raises(InvalidArgument, match="in plaintext"):
            await client.infer("m", {"x": np.zeros(1, np.float32)}, headers=bearer)


@contextlib.asynccontextmanager
async def wants_certificates(cert: Path, key: Path, ca: Path) -> AsyncIterator[str]:
    """The address of a server that serves only clients with a certificate of `ca`."""

    async def live(request: pb.ServerLiveRequest, context: Any) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    server = grpc.aio.server()
    read = pb.ServerLiveRequest.FromString, pb.ServerLiveResponse.SerializeToString
    service, _, name = methods.SERVER_LIVE.path.strip("/").partition("/")
    handlers = {name: grpc.unary_unary_rpc_method_handler(live, *read)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    pair = [(key.read_bytes(), cert.read_bytes())]
    credentials = grpc.ssl_server_credentials(pair, ca.read_bytes(), require_client_auth=True)
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    yield f"https://127.0.0.1:{port}"
    await server.stop(0)


async def test_a_certificate_of_the_client_is_sent(transport: str, tmp_path: Path) -> None:
    cert, key = written(tmp_path / "client", ca_in(tmp_path))
    server_cert, server_key, ca = issued(tmp_path)
    options: dict[str, Any] = {"ca": ca, "retry": RetryPolicy(attempts=1)}
    async with wants_certificates(server_cert, server_key, ca) as address:
        async with shoal.AsyncClient(address, cert=cert, key=key, **options) as client:
            assert await client.live(timeout=30)
        async with shoal.AsyncClient(address, **options) as client:
            with pytest.raises(Unavailable, match="wants a certificate of the client"):
                await client.live(timeout=30)
