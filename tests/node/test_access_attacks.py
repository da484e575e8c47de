"""Attacks on `shoal serve --policy` and `shoal up --auth`: each is refused as said here, by real Envoys and services.

The policy: two tenants; acme may call every model but `secret`, globex every model. Health checks need a key.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import hmac
import http.client
import json
import os
import random
import re
import signal
import socket
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import jwt
import numpy as np
import pytest
import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from h2.errors import ErrorCodes
from pymongo import MongoClient

import shoal
from shoal.access import tokens
from shoal.access.caller_header import LAUNCHER, SERVICE
from shoal.access.decision import caller_of, decide
from shoal.access.policy import Policy
from shoal.access.rpc_groups import GROUP_OF, INDEX, INTERNAL, MODEL_INFER, ROLL_BACK
from shoal.access.tokens import PREFIX, Key, Signer
from shoal.errors import ERROR_CODE_PARAMETER, Code, InvalidArgument, PermissionDenied, ShoalError, trace_of
from shoal.inference.v2 import inference_pb2 as pb
from shoal.inference.v2 import inference_pb2_grpc, trial_pb2, trial_pb2_grpc
from shoal.store.v1 import store_pb2, store_pb2_grpc
from tests.access.policies import claims_of, document, issuer, key, passed, policy, signed, write
from tests.free_ports import free_port
from tests.http2 import Connection, framed, raw
from tests.infer import onnx_files
from tests.infer.conftest import floats, request
from tests.long_form import by_form
from tests.node.conftest import SERVE, Node, python_model
from tests.openid_providers import OidcProvider, signing_key

pytestmark = [pytest.mark.timeout(300)]

CHANNEL = (("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1))
X = floats([1, 2, 3, 4])
OPEN, SECRET = "open", "secret"
GRANTS = [
    {"name": "roles", "models": ["*"]},
    {"name": "no-secrets", "tenants": ["acme"], "deny": ["*"], "models": [SECRET]},
]
REVOKED = "k-revoked"
PATIENCE_S = 60.0
FORGED = by_form(500, 2_000)


@dataclass
class World:
    """The running server, its policy, and every secret that the tests have used."""

    address: str
    folder: Path
    signer: Signer
    idp: Signer
    envoy: int
    worker: int
    process: subprocess.Popen[str]
    stderr: Path
    secrets: set[str] = field(default_factory=set)
    texts: list[str] = field(default_factory=list)
    """Outcomes of calls."""

    @property
    def document(self) -> dict[str, Any]:
        # Tokens of the foreign issuer have no prefix, and name their tenant otherwise.
        foreign = issuer(
            self.idp, token_prefix="", audiences=["models"], claims={"tenant": "org.id", "models": "may", "role": "job"}
        )
        return document(self.signer, issuers=[issuer(self.signer), foreign], grants=GRANTS, revoked=[REVOKED])

    @property
    def policy(self) -> Policy:
        made = self.document
        return policy(self.signer, **{name: made[name] for name in ("issuers", "grants", "revoked")})

    def apply_invalid(self) -> None:
        """Apply an invalid policy; return when its author knows."""
        (self.folder / "policy.yaml").write_text("version: 2\n")
        self.until(lambda: "policy.yaml:1: version: Input should be 1" in self.stderr.read_text())

    def places(self) -> dict[str, bytes]:
        """Return everything that the server has written and shown."""
        (run_dir,) = {path.parent for path in Path("/tmp").glob("shoal-serve-*/admin.sock") if is_of(self.envoy, path)}
        with socket.socket(socket.AF_UNIX) as admin:
            admin.connect(str(run_dir / "admin.sock"))
            admin.sendall(b"GET /config_dump?include_eds HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
            dump = b""
            while piece := admin.recv(1 << 20):
                dump += piece
        written = {str(path): path.read_bytes() for path in run_dir.glob("*") if path.is_file()}
        return {"stderr": self.stderr.read_bytes(), "config_dump": dump, **written}

    def key(self, tenant: str = "acme", role: str = "user", **options: Any) -> Key:
        made = key(self.signer, tenant, role, **options)
        self.secrets.add(made.text)
        return made

    def set_policy(self, **parts: Any) -> None:
        write(self.folder / "policy.yaml", {**self.document, **parts})

    @contextmanager
    def with_policy(self, **parts: Any) -> Iterator[None]:
        """Apply another policy for as long as the block lasts; the test waits for its effect."""
        self.set_policy(**parts)
        try:
            yield
        finally:
            self.set_policy()
            self.until(lambda: self.infer(self.key().text) == "OK" and self.infer(self.key().text, SECRET) != "OK")

    def channel(self) -> grpc.Channel:
        return grpc.insecure_channel(self.address, options=CHANNEL)

    def infer(self, token: str | None, model: str = OPEN, more: tuple[tuple[str, str], ...] = ()) -> str:
        """Return the outcome of a ModelInfer: OK, or the status and its text."""
        bearer = () if token is None else (("authorization", f"Bearer {token}"),)
        with self.channel() as channel:
            found = outcome(channel, model, (*bearer, *more))
        self.texts.append(found)
        return found

    def until(self, is_so: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not is_so():
            assert time.monotonic() < deadline, f"it did not happen: {self.stderr.read_text()}"
            time.sleep(0.05)


class NodeWorld(World):
    """A node with the same policy and models."""

    node: Node

    @property
    def document(self) -> dict[str, Any]:
        made = super().document
        own = {"issuer": "shoal", "audiences": ["shoal"], "token_prefix": PREFIX, "cluster": True}
        return {**made, "issuers": [own, *made["issuers"]]}

    def client(self) -> shoal.Client:
        """Return a client with the key of the node's user."""
        return shoal.Client(self.address, token=(self.node.data_dir / "admin.key").read_text().strip())

    def set_policy(self, **parts: Any) -> None:
        made = {**self.document, **parts}
        if made["issuers"][0] != self.document["issuers"][0]:
            made["issuers"] = [self.document["issuers"][0], *made["issuers"]]
        made["grants"] = [*made["grants"], {"name": "own", "tenants": ["local"], "allow": ["*"], "models": ["*"]}]
        with self.client() as client:
            client.access.apply(yaml.safe_dump(made))

    def apply_invalid(self) -> None:
        with self.client() as client, pytest.raises(InvalidArgument, match="policy:1: version: Input should be 1"):
            client.access.apply("version: 2\n")

    def places(self) -> dict[str, bytes]:
        with urllib.request.urlopen(f"http://{self.node.admin}/config_dump?include_eds") as response:
            dump = response.read()
        self.secrets |= {
            (self.node.data_dir / "admin.key").read_text().strip(),
            (self.node.data_dir / "master.key").read_text().strip(),
        }
        files = [path for path in self.node.data_dir.rglob("*") if path.is_file() and path.suffix != ".key"]
        files += [self.node.output]
        # etcd and mongod allocate their logs ahead: most of the bytes are zeros.
        written = {str(path): path.read_bytes().translate(None, b"\0") for path in files}
        return {"config_dump": dump, "support bundle": self.bundle(), **written}

    def bundle(self) -> bytes:
        path = self.folder / "bundle.tar.gz"
        self.node.shoal("support", "bundle", "-o", str(path))
        with gzip.open(path) as archive:
            text = archive.read()
        path.unlink()
        assert b"versions.json" in text
        return text


def outcome(channel: grpc.Channel, model: str, metadata: tuple[tuple[str, str], ...]) -> str:
    try:
        answer = inference_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(
            request(model, x=X), metadata=metadata, timeout=PATIENCE_S
        )
    except grpc.RpcError as err:
        return f"{err.code().name} {err.details()}"
    assert np.frombuffer(answer.raw_output_contents[0], np.float32).tolist() == [2, 4, 6, 8]
    return "OK"


@pytest.fixture(scope="module", params=["serve", "node"])
def world(request: pytest.FixtureRequest) -> World:
    made: World = request.getfixturevalue(f"{request.param}_world")
    return made


@pytest.fixture(scope="module")
def serve_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with _serve(_folder(tmp_path_factory)) as made:
        yield made


@pytest.fixture(scope="module")
def node_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeWorld]:
    with _node(_folder(tmp_path_factory)) as made:
        yield made


def _folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("attacked")
    (folder / "models").mkdir()
    for name in (OPEN, SECRET):
        (folder / "models" / f"{name}.onnx").write_bytes(onnx_files.scale(2).SerializeToString())
    return folder


@contextmanager
def _node(folder: Path) -> Iterator[NodeWorld]:
    signer = tokens.create_signer(folder / "signer.json", "keys")
    idp = tokens.create_signer(folder / "idp.json", "https://idp.example")
    made = NodeWorld("", folder, signer, idp, 0, 0, None, folder / "stderr")  # type: ignore[arg-type]
    made.secrets.add(signer.as_text().split("-----")[2].strip()[:60])
    levels = {"SHOAL_INFER_LOG_LEVEL": "DEBUG", "SHOAL_COORD_LOG_LEVEL": "DEBUG"}
    made.node = Node(folder, "--auth", env={**levels, "SHOAL_COORD_ISSUER_REFRESH_MS": "1000"})
    try:
        made.stderr = made.node.output
        made.address = made.node.wait_until_ready().gateway
        with made.client() as client:
            for name in (OPEN, SECRET):
                assert client.models.push(folder / "models" / f"{name}.onnx")[0].ready
        made.set_policy()
        made.until(lambda: made.infer(made.key().text) == "OK")
        yield made
    finally:
        made.node.close()


