"""Keys of issuers with an address: what is fetched, from where, and what is refused."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from services.coord import fetch
from services.coord.issuer_keys import fetched_keys
from shoal.access import policy as policies
from shoal.access import tokens
from shoal.access.policy import KEYS, Issuer
from shoal.access.tokens import Signer
from shoal.errors import InvalidArgument, Unavailable


class Idp:
    """An issuer of tokens on this machine: paths and what they answer."""

    def __init__(self) -> None:
        self.answers: dict[str, bytes] = {}
        self.redirects: dict[str, str] = {}
        self.drip_s = 0.0
        self.asked: list[str] = []
        idp = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                idp.asked.append(self.path)
                if self.path in idp.redirects:
                    self.send_response(302)
                    self.send_header("location", idp.redirects[self.path])
                    self.end_headers()
                    return
                body = idp.answers.get(self.path)
                self.send_response(404 if body is None else 200)
                self.end_headers()
                if body is not None and not idp.drip_s:
                    self.wfile.write(body)
                while idp.drip_s:
                    self.wfile.write(b" ")
                    self.wfile.flush()
                    time.sleep(idp.drip_s)

            def log_message(self, *args: Any) -> None:
                """Log nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def discoverable(self, *signers: Signer) -> None:
        self.answers["/keys"] = json.dumps({"keys": [signer.public_jwk() for signer in signers]}).encode()
        document = {"issuer": self.url, "jwks_uri": f"{self.url}/keys"}
        self.answers["/.well-known/openid-configuration"] = json.dumps(document).encode()

    def close(self) -> None:
        self.drip_s = 0.0
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def idp() -> Iterator[Idp]:
    made = Idp()
    yield made
    made.close()


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Signer:
    return tokens.create_signer(tmp_path_factory.mktemp("signer") / "s.json")


def by_url(url: str) -> Issuer:
    return Issuer(issuer="https://idp.example", audiences=("a",), jwks_url=url, tenant="acme")


def by_discovery(url: str) -> Issuer:
    return Issuer(issuer=url, audiences=("a",), discovery=True, tenant="acme")


def test_keys_by_address_and_by_discovery(idp: Idp, signer: Signer) -> None:
    idp.discoverable(signer)
    assert fetched_keys(by_url(f"{idp.url}/keys")) == signer.jwks()
    assert fetched_keys(by_discovery(idp.url)) == signer.jwks()


def test_keys_for_other_purposes_are_left_out_and_rsa_has_its_usual_algorithm(idp: Idp, signer: Signer) -> None:
    import jwt
    from cryptography.hazmat.primitives.asymmetric import rsa

    public = rsa.generate_private_key(65537, 2048).public_key()
    own = {**jwt.algorithms.RSAAlgorithm.to_jwk(public, as_dict=True), "kid": "r"}
    own.pop("key_ops", None)
    encrypting = {**own, "kid": "e", "use": "enc"}
    idp.answers["/keys"] = json.dumps({"keys": [own, encrypting, signer.public_jwk()]}).encode()
    found = fetched_keys(by_url(f"{idp.url}/keys"))["keys"]
    assert [(key["kid"], key["alg"]) for key in found] == [("r", "RS256"), (signer.kid, "ES256")]


def test_keys_that_cannot_be_used_are_left_out_with_their_reasons(idp: Idp, signer: Signer) -> None:
    good = [{**signer.public_jwk(), "kid": f"k-{number}"} for number in range(KEYS + 1)]
    bad = [
        {"kty": "OKP", "crv": "X448", "kid": "curve", "alg": "EdDSA"},
        {**good[0], "kid": ""},
        {**good[0], "d": "c2VjcmV0"},
        {**good[0], "x": "AAAA"},
        {**good[0], "y": {"deep": [1]}},
    ]
    idp.answers["/keys"] = json.dumps({"keys": [good[0], *bad, good[0], *good[1:]]}).encode()
    found = fetched_keys(by_url(f"{idp.url}/keys"))
    assert found["keys"] == good[:KEYS]
    assert len(found["skipped"]) == 4
    assert found["skipped"][0].startswith("keys[1] ('curve'): kty 'OKP' with alg 'EdDSA' is not supported")
    idp.answers["/keys"] = json.dumps({"keys": bad}).encode()
    with pytest.raises(InvalidArgument, match=r"has no key that can be used: keys\[0\] \('curve'\)"):
        fetched_keys(by_url(f"{idp.url}/keys"))


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"keys": []}', b'{"keys": [{"kty": "oct"}]}', b"[" * 100_000])
def test_what_is_no_key_set_is_refused(idp: Idp, body: bytes) -> None:
    idp.answers["/keys"] = body
    with pytest.raises((Unavailable, InvalidArgument)):
        fetched_keys(by_url(f"{idp.url}/keys"))


