"""What a remote model's configuration may say, and what it must not: refused by name when it is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
from google.protobuf import text_format

from services.infer.remote import address, settings
from services.infer.remote.remote_runtime import RemoteRuntime
from services.infer.runtimes.runtime import SessionOptions
from shoal.errors import FailedPrecondition
from tests.infer.remote.configs import about

URL = "grpc://models:8001"


@pytest.mark.parametrize(
    ("url", "target", "is_secure"),
    [
        ("grpc://models:8001", "dns:///models:8001", False),
        ("grpc://models:8001/", "dns:///models:8001", False),
        ("grpcs://10.0.0.7:443", "dns:///10.0.0.7:443", True),
        ("grpc://[::1]:8001", "dns:///[::1]:8001", False),
        ("unix:/run/triton.sock", "unix:/run/triton.sock", False),
        ("unix:///run/triton.sock", "unix:/run/triton.sock", False),
    ],
)
def test_addresses(url, target, is_secure):
    read = address.read(url)
    assert (read.url, read.target, read.is_secure) == (url, target, is_secure)


@pytest.mark.parametrize(
    "url",
    [
        *(
            "models:8001",
            "http://models:8001",
            "grpc://models",
            "grpc://:8001",
            "grpc://models:0",
            "grpc://models:70000",
        ),
        *("grpc://models:x", "grpc://models:8001/path", "grpc://models:8001?a=b", "unix:", "unix:relative", "unix://x"),
        *("grpc://mo dels:1", "grpc://models:8001#x", "grpc://[::1:8001", "grpc://ü:1", "grpc://a\n:1"),
    ],
)
def test_what_is_no_address(url):
    with pytest.raises(FailedPrecondition, match=r"(?s)parameter url '.*': expected grpc://host:port, grpcs:"):
        address.read(url)


def test_a_password_in_an_address_is_not_repeated():
    with pytest.raises(FailedPrecondition) as caught:
        address.read("grpc://me:secret@models:8001")
    assert "secret" not in caught.value.message


def test_defaults():
    read = settings.read(about("m", url=URL), {})
    assert (read.protocol, read.model, read.version, read.timeout_s) == ("oip", "m", "", 60)
    assert (read.max_message_bytes, read.keepalive_time_ms, read.keepalive_timeout_ms) == (128 << 20, 60_000, 20_000)


def test_all_of_it(tmp_path: Path):
    said = about(
        *("m", tmp_path),
        url="grpcs://models:8001",
        protocol="tensorflow-serving",
        remote_model="half_plus_two",
        remote_version="3",
        signature_name="other",
        timeout_ms="120000",
        max_message_bytes="4096",
        keepalive_timeout_ms="5000",
        ca_file="ca.pem",
        client_certificate_file="/etc/me.pem",
        client_key_file="/etc/me.key",
        server_name="models.internal",
        metadata_authorization="Bearer x",
        slo_ms="5",
    )
    read = settings.read(said, {})
    assert (read.model, read.version, read.signature_name, read.timeout_s) == ("half_plus_two", "3", "other", 120)
    assert (read.max_message_bytes, read.server_name) == (4096, "models.internal")
    # Never more than two questions within a call: servers end a connection for the third.
    assert (read.keepalive_time_ms, read.keepalive_timeout_ms) == (120_000, 5000)
    assert read.tls is not None
    assert (read.tls.ca_file, read.tls.key_file) == (tmp_path / "ca.pem", Path("/etc/me.key"))
    assert read.headers.read() == (("authorization", "Bearer x"),)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"url": ""}, "parameter url is missing: expected grpc://host:port"),
        ({"protocol": "http"}, "parameter protocol 'http': expected one of 'oip', 'tensorflow-serving', 'torchserve'"),
        ({"timeout_ms": "0"}, "parameter timeout_ms '0': expected a number from 1 to 86400000"),
        ({"timeout_ms": "soon"}, "parameter timeout_ms 'soon'"),
        ({"max_message_bytes": "10"}, "parameter max_message_bytes '10'"),
        ({"keepalive_time_ms": "500"}, "parameter keepalive_time_ms '500': expected 0 (never), or 10000 to 86400000"),
        ({"keepalive_timeout_ms": "-1"}, "parameter keepalive_timeout_ms '-1'"),
        ({"signature_name": "x"}, "parameter signature_name needs protocol 'tensorflow-serving'"),
        (
            {"protocol": "tensorflow-serving", "remote_version": "v2"},
            "parameter remote_version 'v2': expected a number",
        ),
        ({"ca_file": "ca.pem"}, "parameter ca_file needs a url that begins with grpcs://"),
        ({"server_name": "x"}, "parameter server_name needs a url that begins with grpcs://"),
        ({"url": "grpcs://a:1", "client_key_file": "k"}, "client_certificate_file and client_key_file go together"),
        ({"metadata_Authorization": "x"}, "parameter metadata.Authorization: expected the name of a header in lower"),
        ({"metadata_x-key-bin": "x"}, "parameter metadata.x-key-bin: expected"),
        ({"metadata_grpc-timeout": "x"}, "parameter metadata.grpc-timeout: this header is gRPC's own"),
        ({"metadata_te": "x"}, "parameter metadata.te: this header is gRPC's own"),
        ({"timout_ms": "5"}, "parameter timout_ms is unknown: is timeout_ms meant?"),
        ({"remote_modle": "x"}, "parameter remote_modle is unknown: is remote_model meant?"),
    ],
)
def test_what_is_refused(given, says):
    with pytest.raises(FailedPrecondition) as caught:
        settings.read(about("m", **{"url": URL, **given}), {})
    assert says in caught.value.message


def test_a_file_is_refused():
    said = about("m", url=URL)
    said.config.default_model_filename = "model.onnx"
    with pytest.raises(FailedPrecondition, match="default_model_filename does not go with backend 'remote'"):
        settings.read(said, {})


def headers(tmp_path: Path, value: str) -> str:
    said = about("m", tmp_path, url=URL, metadata_authorization=value)
    return settings.read(said, {"TOKEN": "from-env", "EMPTY": ""}).headers.read()[0][1]


def test_secrets_are_read_from_the_environment_and_files(tmp_path: Path):
    (tmp_path / "token").write_text("from-file\n")
    (tmp_path / "far").write_text(" absolute ")
    assert headers(tmp_path, "plain $x {y}") == "plain $x {y}"
    assert headers(tmp_path, "Bearer ${env:TOKEN}") == "Bearer from-env"
    assert headers(tmp_path, "${file:token}") == "from-file"
    assert headers(tmp_path, f"a ${{file:{tmp_path}/far}} b ${{env:TOKEN}}") == "a absolute b from-env"


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("${env:NOBODY}", "the environment variable 'NOBODY' is not set"),
        ("${file:nothing}", "cannot read nothing"),
        ("${TOKEN}", "expected ${env:NAME} or ${file:PATH}"),
        ("${env:}", "expected ${env:NAME} or ${file:PATH}"),
        ("${env:EMPTY}", "expected printable ASCII, at least one character"),
        ("ü", "expected printable ASCII"),
    ],
)
def test_secrets_that_are_not_there(tmp_path: Path, value, says):
    with pytest.raises(FailedPrecondition) as caught:
        headers(tmp_path, value)
    assert caught.value.message.startswith("parameter metadata.authorization: ")
    assert says in caught.value.message


def test_an_invalid_secret_is_not_in_the_error(tmp_path: Path):
    (tmp_path / "token").write_text("line one\nline two")
    with pytest.raises(FailedPrecondition) as caught:
        headers(tmp_path, "${file:token}")
    assert "line" not in caught.value.message


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ('input { name: "n" data_type: TYPE_FP32 dims: [ 1 ] }', "input 'n': protocol 'torchserve' needs TYPE_STRING"),
        ('output { name: "n" data_type: TYPE_STRING dims: [ 2 ] }', "output 'n': protocol 'torchserve' needs TYPE_STR"),
        (
            'output { name: "a" data_type: TYPE_STRING dims: 1 } output { name: "b" data_type: TYPE_STRING dims: 1 }',
            "protocol 'torchserve': a prediction is one output, got 2",
        ),
    ],
)
def test_what_torchserve_cannot_have(config, says):
    said = about("m", url=URL, protocol="torchserve")
    text_format.Merge(config, said.config)
    with pytest.raises(FailedPrecondition) as caught:
        RemoteRuntime({}).load(Path("m"), SessionOptions(1, about=said))
    assert says in caught.value.message


@pytest.mark.parametrize("name", ["ca_file", "client_certificate_file"])
def test_files_of_tls_that_are_none(tmp_path: Path, name):
    (tmp_path / "no.pem").write_text("hello")
    files = {"ca_file": "no.pem"} if name == "ca_file" else {name: "no.pem", "client_key_file": "no.pem"}
    with pytest.raises(FailedPrecondition, match=r"no\.pem is no PEM file"):
        RemoteRuntime({}).load(tmp_path, SessionOptions(1, about=about("m", tmp_path, url="grpcs://a:1", **files)))
    with pytest.raises(FailedPrecondition, match=r"cannot read gone\.pem"):
        RemoteRuntime({}).load(
            tmp_path, SessionOptions(1, about=about("m", tmp_path, url="grpcs://a:1", ca_file="gone.pem"))
        )