@contextmanager
def _serve(folder: Path) -> Iterator[World]:
    signer = tokens.create_signer(folder / "signer.json")
    idp = tokens.create_signer(folder / "idp.json", "https://idp.example")
    made = World("", folder, signer, idp, 0, 0, None, folder / "stderr")  # type: ignore[arg-type]
    made.set_policy()
    command = [*SERVE, str(folder / "models"), "--policy", str(folder / "policy.yaml"), "--port", "0", "--json"]
    environ = {**os.environ, "SHOAL_INFER_LOG_LEVEL": "DEBUG"}
    with made.stderr.open("w") as err:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=err, text=True, env=environ)
    assert process.stdout is not None
    try:
        text = ""
        while not text.endswith("\n}\n"):
            line = process.stdout.readline()
            assert line, f"it ended with {process.wait()}: {made.stderr.read_text()}"
            text += line
        said = json.loads(text)
        assert {model["name"]: model["state"] for model in said["models"]} == {OPEN: "READY", SECRET: "READY"}
        made.address, made.envoy, made.worker, made.process = said["address"], said["envoy"], said["pid"], process
        made.secrets.add((folder / "signer.json").read_text().split("-----")[2].strip()[:60])
        yield made
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(PATIENCE_S)
        process.stdout.close()


def b64(data: bytes | dict[str, Any]) -> str:
    raw_bytes = data if isinstance(data, bytes) else json.dumps(data).encode()
    return base64.urlsafe_b64encode(raw_bytes).rstrip(b"=").decode()


# Tokens.


def test_a_good_key_is_admitted(world: World) -> None:
    assert world.infer(world.key().text) == "OK"
    assert world.infer(world.key("globex").text, SECRET) == "OK"


def test_no_token_and_something_else_instead_of_one(world: World) -> None:
    assert world.infer(None).startswith("UNAUTHENTICATED no key: send 'authorization: Bearer shoal_...'")
    for value in ("Basic YTpi", "Bearer", "Bearer ", "bearer", PREFIX, f"Token {world.key().text}"):
        assert world.infer(None, more=(("authorization", value),)).startswith("UNAUTHENTICATED")
    for garbage in ("shoal_", "shoal_..", "shoal_a.b.c", "shoal_" + "x" * 4000):
        assert world.infer(garbage).startswith("UNAUTHENTICATED")


def test_times(world: World) -> None:
    now = int(time.time())
    assert "Jwt is expired" in world.infer(signed(world.signer, exp=now - 60))
    assert world.infer(signed(world.signer, exp=now - 10)) == "OK", "within the skew of the clocks"
    assert "Jwt not yet valid" in world.infer(signed(world.signer, nbf=now + 600))
    assert world.infer(signed(world.signer, exp=None)).startswith("UNAUTHENTICATED")


def test_audience_and_issuer(world: World) -> None:
    refused = world.infer(signed(world.signer, aud="other"))
    assert refused.startswith("PERMISSION_DENIED Audiences in Jwt are not allowed: ")
    assert world.infer(signed(world.signer, aud=None)).startswith("PERMISSION_DENIED")
    assert world.infer(signed(world.signer, iss="other")).startswith("UNAUTHENTICATED")
    assert world.infer(signed(world.signer, iss=None)).startswith("UNAUTHENTICATED")


def test_key_ids_and_signatures(world: World, tmp_path: Path) -> None:
    other = tokens.create_signer(tmp_path / "other.json", world.signer.issuer)
    assert world.infer(signed(world.signer, kid="unknown")).startswith("UNAUTHENTICATED")
    assert world.infer(signed(world.signer, kid=None)).startswith("PERMISSION_DENIED")
    empty = jwt.encode(claims_of(world.key()), world.signer.private_key, "ES256", {"kid": ""})
    assert world.infer(PREFIX + empty).startswith("PERMISSION_DENIED")
    assert world.infer(key(other).text).startswith("UNAUTHENTICATED"), "a key of another installation"
    forged = Signer(world.signer.issuer, world.signer.kid, other.private_key)
    assert "Jwt verification fails" in world.infer(key(forged).text)
    head, body, signature = world.key().text.split(".")
    assert world.infer(f"{head}.{body}.{signature[:-4]}AAAA").startswith("UNAUTHENTICATED")
    other_body = b64({**claims_of(world.key()), "tenant": "globex"})
    assert world.infer(f"{head}.{other_body}.{signature}").startswith("UNAUTHENTICATED")
    assert world.infer(f"{head}.{body}.").startswith("UNAUTHENTICATED")


def test_algorithms_that_need_no_private_key(world: World) -> None:
    claims, kid = claims_of(world.key()), world.signer.kid
    for algorithm in ("none", "None", "NONE", ""):
        token = f"{PREFIX}{b64({'alg': algorithm, 'kid': kid})}.{b64(claims)}."
        assert world.infer(token).startswith("UNAUTHENTICATED"), algorithm
    public = world.signer.private_key.public_key()
    for secret in (
        public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo),
        json.dumps(world.signer.public_jwk()).encode(),
    ):
        unsigned = f"{b64({'alg': 'HS256', 'typ': 'JWT', 'kid': kid})}.{b64(claims)}"
        mac = hmac.new(secret, unsigned.encode(), hashlib.sha256).digest()
        assert world.infer(f"{PREFIX}{unsigned}.{b64(mac)}").startswith("UNAUTHENTICATED")


def test_a_token_that_brings_its_own_key(world: World) -> None:
    mine = ec.generate_private_key(ec.SECP256R1())
    jwk = json.loads(jwt.algorithms.ECAlgorithm.to_jwk(mine.public_key()))
    headers = {"kid": world.signer.kid, "jwk": jwk, "jku": "http://127.0.0.1:9/keys"}
    assert world.infer(PREFIX + jwt.encode(claims_of(world.key()), mine, "ES256", headers)).startswith(
        "UNAUTHENTICATED"
    )


def test_a_revoked_key(world: World) -> None:
    assert world.infer(signed(world.signer, jti=REVOKED)).startswith("PERMISSION_DENIED")


def test_a_key_without_its_prefix_and_a_foreign_token_with_it(world: World) -> None:
    assert world.infer(world.key().text.removeprefix(PREFIX)).startswith("UNAUTHENTICATED")
    claims = {"iss": world.idp.issuer, "aud": "models", "exp": int(time.time()) + 60, "jti": "t", "may": "*"}
    claims |= {"org": {"id": "acme"}, "job": "user"}
    token = jwt.encode(claims, world.idp.private_key, "ES256", {"kid": world.idp.kid})
    world.secrets.add(token)
    assert world.infer(token) == "OK"
    assert world.infer(token, SECRET).startswith("PERMISSION_DENIED")
    assert world.infer(PREFIX + token).startswith("UNAUTHENTICATED")


def test_a_token_whose_id_cannot_be_revoked(world: World) -> None:
    for id in ("", " ", "k 1", " k-1", "schlüssel", "k" * 256, 7, ["k-1"]):
        assert world.infer(signed(world.signer, jti=id)) != "OK", id
    assert world.infer(signed(world.signer, jti="k" * 255)) == "OK"


def test_foreign_claims_that_are_no_names(world: World) -> None:
    base = {"iss": world.idp.issuer, "aud": "models", "exp": int(time.time()) + 60, "may": "*", "job": "user"}

    def foreign(**claims: Any) -> str:
        return jwt.encode({**base, **claims}, world.idp.private_key, "ES256", {"kid": world.idp.kid})

    assert world.infer(foreign(org={"id": "globex"}), SECRET) == "OK"
    assert world.infer(foreign(org={"id": "globex"}, may="open"), SECRET).startswith("PERMISSION_DENIED")
    for claims in (
        {},
        {"org": "globex"},
        {"org": {"id": ["globex"]}},
        {"org": {"id": "globex\r\nx-shoal-role: admin"}},
        {"org": {"id": ""}},
        {"org": {"id": "globex"}, "job": ["user"]},
        {"org": {"id": "globex"}, "job": "boss"},
    ):
        assert world.infer(foreign(**claims)) != "OK", claims


# Headers.


def test_a_token_in_another_place(world: World) -> None:
    good = world.key().text
    for name in ("x-api-key", "x-authorization", "proxy-authorization", "cookie", "x-shoal-caller", "grpc-metadata"):
        assert world.infer(None, more=((name, f"Bearer {good}"),)).startswith("UNAUTHENTICATED"), name
    with Connection(world.address) as client:
        answer = client.call(framed(b""), path=f"{MODEL_INFER}?access_token={good}")
        assert answer.status == Code.UNAUTHENTICATED


def test_two_tokens(world: World) -> None:
    acme, globex = (f"Bearer {world.key(tenant).text}" for tenant in ("acme", "globex"))
    for pair in ((acme, globex), (globex, acme), (acme, "Bearer x"), ("Bearer x", acme)):
        found = world.infer(None, SECRET, more=tuple(("authorization", value) for value in pair))
        assert found.startswith("UNAUTHENTICATED"), pair


SPOOFED = (
    ("x-shoal-tenant", "globex"),
    ("x-shoal-role", "admin"),
    ("x-shoal-issuer", "shoal"),
    ("x-shoal-key", "k-other"),
    ("x-shoal-model", OPEN),
    ("x_shoal_tenant", "globex"),
    ("x_shoal_caller", LAUNCHER.decode()),
    ("x-shoal-caller", LAUNCHER.decode()),
)