def test_a_redirect_is_not_followed(idp: Idp, signer: Signer) -> None:
    idp.discoverable(signer)
    idp.redirects["/old"] = f"{idp.url}/keys"
    with pytest.raises(Unavailable, match="has the status 302"):
        fetched_keys(by_url(f"{idp.url}/old"))
    assert idp.asked == ["/old"]


def test_a_document_beyond_size_or_time_is_refused(idp: Idp, monkeypatch: pytest.MonkeyPatch) -> None:
    idp.answers["/keys"] = b" " * (fetch.BYTES + 1)
    with pytest.raises(Unavailable, match="has more than 262144 bytes"):
        fetched_keys(by_url(f"{idp.url}/keys"))
    monkeypatch.setattr(fetch, "TIMEOUT_S", 0.2)
    idp.drip_s = 0.02
    with pytest.raises(Unavailable, match="was not whole after"):
        fetched_keys(by_url(f"{idp.url}/keys"))


@pytest.mark.parametrize("head", [b"HTTP/1.1 200 OK\r\nx: ", b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"])
def test_a_sender_of_one_byte_at_a_time_is_refused_in_time(monkeypatch: pytest.MonkeyPatch, head: bytes) -> None:
    monkeypatch.setattr(fetch, "TIMEOUT_S", 0.3)
    ended = threading.Event()

    def drip(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection, suppress(OSError):
            connection.sendall(head)
            while not ended.wait(0.05):
                connection.sendall(b"0")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=drip, args=(listener,))
        thread.start()
        # Without a limit, the fetch would go on until a line has 64 KiB.
        limit = threading.Timer(30, ended.set)
        limit.start()
        try:
            with pytest.raises(Unavailable, match="was not whole after"):
                fetch.fetch_json(f"http://127.0.0.1:{listener.getsockname()[1]}/keys")
            assert not ended.is_set()
        finally:
            ended.set()
            limit.cancel()
            thread.join()


def test_a_name_that_is_resolved_too_slowly_is_refused_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "TIMEOUT_S", 0.2)
    ended = threading.Event()

    def resolve(*args: Any, **kwargs: Any) -> Any:
        ended.wait(30)
        raise socket.gaierror("no such name")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    try:
        with pytest.raises(Unavailable, match="was not whole after"):
            fetch.fetch_json("http://idp.example/keys")
        assert not ended.is_set()
    finally:
        ended.set()


def test_what_is_no_http_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"\x00nonsense\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(Unavailable, match="cannot be fetched"):
            fetch.fetch_json(f"http://127.0.0.1:{listener.getsockname()[1]}/keys")
        thread.join()


def test_a_discovery_document_of_another_issuer_or_with_an_unsafe_address_is_refused(idp: Idp, signer: Signer) -> None:
    for document, said in (
        ({"issuer": "https://other.example", "jwks_uri": f"{idp.url}/keys"}, "names another issuer"),
        ({"issuer": idp.url}, "jwks_uri: '': expected https"),
        ({"issuer": idp.url, "jwks_uri": "http://10.0.0.1/keys"}, "by https only"),
        ({"issuer": idp.url, "jwks_uri": "file:///etc/passwd"}, "expected https"),
    ):
        idp.answers["/.well-known/openid-configuration"] = json.dumps(document).encode()
        with pytest.raises(InvalidArgument, match=said):
            fetched_keys(by_discovery(idp.url))
    assert "/keys" not in idp.asked


@pytest.mark.parametrize(
    "url",
    ["http://a.example/k", "ftp://a/k", "https://", "https://u:p@a/k", "https://a/k#x", "//a", "https://[x", "h s"],
)
def test_an_address_that_is_not_safe_is_refused(url: str) -> None:
    document = f"version: 1\nissuers: [{{issuer: i, audiences: [a], tenant: t, jwks_url: '{url}'}}]\n"
    with pytest.raises(InvalidArgument, match="policy:2: issuers"):
        policies.parse(document)


def test_a_server_of_a_file_fetches_nothing(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    for source in ("jwks_url: 'https://a/k'", "discovery: true"):
        path.write_text(f"version: 1\nissuers: [{{issuer: 'https://i', audiences: [a], tenant: t, {source}}}]\n")
        with pytest.raises(InvalidArgument, match="is for the policy of a node"):
            policies.load(path)
        assert policies.load(path, is_cluster=True).issuers[0].is_fetched
