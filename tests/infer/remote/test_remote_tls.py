"""Through TLS, with certificates that are made here."""

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from services.infer.models.version import State
from tests.infer.conftest import floats, output, request
from tests.infer.remote import configs
from tests.infer.remote.scripted import Scripted


def openssl(*arguments: str, folder: Path) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CA, a server `models.internal`, a client, and another CA, in PEM."""
    folder = tmp_path_factory.mktemp("certificates")
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    for name in ("ca", "other"):
        files = ("-keyout", f"{name}.key", "-out", f"{name}.pem")
        openssl("req", "-x509", *curve, *files, "-subj", f"/CN={name}", "-days", "2", folder=folder)
    (folder / "names").write_text("subjectAltName=DNS:models.internal")
    for name in ("server", "client"):
        openssl("req", *curve, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}", folder=folder)
        signed = ("-in", f"{name}.csr", "-out", f"{name}.pem", "-extfile", "names", "-days", "2")
        openssl("x509", "-req", *signed, "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", folder=folder)
    return folder


@pytest.fixture
async def secure(certificates: Path) -> AsyncIterator[Scripted]:
    """A server that asks who calls."""

    def read(name: str) -> bytes:
        return (certificates / name).read_bytes()

    pair = (read("server.key"), read("server.pem"))
    credentials = grpc.ssl_server_credentials([pair], read("ca.pem"), require_client_auth=True)
    async with Scripted().serving(credentials=credentials) as running:
        yield running


async def test_mutual_tls_authenticates_both_sides(front, secure: Scripted, certificates: Path, tmp_path: Path):
    folder = configs.put(
        *(tmp_path / "models", "m", ""),
        url=f"grpcs://{secure.address}",
        ca_file="ca.pem",
        client_certificate_file=f"{certificates}/client.pem",
        client_key_file=f"{certificates}/client.key",
        server_name="models.internal",
    )
    (folder / "ca.pem").write_bytes((certificates / "ca.pem").read_bytes())
    near = await front(tmp_path / "models")
    got = await near.core.infer(request("m", x=floats([1, 2, 3, 4])))
    assert output(got, "y").tolist() == [[2, 4, 6, 8]]


@pytest.mark.parametrize(
    "wrong",
    [
        {"ca_file": "other.pem"},
        {"server_name": ""},
        {"client_certificate_file": "", "client_key_file": ""},
        {"url": "grpc"},
    ],
    ids=["another CA", "another name", "no client certificate", "plaintext"],
)
async def test_a_model_is_unavailable_and_gets_no_request_with_wrong_credentials(
    front, secure: Scripted, certificates: Path, tmp_path: Path, wrong
):
    given = {
        "ca_file": f"{certificates}/ca.pem",
        "client_certificate_file": f"{certificates}/client.pem",
        "client_key_file": f"{certificates}/client.key",
        "server_name": "models.internal",
        "url": f"grpcs://{secure.address}",
    }
    if "url" in wrong:
        given = {"url": f"grpc://{secure.address}"}
    else:
        given |= {key: f"{certificates}/{value}" if value.endswith(".pem") else value for key, value in wrong.items()}
    configs.put(tmp_path / "models", "m", **given)
    near = await front(tmp_path / "models")
    (row,) = near.models.index()
    assert row.state is State.UNAVAILABLE
    assert "is unavailable" in row.reason or "did not respond in time" in row.reason
    assert secure.seen == []