def test_headers_that_only_the_gateway_may_set(world: World) -> None:
    admin = passed({**claims_of(world.key("globex", "admin"))})
    acme = (("authorization", f"Bearer {world.key().text}"),)
    for spoofed in (*((header,) for header in SPOOFED), SPOOFED, (admin,), (admin, admin)):
        assert world.infer(None, more=spoofed).startswith("UNAUTHENTICATED"), spoofed
        assert world.infer(None, SECRET, more=(*acme, *spoofed)).startswith("PERMISSION_DENIED"), spoofed
        assert world.infer(None, more=(*acme, *spoofed)) == "OK", spoofed


def test_headers_in_capitals_and_in_trailers(world: World) -> None:
    body = framed(request(SECRET, x=X).SerializeToString())
    bearer = (b"authorization", f"Bearer {world.key().text}".encode())
    name, value = (part.encode() for part in passed(claims_of(world.key("globex", "admin"))))
    with Connection(world.address) as client:
        # Capitals are malformed in HTTP/2.
        assert client.call(body, more=[bearer, (name.upper(), value)]).status in (None, Code.PERMISSION_DENIED)
    with Connection(world.address) as client:
        stream = client.open(more=[bearer])
        client.send(stream, body)
        client.h2.send_headers(stream, [(name, value)], end_stream=True)
        client.flush()
        assert client.answer(stream).status in (None, Code.PERMISSION_DENIED)


def test_many_and_large_headers(world: World) -> None:
    bearer = (b"authorization", f"Bearer {world.key().text}".encode())
    good = framed(request(OPEN, x=X).SerializeToString())
    # Of a larger one, Envoy would leave a part unread, and reset the connection of HTTP/1.1.
    for more in ([(b"a", b"x" * (17 << 10))], [(f"h{number}".encode(), b"") for number in range(400)]):
        with Connection(world.address) as client:
            answer = client.call(framed(b""), more=[bearer, *more])
            assert (answer.reset, answer.headers) == (ErrorCodes.INTERNAL_ERROR, {})
            assert client.call(good, more=[bearer]).status == 0, "it costs its own call only"
        lines = b"".join(b"%b: %b\r\n" % field for field in [bearer, *more])
        head = b"POST %b HTTP/1.1\r\nhost: a\r\n%b\r\n" % (MODEL_INFER.encode(), lines)
        assert raw(world.address, head, half_closes=False).startswith(b"HTTP/1.1 431 ")
    with Connection(world.address) as client:
        assert client.call(framed(b""), more=[bearer, (b"a", b"x" * (70 << 10))]).status is None
    assert world.infer(world.key().text) == "OK"


# Paths, hosts and protocols.


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/",
        "*",
        "/inference.GRPCInferenceService/../inference.GRPCInferenceService/ModelInfer",
        "/inference.GRPCInferenceService/%4dodelInfer",
        "/inference.GRPCInferenceService//ModelInfer",
        "//inference.GRPCInferenceService/ModelInfer",
        "/inference.GRPCInferenceService/ModelInfer/",
        "/inference.GRPCInferenceService/ModelInfer#x",
        "/inference.GRPCInferenceService/ModelInfer?x=1",
        "/inference.GRPCInferenceService/modelinfer",
        "/inference.GRPCInferenceService/ModelInfer;x",
        "/inference.GRPCInferenceService/Unknown",
        "/shoal.inference.v2.BulkInference/InferBulk",
        "/shoal.store.v1.StoreService/PutResults",
        "/grpc.health.v1.Health/../../inference.GRPCInferenceService/ModelInfer",
        "/config_dump",
        "/quitquitquit",
    ],
)
def test_a_path_that_is_no_rpc_of_the_policy(world: World, path: str) -> None:
    bearer = (b"authorization", f"Bearer {world.key('globex', 'admin').text}".encode())
    with Connection(world.address) as client:
        answer = client.call(framed(request(OPEN, x=X).SerializeToString()), path=path, more=[bearer])
        assert answer.status != 0
        assert answer.data == b"" or answer.http_status != 200


def test_what_is_for_other_roles(world: World) -> None:
    with world.channel() as channel:
        for role, allowed in [
            ("viewer", {"ServerLive", "RepositoryIndex"}),
            ("user", {"ServerLive", "RepositoryIndex", "ModelInfer"}),
            ("publisher", {"ServerLive", "RepositoryIndex", "ModelInfer", "RepositoryModelUnload"}),
            ("operator", {"ServerLive", "RepositoryIndex", "TraceSetting"}),
            ("boss", set()),
        ]:
            bearer = (("authorization", f"Bearer {world.key(role=role).text}"),)
            for method in ("ServerLive", "RepositoryIndex", "ModelInfer", "RepositoryModelUnload", "TraceSetting"):
                call = channel.unary_unary(f"/inference.GRPCInferenceService/{method}")
                body = pb.RepositoryModelUnloadRequest(model_name="none").SerializeToString()
                code = code_of(call, body, bearer)
                denied = code in ("PERMISSION_DENIED", "UNAUTHENTICATED")
                assert denied is (method not in allowed), (role, method, code)


def code_of(call: Any, body: bytes, metadata: tuple[tuple[str, str], ...]) -> str:
    future = call.future(body, metadata=metadata, timeout=PATIENCE_S)
    return str(future.code().name)


def test_a_client_waits_for_a_model_that_its_key_may_read(world: World) -> None:
    with shoal.Client(world.address, token=world.key().text) as client:
        client.models.wait_ready(OPEN, timeout=PATIENCE_S)
        if isinstance(world, NodeWorld):
            # The client asks coord, which lists the models of each instance.
            served = [instance.models for instance in client.status().instances if instance.service == "infer"]
            assert [[*models] for models in served] == [[OPEN]]
            return
        with pytest.raises(PermissionDenied, match="denies read"):
            client.models.wait_ready(SECRET, timeout=PATIENCE_S)


def test_health_and_reflection_need_a_key(world: World) -> None:
    with world.channel() as channel:
        for path in (
            "/grpc.health.v1.Health/Check",
            "/grpc.health.v1.Health/Watch",
            "/inference.GRPCInferenceService/ServerLive",
        ):
            assert code_of(channel.unary_unary(path), b"", ()) == "UNAUTHENTICATED"
        bearer = (("authorization", f"Bearer {world.key().text}"),)
        assert code_of(channel.unary_unary("/grpc.health.v1.Health/Check"), b"", bearer) == "OK"
        assert code_of(
            channel.unary_unary("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"), b"", ()
        ) == ("UNAUTHENTICATED")


def test_a_foreign_host(world: World) -> None:
    bearer = (b"authorization", f"Bearer {world.key().text}".encode())
    body = framed(request(OPEN, x=X).SerializeToString())

    def is_served(host: str) -> bool:
        with Connection(world.address) as client:
            answer = client.call(body, change={":authority": host}, more=[bearer])
        # An empty name is malformed, and ends the call.
        assert answer.status == 0 or answer.reset or "this server has another name" in answer.message
        return answer.status == 0

    assert is_served("anything")
    with world.with_policy(hosts=["ai.example", "*.svc.local", "127.0.0.1"]):
        world.until(lambda: not is_served("evil.example"))
        for host in ("127.0.0.1.nip.io", "evil.example", "", "ai.example.evil.example", "svc.local", "[::1]"):
            assert not is_served(host), host
        for host in ("ai.example", "AI.example", "ai.example:8001", "a.svc.local", world.address):
            assert is_served(host), host


# Web pages. Browsers speak HTTP/1.1 without TLS, and gRPC-Web.

PAGE, FOREIGN = "https://app.example.com", "https://evil.example"
WEB, WEB_TEXT = "application/grpc-web+proto", "application/grpc-web-text+proto"


def page(
    world: World, token: str | None, model: str = OPEN, *, method: str = "POST", kind: str = WEB, **more: str
) -> tuple[int, dict[str, str], str]:
    """Send a call as a page does. Return HTTP status, headers, and the gRPC status with its text, "" without one."""
    body = framed(request(model, x=X).SerializeToString())
    sent = base64.b64encode(body) if kind == WEB_TEXT else body
    headers = {"accept": kind, **{name.replace("_", "-"): value for name, value in more.items()}}
    status, found, outcome, _ = web(world, token, sent, method=method, kind=kind, more=headers)
    return status, found, outcome


def web(
    world: World,
    token: str | None,
    body: bytes | list[bytes],
    *,
    path: str = MODEL_INFER,
    method: str = "POST",
    kind: str = WEB,
    more: Mapping[str, str] = {},
) -> tuple[int, dict[str, str], str, list[bytes]]:
    """Send a body, each piece as a chunk of its own. Return as `page` does, and the messages of the response."""
    headers = {"content-type": kind, **more}
    if token is not None:
        headers["authorization"] = f"Bearer {token}"
    connection = http.client.HTTPConnection(world.address, timeout=PATIENCE_S)
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        found = {name.lower(): value for name, value in answer.getheaders()}
        sent = answer.read()
    finally:
        connection.close()
    if "-text" in found.get("content-type", ""):
        # Each part of the text has its own padding.
        sent = b"".join(base64.b64decode(part) for part in re.findall(rb"[^=]+=*", sent))
    trailers, messages = found, []
    # The trailers are the last frame, with its first bit set.
    while sent and answer.status == 200:
        size = int.from_bytes(sent[1:5], "big")
        if sent[0] & 0x80:
            lines = sent[5 : 5 + size].decode().split("\r\n")
            trailers = {name.lower(): value for name, _, value in (line.partition(":") for line in lines)}
        else:
            messages.append(sent[5 : 5 + size])
        sent = sent[5 + size :]
    status = f"{trailers.get('grpc-status', '')} {urllib.parse.unquote(trailers.get('grpc-message', ''))}".strip()
    world.texts.append(f"{status} {found}")
    return answer.status, found, status, messages


@pytest.mark.parametrize("kind", [WEB, WEB_TEXT])
def test_grpc_web_is_decided_as_grpc_is(world: World, kind: str) -> None:
    assert page(world, world.key().text, kind=kind)[2] == "0"
    for token in (None, "x", world.key().text[:-4], signed(world.signer, exp=int(time.time()) - 60)):
        status, _, outcome = page(world, token, kind=kind)
        assert (status, outcome.split()[0]) in {(401, "16"), (200, "16")}, outcome
    for token in (world.key().text, signed(world.signer, jti=REVOKED)):
        model = OPEN if REVOKED in claims_text(token) else SECRET
        assert page(world, token, model, kind=kind)[2].split()[0] == "7"
    for name, value in SPOOFED:
        assert page(world, world.key().text, SECRET, kind=kind, **{name: value})[2].split()[0] == "7", name


def claims_text(token: str) -> str:
    return base64.urlsafe_b64decode(token.split(".")[1] + "==").decode()


def preflight(world: World, origin: str) -> tuple[int, dict[str, str], str]:
    asked = {"access_control_request_method": "POST", "access_control_request_headers": "content-type,x-grpc-web"}
    return page(world, None, method="OPTIONS", origin=origin, **asked)


def test_a_page_that_the_policy_does_not_name_does_nothing(world: World) -> None:
    for origin in (PAGE, FOREIGN, "null", f"http://{world.address}"):
        status, headers, _ = preflight(world, origin)
        assert not [name for name in headers if name.startswith("access-control")], origin
        assert status in (200, 401)
        # Without a preflight: a form, or `mode: "no-cors"`.
        for kind in (WEB, "text/plain", "application/x-www-form-urlencoded"):
            status, headers, _ = page(world, world.key().text, kind=kind, origin=origin)
            assert status == 403, (origin, kind)
            assert not [name for name in headers if name.startswith("access-control")], origin


def test_a_page_that_the_policy_names_reads_responses_and_errors(world: World) -> None:
    with world.with_policy(cors={"origins": ["http://localhost:5173", PAGE]}):
        world.until(lambda: page(world, world.key().text, origin=PAGE)[0] == 200)
        _, asked, _ = preflight(world, PAGE)
        assert asked["access-control-allow-origin"] == PAGE
        assert {"content-type", "x-grpc-web", "authorization", "x-shoal-no-retry"} <= set(
            asked["access-control-allow-headers"].split(",")
        )
        for token, model, expected in (
            (world.key().text, OPEN, "0"),
            (world.key().text, SECRET, "7 "),
            (None, OPEN, "16 no key: send"),
            (world.key().text, "absent", "5 "),
        ):
            _, headers, status = page(world, token, model, origin=PAGE)
            assert status.startswith(expected), status
            assert headers["access-control-allow-origin"] == PAGE
            assert {"grpc-status", "grpc-message"} <= set(headers["access-control-expose-headers"].split(","))
        for origin in (FOREIGN, f"{PAGE}:8443", f"{PAGE}.evil.example", "http://app.example.com", "null"):
            assert page(world, world.key().text, origin=origin)[0] == 403, origin
            assert "access-control-allow-origin" not in preflight(world, origin)[1], origin
        # gRPC clients send no origin.
        assert world.infer(world.key().text) == "OK"


def test_http_1_and_smuggled_requests(world: World) -> None:
    post = f"POST {MODEL_INFER} HTTP/1.1\r\nhost: a\r\n"
    key_line = f"authorization: Bearer {world.key().text}\r\n"
    heads = (
        f"GET / HTTP/1.1\r\nhost: a\r\n{key_line}\r\n",
        f"{post}{key_line}content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        f"{post}content-length: 0\r\ncontent-length: 9\r\n\r\nGET / HTT",
        "GET / HTTP/1.1\r\nhost: a\r\nupgrade: h2c\r\nconnection: upgrade, http2-settings\r\n"
        "http2-settings: AA\r\n\r\n",
        "CONNECT 127.0.0.1:22 HTTP/1.1\r\nhost: a\r\n\r\n",
    )
    bearer = (b"authorization", f"Bearer {world.key().text}".encode())
    body = framed(request(OPEN, x=X).SerializeToString())
    headers = (
        [(b"content-length", b"3")],
        [(b"content-length", b"3"), (b"content-length", b"9")],
        [(b"transfer-encoding", b"chunked")],
        [(b"x", b"a\r\nx-shoal-role: admin")],
        [(b":path", INDEX.encode())],
    )

    def status(more: list[tuple[bytes, bytes]]) -> int | None:
        with Connection(world.address) as client:
            return client.call(body, more=[bearer, *more]).status

    # At once, since Envoy keeps a broken connection for a second.
    with ThreadPoolExecutor(len(heads) + len(headers)) as threads:
        answers = threads.map(lambda head: raw(world.address, head.encode()), heads)
        statuses = threads.map(status, headers)
        assert not [answer for answer in answers if b"HTTP/1.1 2" in answer]
        assert 0 not in list(statuses)
    assert world.infer(world.key().text) == "OK"


# REST.


def rest(
    world: World, method: str, path: str, token: str | None = None, body: Any = None, **more: str
) -> tuple[int, dict[str, Any]]:
    """Make a request of HTTP/1.1; return the status, and the JSON of the response."""
    headers = {name.replace("_", "-"): value for name, value in more.items()}
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    connection = http.client.HTTPConnection(world.address, timeout=PATIENCE_S)
    try:
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        response = connection.getresponse()
        text = response.read()
    finally:
        connection.close()
    # Envoy's own words for a path that is none of REST are plain text.
    return response.status, json.loads(text) if response.headers.get_content_type() == "application/json" else {}


def rest_infer(world: World, token: str | None, model: str = OPEN, **more: str) -> int:
    tensor = {"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}
    status, found = rest(world, "POST", f"/v2/models/{model}/infer", token, {"inputs": [tensor]}, **more)
    assert (found["outputs"][0]["data"] == [2, 4, 6, 8]) if status == 200 else set(found) == {"error"}, found
    return status


def test_rest_admits_and_refuses_as_grpc_does(world: World) -> None:
    key = world.key()
    assert rest_infer(world, key.text) == 200
    for token in (None, "", "x", key.text[:-4], b64(b"{}"), "a.b.c"):
        assert rest_infer(world, token) == 401
    assert rest_infer(world, key.text, SECRET) == 403
    assert rest_infer(world, world.key("globex").text, SECRET) == 200
    assert rest_infer(world, world.key(role="viewer").text) == 403


def test_an_inference_that_becomes_a_job_needs_the_grants_of_both(serve_world: World, node_world: NodeWorld) -> None:
    # A server without jobs ignores the preference.
    assert rest_infer(serve_world, serve_world.key().text, prefer="respond-async") == 200
    body = {"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]}

    def later(token: str | None, model: str = OPEN, **more: str) -> tuple[int, Any]:
        more = {"prefer": "respond-async", "idempotency_key": "attack", **more}
        return rest(node_world, "POST", f"/v2/models/{model}/infer", token, body, **more)

    user = node_world.key().text
    status, found = later(user, x_shoal_tenant="globex", x_shoal_caller=LAUNCHER.decode())
    assert (status, found["job"]["tenant"]) == (202, "acme")
    assert later(user)[1]["job"]["id"] == found["job"]["id"]
    assert later(node_world.key("globex").text)[1]["job"]["id"] != found["job"]["id"]
    encoded = "".join(f"%{ord(letter):02x}" for letter in SECRET)
    for token, model, wanted in (
        (None, OPEN, 401),
        (user[:-4], OPEN, 401),
        (node_world.key(role="viewer").text, OPEN, 403),
        (user, SECRET, 403),
        (user, encoded, 403),
        (node_world.key(models=["none"]).text, OPEN, 403),
    ):
        status, refused = later(token, model)
        assert (status, refused.keys()) == (wanted, {"error"}), model
    watch = f"/shoal/v1/jobs/{found['job']['id']}:watch"
    assert rest(node_world, "GET", watch, node_world.key("globex").text)[0] == 404
    assert rest(node_world, "GET", watch, node_world.key(role="viewer").text)[0] == 403


def test_rest_takes_no_name_of_a_model_or_caller_from_elsewhere(world: World) -> None:
    key, other = world.key().text, world.key("globex")
    assert rest_infer(world, None, x_shoal_caller=LAUNCHER.decode()) == 401
    assert rest_infer(world, key, SECRET, x_shoal_tenant="globex", x_shoal_caller=b64(b"{}"), x_shoal_model=OPEN) == 403
    assert rest_infer(world, key, f"{OPEN}/../{SECRET}") != 200
    encoded = "".join(f"%{ord(letter):02x}" for letter in SECRET)
    twice = encoded.replace("%", "%25")
    assert rest_infer(world, key, encoded) == 403
    assert rest_infer(world, other.text, encoded) == 200
    assert rest_infer(world, other.text, twice) == 404
    for name in (
        f"{OPEN}%2f..%2f{SECRET}",
        f"..%2fmodels%2f{SECRET}",
        f"%2e%2e/models/{SECRET}",
        f"{OPEN}%00",
        f"{OPEN};{SECRET}",
    ):
        assert rest_infer(world, key, name) in (400, 403, 404), name


@pytest.mark.parametrize(
    ("method", "path", "least"),
    [
        ("GET", "/v2/health/live", "viewer"),
        ("GET", "/v2/health/ready?x=y", "viewer"),
        ("GET", "/v2", "viewer"),
        ("GET", f"/v2/models/{OPEN}", "viewer"),
        ("GET", f"/v2/models/{OPEN}/versions/1/config", "viewer"),
        ("GET", "/v2/models/stats", "viewer"),
        ("POST", "/v2/repository/index", "viewer"),
        ("POST", f"/v2/models/{OPEN}/generate", "user"),
        ("POST", f"/v2/models/{OPEN}/generate_stream", "user"),
        ("POST", "/v2/repository/models/none/unload", "publisher"),
        ("POST", "/v2/repository/models/none/load", "publisher"),
        ("GET", "/v2/trace/setting", "operator"),
        ("GET", "/v2/logging", "operator"),
    ],
)
def test_each_path_of_rest_belongs_to_the_group_of_its_rpc(world: World, method: str, path: str, least: str) -> None:
    allowed = {
        "viewer": {"viewer", "user", "publisher", "operator"},
        "user": {"user", "publisher"},
        "publisher": {"publisher"},
        "operator": {"operator"},
    }[least]
    assert rest(world, method, path)[0] == 401
    body = {"x": [1, 2, 3, 4]} if "generate" in path else None
    for role in ("viewer", "user", "publisher", "operator"):
        status, _ = rest(world, method, path, world.key(role=role).text, body)
        assert (status == 403) is (role not in allowed), (role, status)


@pytest.mark.parametrize("path", ["/v2/nothing", "/v2/models/open/nothing", "/v1/models/open", "/", "/v2x", "/metrics"])
def test_a_path_that_is_no_path_of_rest_is_refused(world: World, path: str) -> None:
    assert rest(world, "GET", path, world.key("globex", "admin").text)[0] in (403, 404)


def test_models_of_others_are_in_no_list_of_rest(world: World) -> None:
    for tenant, names in (("acme", {OPEN}), ("globex", {OPEN, SECRET})):
        key = world.key(tenant).text
        index: Any = rest(world, "POST", "/v2/repository/index", key)[1]
        assert {row["name"] for row in index} == names
        statistics = rest(world, "GET", "/v2/models/stats", key)[1]["model_stats"]
        assert {row["name"] for row in statistics} == names


def test_a_load_with_parameters_needs_the_grant_of_code(world: World) -> None:
    path, parameters = f"/v2/repository/models/{OPEN}/load", {"parameters": {"config": "{}"}}
    status, found = rest(world, "POST", path, world.key(role="publisher").text, parameters)
    assert (status, "code" in found["error"]) == (403, True)


# Models.


def test_a_second_message_of_a_stream_that_names_another_model(world: World) -> None:
    names = [OPEN, SECRET, OPEN]
    with world.channel() as channel:
        stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        bearer = (("authorization", f"Bearer {world.key().text}"),)
        stream = stub.ModelStreamInfer(
            iter([request(name, x=X) for name in names]), metadata=bearer, timeout=PATIENCE_S
        )
        codes = [answer.infer_response.parameters[ERROR_CODE_PARAMETER].int64_param for answer in stream]
    assert codes == [0, Code.PERMISSION_DENIED, 0]


def test_a_name_twice_in_one_message(world: World) -> None:
    known = request(OPEN, x=X).SerializeToString()
    second = pb.ModelInferRequest(model_name=SECRET).SerializeToString()
    bearer = (("authorization", f"Bearer {world.key().text}"),)
    with world.channel() as channel:
        call = channel.unary_unary(MODEL_INFER)
        for body, expected in [
            (known, "OK"),
            (known + second, "PERMISSION_DENIED"),
            (second + known, "OK"),
            (known + second, "PERMISSION_DENIED"),
        ]:
            assert code_of(call, body, bearer) == expected


def test_names_that_are_read_differently(world: World) -> None:
    good = world.key().text
    for name in ("", " ", "secret/", "./secret", "SECRET", "secre%74", "open/../secret", "secret\0", "*"):
        assert world.infer(good, name) != "OK", name


def test_a_key_for_some_models(world: World) -> None:
    made = world.key("globex", models=["o*n"])
    assert world.infer(made.text) == "OK"
    assert world.infer(made.text, SECRET).startswith("PERMISSION_DENIED not allowed: the key is not for the model")
    assert world.infer(world.key("globex", models=["o", "*x"]).text).startswith("PERMISSION_DENIED")


# Changes of the policy.


def test_a_revocation_ends_the_open_stream_and_the_next_call_and_nobody_elses(world: World) -> None:
    revoked, other = world.key(), world.key()
    done = threading.Event()

    def messages() -> Iterator[pb.ModelInferRequest]:
        yield request(OPEN, x=X)
        done.wait(PATIENCE_S)

    with world.channel() as channel:
        stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        streams = {
            made.id: stub.ModelStreamInfer(
                messages(), metadata=(("authorization", f"Bearer {made.text}"),), timeout=4 * PATIENCE_S
            )
            for made in (revoked, other)
        }
        for stream in streams.values():
            next(stream)
        with world.with_policy(revoked=[REVOKED, revoked.id]):
            with pytest.raises(grpc.RpcError) as caught:
                next(streams[revoked.id])
            assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
            assert f"the key {revoked.id} is revoked" in caught.value.details()
            # On the connection that was open before.
            denied = outcome(channel, OPEN, (("authorization", f"Bearer {revoked.text}"),))
            assert denied.startswith("PERMISSION_DENIED")
            assert outcome(channel, OPEN, (("authorization", f"Bearer {other.text}"),)) == "OK"
            assert streams[other.id].is_active()
        done.set()
        assert list(streams[other.id]) == []


def test_a_change_of_the_policy_closes_no_stream_and_no_connection(world: World) -> None:
    done = threading.Event()

    def messages() -> Iterator[pb.ModelInferRequest]:
        yield request(OPEN, x=X)
        done.wait(2 * PATIENCE_S)
        yield request(OPEN, x=X)

    globex = world.key("globex").text
    with world.channel() as channel:
        stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        bearer = (("authorization", f"Bearer {world.key().text}"),)
        streams = [stub.ModelStreamInfer(messages(), metadata=bearer, timeout=4 * PATIENCE_S) for _ in range(64)]
        for stream in streams:
            next(stream)
        grants = [*GRANTS, {"name": "none", "tenants": ["globex"], "deny": ["infer"], "models": ["*"]}]
        with world.with_policy(grants=grants, revoked=[REVOKED, "k-another"]):
            world.until(lambda: outcome(channel, OPEN, (("authorization", f"Bearer {globex}"),)) != "OK")
            done.set()
            assert [len(list(stream)) for stream in streams] == [1] * 64
    world.until(lambda: world.infer(globex) == "OK")


def test_removing_the_key_of_a_signer_ends_the_streams_of_its_keys_and_nobody_elses(
    world: World, tmp_path: Path
) -> None:
    stolen = tokens.create_signer(tmp_path / "stolen.json", world.signer.issuer)
    made = {"stolen": key(stolen), "own": world.key()}
    world.secrets.add(made["stolen"].text)
    both = issuer(world.signer, jwks={"keys": [world.signer.public_jwk(), stolen.public_jwk()]})
    done = threading.Event()

    def messages() -> Iterator[pb.ModelInferRequest]:
        yield request(OPEN, x=X)
        done.wait(PATIENCE_S)

    with world.channel() as channel, world.with_policy(issuers=[both]):
        world.until(lambda: world.infer(made["stolen"].text) == "OK")
        stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        streams = {
            name: stub.ModelStreamInfer(
                messages(), metadata=(("authorization", f"Bearer {one.text}"),), timeout=4 * PATIENCE_S
            )
            for name, one in made.items()
        }
        for stream in streams.values():
            next(stream)
        world.set_policy(issuers=[issuer(world.signer)])
        with pytest.raises(grpc.RpcError) as caught:
            next(streams["stolen"])
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert "the key that signed the token is no longer in the policy" in caught.value.details()
        world.until(lambda: world.infer(made["stolen"].text).startswith("UNAUTHENTICATED"))
        assert streams["own"].is_active()
        done.set()
        assert list(streams["own"]) == []


def test_a_grant_that_is_taken_away_and_an_invalid_policy(world: World) -> None:
    globex = world.key("globex").text
    grants = [*GRANTS, {"name": "none", "tenants": ["globex"], "deny": ["infer"], "models": [SECRET]}]
    with world.with_policy(grants=grants):
        world.until(lambda: world.infer(globex, SECRET).startswith("PERMISSION_DENIED"))
        world.apply_invalid()
        assert world.infer(globex, SECRET).startswith("PERMISSION_DENIED"), "the former policy stays in force"
        assert world.infer(globex) == "OK"
    world.until(lambda: world.infer(globex, SECRET) == "OK")


def test_a_signer_that_is_replaced_ends_its_keys(world: World, tmp_path: Path) -> None:
    other = tokens.create_signer(tmp_path / "other.json", world.signer.issuer)
    old, new = world.key().text, key(other).text
    world.secrets.add(new)
    with world.with_policy(
        issuers=[issuer(world.signer, jwks={"keys": [*world.signer.jwks()["keys"], other.public_jwk()]})]
    ):
        world.until(lambda: world.infer(new) == "OK")
        assert world.infer(old) == "OK", "both signers are valid while keys are exchanged"
        world.set_policy(issuers=[issuer(world.signer, jwks=other.jwks())])
        world.until(lambda: world.infer(old).startswith("UNAUTHENTICATED"))
        assert world.infer(new) == "OK"


def test_open_health_checks(world: World) -> None:
    def check(path: str) -> str:
        with world.channel() as channel:
            return code_of(channel.unary_unary(path), b"", ())

    with world.with_policy(open=["health"]):
        world.until(lambda: check("/grpc.health.v1.Health/Check") == "OK")
        world.until(lambda: check("/inference.GRPCInferenceService/ServerReady") == "OK")
        assert check("/inference.GRPCInferenceService/ServerMetadata") == "UNAUTHENTICATED"
        assert world.infer(None).startswith("UNAUTHENTICATED")
        admin = passed(claims_of(world.key("globex", "admin")))
        assert world.infer(None, more=(admin,)).startswith("UNAUTHENTICATED")
    world.until(lambda: check("/grpc.health.v1.Health/Check") == "UNAUTHENTICATED")


# What only a node has.


def test_changes_of_the_policy_under_load_fail_no_call(node_world: NodeWorld) -> None:
    stopped = threading.Event()
    bearer = (("authorization", f"Bearer {node_world.key().text}"),)

    def load() -> list[str]:
        outcomes = []
        with node_world.channel() as channel:
            while not stopped.is_set():
                outcomes.append(outcome(channel, OPEN, bearer))
        return outcomes

    with ThreadPoolExecutor(2) as threads, node_world.client() as client:
        loads = [threads.submit(load) for _ in range(2)]
        try:
            before = client.access.policy().policy.version
            for number in range(3):
                node_world.set_policy(revoked=[REVOKED, f"k-{number}"], hosts=["*"])
                assert client.access.roll_back(before).rolled_back_to == before
            # A coord that dies: the next one gives Envoy no other configuration.
            old = node_world.node.kill("coord-0")
            node_world.node.wait_until_restarted("coord-0", old)
            node_world.until(lambda: bool(_version_or_none(client)))
        finally:
            stopped.set()
        outcomes = [one for done in loads for one in done.result()]
        assert client.access.policy().policy.version == before + 6
    assert outcomes
    assert set(outcomes) == {"OK"}


def _version_or_none(client: shoal.Client) -> int | None:
    try:
        return client.access.policy().policy.version
    except ShoalError:
        return None


def test_a_revoked_key_is_refused_everywhere_when_revoke_returns_and_its_streams_have_ended(
    node_world: NodeWorld,
) -> None:
    with node_world.client() as client, node_world.channel() as channel:
        made = client.access.create_key(tenant="acme", role="user", subject="ann")
        node_world.secrets.add(made.key)
        bearer = (("authorization", f"Bearer {made.key}"),)
        idle = threading.Event()

        def messages() -> Iterator[pb.ModelInferRequest]:
            yield request(OPEN, x=X)
            idle.wait(PATIENCE_S)

        node_world.until(lambda: outcome(channel, OPEN, bearer) == "OK")
        streams = {
            "infer": inference_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer(
                messages(), metadata=bearer, timeout=4 * PATIENCE_S
            ),
            "store": channel.unary_stream("/shoal.store.v1.StoreService/WatchModels")(b"", metadata=bearer),
            "ingest": channel.unary_stream("/shoal.ingest.v1.IngestService/WatchJobs")(b"", metadata=bearer),
            "coord": channel.unary_stream("/shoal.coord.v1.CoordService/WatchInstances")(b"", metadata=bearer),
        }
        next(streams["infer"])
        assert all(stream.is_active() for stream in streams.values())
        client.access.revoke_key(made.info.id, timeout=4 * PATIENCE_S)
        assert [outcome(channel, OPEN, bearer)[:17] for _ in range(50)] == ["PERMISSION_DENIED"] * 50
        for name, stream in streams.items():
            with pytest.raises(grpc.RpcError) as caught:
                list(stream)
            assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED, name
            assert f"the key {made.info.id} is revoked" in caught.value.details(), name
        idle.set()
        keys = client.access.keys()
        (listed,) = [key for key in keys if key.id == made.info.id]
        assert listed.revoked
        assert (listed.tenant, listed.role, listed.subject) == ("acme", "user", "ann")


def test_a_tenant_sees_the_spans_of_its_own_failed_calls_alone(node_world: NodeWorld) -> None:
    failing = """
class Model:
    inputs = {"x": ("FP32", [-1, 4])}
    outputs = {"y": ("FP32", [-1, 4])}

    def predict(self, batch):
        if batch["x"].any():
            raise RuntimeError("failing")
        return {"y": batch["x"]}
"""
    folder = python_model(node_world.folder / "failing", failing)
    with node_world.client() as client:
        assert client.models.push(folder)[0].ready
    bearer = (("authorization", f"Bearer {node_world.key('acme').text}"),)
    with node_world.channel() as channel:
        infer = inference_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer
        with pytest.raises(grpc.RpcError) as caught:
            infer(request("failing", x=X), metadata=(*bearer, ("x-shoal-tenant", "globex")), timeout=PATIENCE_S)
    trace = trace_of(caught.value.trailing_metadata())
    assert trace
    for tenant, role, count in (("acme", "user", 1), ("globex", "user", 0), ("globex", "operator", 1)):
        with shoal.Client(node_world.address, token=node_world.key(tenant, role).text) as client:
            assert len(client.spans(trace).spans) == count, (tenant, role)
            # The first digits alone, and the latest of all calls.
            assert sum(span.trace == trace for span in client.spans(trace[:8]).spans) == count
            assert sum(span.trace == trace for span in client.spans().spans) == count


def test_services_methods_have_no_route_and_a_service_can_be_named_by_nobody(node_world: NodeWorld) -> None:
    with node_world.client() as client:
        admin = client.access.create_key(tenant="local", role="admin").key
    node_world.secrets.add(admin)
    bearer = (("authorization", f"Bearer {admin}"),)
    with node_world.channel() as channel:
        for rpc in (rpc for rpc, group in GROUP_OF.items() if group == INTERNAL):
            for more in ((), (("x-shoal-caller", SERVICE.decode()), ("x-shoal-model", OPEN))):
                code = code_of(channel.unary_unary(rpc), b"", (*bearer, *more))
                assert code in ("PERMISSION_DENIED", "UNIMPLEMENTED"), rpc
        ads = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources"
        assert code_of(channel.unary_unary(ads), b"", bearer) in ("PERMISSION_DENIED", "UNIMPLEMENTED")


def test_the_signer_is_rotated_and_after_a_theft_all_its_keys_end(node_world: NodeWorld) -> None:
    def run(*args: str, code: int = 0) -> str:
        done = node_world.node.shoal(*args, check=False)
        assert done.returncode == code, done.stderr
        return done.stdout

    old = run("keys", "create", "--tenant", "acme", "--role", "user", "--expires", "1h").strip()
    node_world.secrets.add(old)
    node_world.until(lambda: node_world.infer(old) == "OK")
    with node_world.client() as client:
        client.access.rotate_signer()
        new = client.access.create_key(tenant="acme", role="user").key
    node_world.secrets.add(new)
    assert node_world.infer(new) == "OK"
    assert node_world.infer(old) == "OK", "keys of the former signer are valid until they expire"
    node_world.secrets.add((node_world.node.data_dir / "admin.key").read_text().strip())
    assert run("keys", "rotate", "--stolen") == ""
    # The node's user has got another key, in its file; all others have ended, and nobody else's have.
    for text in (old, new):
        assert node_world.infer(text).startswith(("UNAUTHENTICATED", "PERMISSION_DENIED"))
    assert node_world.infer(node_world.key().text) == "OK"
    assert "master key: data folder" in run("status")


def test_the_policy_in_force_is_explained_for_a_key_its_id_and_a_foreign_token(node_world: NodeWorld) -> None:
    def explained(option: str, text: str, model: str) -> tuple[int, str]:
        done = node_world.node.shoal(
            "policy", "explain", option, text, "--call", "ModelInfer", "--model", model, check=False
        )
        return done.returncode, done.stdout.splitlines()[-1] if done.returncode < 2 and done.stdout else done.stderr

    with node_world.client() as client:
        made = client.access.create_key(tenant="acme", role="user", subject="ann")
        node_world.secrets.add(made.key)
        assert explained("--key", made.key, OPEN) == explained("--key", made.info.id, OPEN)
        assert explained("--key", made.info.id, OPEN)[0] == 0
        code, said = explained("--key", made.info.id, SECRET)
        assert (code, "no-secrets" in said) == (1, True)
        code, said = explained("--token", node_world.key("globex").text, SECRET)
        assert (code, said.startswith("allowed")) == (0, True)
        client.access.revoke_key(made.info.id, timeout=4 * PATIENCE_S)
    code, said = explained("--key", made.key, OPEN)
    assert (code, f"{made.info.id} is revoked" in said) == (1, True)
    code, said = explained("--key", "k-unknown", OPEN)
    assert (code, "no such key" in said) == (1, True)


def test_the_nodes_user_comes_back_after_a_policy_that_locks_everybody_out(node_world: NodeWorld) -> None:
    data_dir = str(node_world.node.data_dir)
    with node_world.client() as client:
        before = client.access.policy().policy.version
        nobody = yaml.safe_dump({**node_world.document, "grants": []})
        assert client.access.apply(nobody, force=True).version == before + 1
        with pytest.raises(PermissionDenied):
            client.access.policy()
        done = node_world.node.shoal("policy", "rollback", str(before), check=False)
        # Whoever knows the policy first refuses: the Envoy or coord.
        assert done.returncode == 1
        assert "not allowed" in done.stderr or "access denied" in done.stderr
        done = node_world.node.shoal("policy", "rollback", str(before), "--data-dir", data_dir)
        assert f"version {before + 2} is in force: the document of version {before}" in done.stdout
        node_world.until(lambda: _version_or_none(client) == before + 2)
        (entry,) = [
            one for one in client.audit.list(kinds=["act"]) if (one.subject, one.rpc) == ("launcher", ROLL_BACK)
        ]
        assert entry.origin == "local/coord-0"
    done = node_world.node.shoal("policy", "rollback", "1", "--data-dir", str(node_world.folder), check=False)
    assert (done.returncode, "no node of yours runs on" in done.stderr) == (1, True)


def test_the_nodes_user_restores_the_copy_of_a_policy(node_world: NodeWorld) -> None:
    copy = node_world.node.data_dir / "policy.json"
    node_world.set_policy(hosts=["*", "lost.example"])
    node_world.until(lambda: "lost.example" in copy.read_text())
    text = copy.read_text()
    node_world.set_policy()
    node_world.until(lambda: "lost.example" not in copy.read_text())
    copy.write_text(text)
    done = node_world.node.shoal("policy", "restore", "--data-dir", str(node_world.node.data_dir))
    assert "is in force: the copy of version" in done.stdout, done.stderr
    with node_world.client() as client:
        assert "lost.example" in client.access.policy().in_force
    node_world.set_policy()


def test_a_publisher_learns_nothing_of_files_of_another_tenant(node_world: NodeWorld) -> None:
    """A trial of a model with a file that another tenant has stored ends as one with a file that nobody has."""
    secret = os.urandom(1_000)
    with node_world.client() as client:
        publisher = {
            tenant: client.access.create_key(tenant=tenant, role="publisher").key for tenant in ("acme", "globex")
        }
    node_world.secrets |= {*publisher.values()}
    stored, unknown = hashlib.sha256(secret).hexdigest(), hashlib.sha256(os.urandom(8)).hexdigest()
    with node_world.channel() as channel:
        bearers = {tenant: (("authorization", f"Bearer {text}"),) for tenant, text in publisher.items()}
        upload = [
            store_pb2.PutArtifactRequest(header={"sha256": stored, "size_bytes": len(secret)}),
            store_pb2.PutArtifactRequest(chunk=secret),
        ]
        stub = store_pb2_grpc.StoreServiceStub(channel)
        node_world.until(lambda: node_world.infer(publisher["acme"]) == "OK")
        stub.PutArtifact(iter(upload), metadata=bearers["acme"], timeout=PATIENCE_S)

        def trial(tenant: str, digest: str) -> tuple[str, str]:
            model = store_pb2.ModelVersion(name=OPEN, files=[{"path": "model.onnx", "sha256": digest}])
            model.files[0].size_bytes = len(secret)
            asked = trial_pb2.TryModelRequest(model=model.SerializeToString())
            with pytest.raises(grpc.RpcError) as caught:
                list(trial_pb2_grpc.ModelTrialsStub(channel).TryModel(asked, metadata=bearers[tenant], timeout=60))
            return caught.value.code().name, caught.value.details().replace(digest, "DIGEST")

        # Its own file is fetched, into the cache of every tenant, and is no model.
        assert trial("acme", stored)[0] == "FAILED_PRECONDITION"
        assert trial("globex", stored) == trial("globex", unknown)
        assert trial("globex", stored)[0] == "NOT_FOUND"
        stat = store_pb2.StatArtifactRequest(sha256=stored, caller=b"service")
        with pytest.raises(grpc.RpcError, match="only a service may name another caller"):
            stub.StatArtifact(stat, metadata=bearers["globex"], timeout=PATIENCE_S)


def test_a_batch_an_export_and_a_backup_reach_no_place_but_their_own(node_world: NodeWorld) -> None:
    data = node_world.node.data_dir
    own, others = data / "batches" / "acme", data / "batches" / "globex"
    for folder in (own, others, data / "batches" / "acme2"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "in.jsonl").write_text('{"x": [1, 2, 3, 4]}\n')
    exports = data / "exports"
    for folder in (exports / "acme", exports / "globex"):
        folder.mkdir(parents=True)
    (own / "link").symlink_to(others)
    (exports / "acme" / "link").symlink_to(exports / "globex")
    elsewhere = [
        "s3://bucket",
        "s3://bucket/acme",
        "S3://bucket/acme",
        "s3://key:secret@bucket/acme",
        "gs://bucket/acme",
        "file:///etc/passwd",
        "FILE:///etc/passwd",
        data.as_uri(),
        others.as_uri(),
        f"{own.as_uri()}2",
        f"{own.as_uri()}/../globex",
        f"{own.as_uri()}/%2e%2e/globex",
        f"{own.as_uri()}%2f..%2fglobex",
        f"{own.as_uri()}/link",
    ]
    with shoal.Client(node_world.address, token=node_world.key().text) as client:
        for number, place in enumerate(elsewhere):
            for source, output in (
                (f"{place}/in.jsonl", f"{own.as_uri()}/out-{number}"),
                (f"{place}/", f"{own.as_uri()}/out-{number}"),
                (f"{own.as_uri()}/in.jsonl", f"{place}/out-{number}"),
            ):
                with pytest.raises((PermissionDenied, InvalidArgument), match=r"inputs\[0\]: |output: "):
                    client.batches.submit(OPEN, source, output)
            with pytest.raises((PermissionDenied, InvalidArgument), match="url: "):
                list(client.results.export(place.replace("/batches/", "/exports/")))
        assert not list((exports / "globex").iterdir())
        batch = client.batches.submit(OPEN, f"{own.as_uri()}/in.jsonl", f"{own.as_uri()}/out")
        assert client.batches.wait(batch.id, timeout=PATIENCE_S).rows_ok == 1
        assert not [path for path in others.rglob("*") if path.name != "in.jsonl"]
        assert list(client.results.export(f"{exports.as_uri()}/acme/first"))[-1].complete
    operator = node_world.key(role="operator").text
    with shoal.Client(node_world.address, token=operator) as client:
        for place in ("s3://bucket/backups", f"{node_world.folder.as_uri()}/backups", (data / "blobs").as_uri()):
            with pytest.raises(PermissionDenied, match="name it in SHOAL_STORE_BACKUPS"):
                list(client.store.backup(place))
        assert list(client.store.backup(f"{data.as_uri()}/backups"))[-1].complete


def test_tokens_of_an_openid_provider_that_rolls_its_keys_and_goes_away(node_world: NodeWorld, tmp_path: Path) -> None:
    first, second = signing_key("first"), signing_key("second")
    address = f"127.0.0.1:{free_port()}"
    url = f"http://{address}"
    claims = {"tenant": "org.id", "models": "may", "role": "job"}
    trusted = {"issuer": url, "audiences": ["models"], "discovery": True, "claims": claims}
    coord_log = node_world.node.data_dir / "logs" / "coord-0.log"
    with node_world.with_policy(issuers=[*node_world.document["issuers"], trusted]):
        with OidcProvider(address, [first], tmp_path / "first.log") as provider:
            old = provider.token()
            node_world.secrets.add(old)
            node_world.until(lambda: node_world.infer(old) == "OK")
            assert node_world.infer(old, SECRET).startswith("PERMISSION_DENIED")
        with OidcProvider(address, [second, first], tmp_path / "both.log") as provider:
            new = provider.token()
            node_world.secrets.add(new)
            assert jwt.get_unverified_header(new)["kid"] == "second"
            node_world.until(lambda: node_world.infer(new) == "OK")
            assert node_world.infer(old) == "OK", "the provider still publishes the key"
        # An outage, in which no process of the node keeps what it knew.
        missed = f"the keys of the issuer {url} stay the last known ones"
        node_world.until(lambda: missed in coord_log.read_text())
        for name in ("coord-0", "envoy"):
            node_world.node.wait_until_restarted(name, node_world.node.kill(name))
        node_world.until(lambda: node_world.infer(new) == "OK")
        assert node_world.infer(old) == "OK"
        with OidcProvider(address, [second], tmp_path / "second.log"):
            node_world.until(lambda: node_world.infer(old).startswith("UNAUTHENTICATED"))
            assert node_world.infer(new) == "OK"


def test_acts_and_refusals_are_in_the_audit_log_which_names_an_entry_that_was_edited(node_world: NodeWorld) -> None:
    began = datetime.now(UTC)
    admin = (node_world.node.data_dir / "admin.key").read_text().strip()
    with node_world.client() as client:
        made = client.access.create_key(tenant="acme", role="user", subject="eve")
        node_world.secrets.add(made.key)
        node_world.until(lambda: node_world.infer(made.key) == "OK")
        # An act that fails, over REST, and one over JSON.
        assert rest(node_world, "POST", f"/v2/repository/models/{OPEN}/load", admin)[0] == 400
        assert (
            rest(node_world, "POST", "/shoal/v1/keys/k-audited:revoke", admin, {}, content_type="application/json")[0]
            == 200
        )
        # Refusals by the gateway, by a service, and before anybody knows who calls.
        assert rest(node_world, "GET", "/shoal/v1/keys", made.key)[0] == 403
        assert rest(node_world, "POST", f"/v2/repository/models/{OPEN}/load", made.key)[0] == 403
        assert node_world.infer(made.key, SECRET).startswith("PERMISSION_DENIED")
        assert rest(node_world, "GET", "/shoal/v1/policy")[0] == 401
        assert rest(node_world, "GET", "/v2", "shoal_x")[0] == 401
        assert node_world.infer("shoal_x").startswith("UNAUTHENTICATED")

        def entries(kind: str, **wanted: object) -> list[shoal.client.AuditEntry]:
            found = client.audit.list(kinds=[kind], since=began - timedelta(seconds=1))
            return [one for one in found if all(getattr(one, name) == value for name, value in wanted.items())]

        access, inference = "/shoal.coord.v1.AccessService/", "/inference.GRPCInferenceService/"
        for rpc, target, code in (
            (f"{access}CreateKey", "acme", Code.OK),
            (f"{access}RevokeKey", "k-audited", Code.OK),
            (f"{inference}RepositoryModelLoad", OPEN, Code.FAILED_PRECONDITION),
        ):
            (act,) = entries("act", tenant="local", role="admin", rpc=rpc, target=target)
            node_world.until(lambda act=act: len(entries("outcome", of=act.id)) == 1)  # type: ignore[misc]
            assert [(one.code, one.address) for one in entries("outcome", of=act.id)] == [(code, "127.0.0.1")], rpc
        for rpc, subject, code in (
            (f"{access}ListKeys", "eve", Code.PERMISSION_DENIED),
            (f"{inference}RepositoryModelLoad", "eve", Code.PERMISSION_DENIED),
            (MODEL_INFER, "eve", Code.PERMISSION_DENIED),
            (f"{access}GetPolicy", "", Code.UNAUTHENTICATED),
        ):
            wanted = {"rpc": rpc, "subject": subject, "code": code, "address": "127.0.0.1"}
            node_world.until(lambda wanted=wanted: len(entries("refusal", **wanted)) >= 1)  # type: ignore[misc]
        # The first call of a key from an address, and no further one.
        assert rest(node_world, "GET", "/v2", made.key)[0] == 200
        assert node_world.infer(made.key) == "OK"
        node_world.until(lambda: entries("sign-in", subject="eve") != [])
        signed_in = entries("sign-in", subject="eve")
        assert {(one.rpc, one.tenant, one.key, one.address) for one in signed_in} == {
            (MODEL_INFER, "acme", made.info.id, "127.0.0.1")
        }
        assert len({one.origin for one in signed_in}) == len(signed_in)
        # One cause has one reason, over REST and gRPC.
        form = "Jwt is not in the form of Header.Payload.Signature with two dots and 3 sections"
        whole = f"{form}: send a whole key as 'authorization: Bearer KEY' (`shoal keys create` makes one)"
        for rpc in (f"{inference}ServerMetadata", MODEL_INFER):
            node_world.until(lambda rpc=rpc: entries("refusal", rpc=rpc, reason=whole) != [])  # type: ignore[misc]
        assert [one.reason for one in entries("act", rpc=f"{access}CreateKey", target="acme")] == [
            "role user, tenant acme, subject eve"
        ]
        assert all(re.fullmatch("[0-9a-f]{32}", one.trace_id) for one in entries("act") + entries("outcome"))
        assert not entries("act", subject="eve")
        log = repr(entries("act") + entries("outcome") + entries("refusal") + entries("sign-in"))
        assert not [secret for secret in node_world.secrets if secret.rpartition(".")[2] in log]
        (act,) = entries("act", rpc=f"{access}CreateKey", target="acme")
    assert "no problems" in node_world.node.shoal("audit", "verify").stdout

    (store,) = (pid for name, pid in node_world.node.pids().items() if name == "store-0")
    environ = dict(line.partition("=")[::2] for line in Path(f"/proc/{store}/environ").read_text().split("\0"))
    with MongoClient(environ["SHOAL_STORE_MONGO"]) as mongo:
        audit = mongo["shoal"]["audit"]
        assert audit.update_one({"_id": act.id}, {"$set": {"subject": "eve"}}).modified_count == 1
        done = node_world.node.shoal("audit", "verify", check=False)
        assert done.returncode == 1
        assert act.id in done.stdout
        audit.update_one({"_id": act.id}, {"$set": {"subject": act.subject}})
    assert "no problems" in node_world.node.shoal("audit", "verify").stdout


# Floods.


def test_wrong_tokens_do_not_delay_a_bystander(world: World, tmp_path: Path) -> None:
    """Many wrong signatures, as fast as they go, beside calls that all succeed."""
    other = tokens.create_signer(tmp_path / "other.json", world.signer.issuer)
    forged = Signer(world.signer.issuer, world.signer.kid, other.private_key)
    wrong = [f"Bearer {key(forged).text}".encode() for _ in range(20)]
    refused: list[int | None] = []

    def flood() -> None:
        with Connection(world.address) as client:
            for number in range(FORGED):
                refused.append(client.call(framed(b""), more=[(b"authorization", wrong[number % 20])]).status)

    thread = threading.Thread(target=flood)
    thread.start()
    good = (("authorization", f"Bearer {world.key().text}"),)
    with world.channel() as channel:
        calls = 0
        while thread.is_alive() or not calls:
            assert outcome(channel, OPEN, good) == "OK"
            calls += 1
    thread.join()
    assert refused == [Code.UNAUTHENTICATED] * FORGED


# The same decision everywhere.


def test_the_server_decides_as_the_function_does(world: World) -> None:
    """Random calls: `decide` and the real server agree about each."""
    chance = random.Random(14)
    grants = [
        {"name": "a", "roles": ["user", "publisher"], "models": ["*"]},
        {"name": "b", "tenants": ["acme"], "roles": ["viewer"], "allow": ["read"], "models": ["o*"]},
        {"name": "c", "tenants": ["globex"], "allow": ["infer"], "models": [OPEN]},
        {"name": "d", "subjects": ["eve"], "deny": ["*"], "models": ["*"]},
        {"name": "e", "tenants": ["acme"], "deny": ["infer"], "models": ["s*"]},
        {"name": "f", "by_name": True, "allow": ["*"], "models": ["*"]},
    ]
    methods = {
        "ServerLive": lambda model: (pb.ServerLiveRequest(), None),
        "ServerMetadata": lambda model: (pb.ServerMetadataRequest(), None),
        "ModelMetadata": lambda model: (pb.ModelMetadataRequest(name=model), model),
        "ModelReady": lambda model: (pb.ModelReadyRequest(name=model), model),
        "ModelInfer": lambda model: (request(model, x=X), model),
        "RepositoryIndex": lambda model: (pb.RepositoryIndexRequest(), None),
        "TraceSetting": lambda model: (pb.TraceSettingRequest(), None),
    }
    made = world.document
    expected = policy(world.signer, issuers=made["issuers"], grants=grants, revoked=[REVOKED], open=["health"])
    with world.with_policy(grants=grants, open=["health"]), world.channel() as channel:
        viewer = world.key("globex", "viewer").text
        # Envoy takes the two parts of a policy one after the other.
        live = channel.unary_unary("/inference.GRPCInferenceService/ServerLive")
        world.until(lambda: world.infer(viewer) == "OK" and code_of(live, b"", ()) == "OK")
        disagreed = []
        for _ in range(by_form(150, 300)):
            options = {
                "tenant": chance.choice(["acme", "globex", "third"]),
                "role": chance.choice(["viewer", "user", "publisher", "operator", "boss"]),
                "subject": chance.choice(["", "", "eve"]),
                "models": chance.choice([["*"], ["*"], ["o*"], ["x"]]),
                "grants": chance.choice([[], [], ["f"]]),
            }
            token = None if chance.random() < 0.1 else world.key(**options).text
            method, model = chance.choice([*methods]), chance.choice([OPEN, SECRET])
            message, named = methods[method](model)
            rpc = f"/inference.GRPCInferenceService/{method}"
            caller = (
                None if token is None else caller_of(expected, tokens.verified_claims(expected, token, time.time()))
            )
            bearer = () if token is None else (("authorization", f"Bearer {token}"),)
            code = code_of(channel.unary_unary(rpc), message.SerializeToString(), bearer)
            allowed = code not in ("PERMISSION_DENIED", "UNAUTHENTICATED")
            if allowed is not decide(expected, caller, rpc, named).allowed:
                disagreed.append((options, method, model, code))
        assert disagreed == []
    assert set(GROUP_OF) >= {f"/inference.GRPCInferenceService/{method}" for method in methods}


# Secrets. This test is the last: it looks for everything that the others have used.


def test_no_secret_is_in_logs_configuration_files_or_process_lists(world: World) -> None:
    assert world.infer(world.key().text, SECRET) != "OK"
    places = world.places()
    assert b"local_jwks" in places["config_dump"]
    ps = subprocess.run(["ps", "axeww", "-o", "args"], capture_output=True, check=True).stdout
    places |= {"ps": ps, "responses": "\n".join(world.texts).encode()}
    # The signature is the secret part of a token; Envoy passes the rest to the worker.
    secrets = [secret.rpartition(".")[2].encode() for secret in world.secrets]
    for place, text in places.items():
        assert b"PRIVATE KEY" not in text, place
        for secret in secrets:
            assert secret not in text, place


def is_of(pid: int, path: Path) -> bool:
    return str(path.parent) in Path(f"/proc/{pid}/cmdline").read_text()
