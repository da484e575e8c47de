"""What `shoal up` is asked for is checked before anything starts, and each mistake is named."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from shoal.cli.up import default_data_dir
from shoal.errors import InvalidArgument
from shoal.node.options import SERVICES, checked, parse_etcd, parse_mongo, parse_replicas, parse_services
from tests.certificates import issued


def test_a_node_has_one_of_each_service_unless_told_otherwise(tmp_path: Path) -> None:
    assert checked(data_dir=tmp_path).replicas == {"coord": 1, "store": 1, "infer": 1, "ingest": 1}
    assert list(checked(data_dir=tmp_path).replicas) == list(SERVICES)


def test_replicas_are_counted_by_service(tmp_path: Path) -> None:
    assert parse_replicas(" infer=2 , coord = 3") == {"infer": 2, "coord": 3}
    assert checked(data_dir=tmp_path, replicas="infer=2,coord=3").replicas == {
        "coord": 3,
        "store": 1,
        "infer": 2,
        "ingest": 1,
    }


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("infer", "expected SERVICE=COUNT"),
        ("infer=2,", "expected SERVICE=COUNT"),
        ("infer=", "infer=? is not 1 to 64"),
        ("infer=0", "infer=0 is not 1 to 64: to leave a service out, list the others with --services"),
        ("infer=-1", "infer=-1 is not 1 to 64"),
        ("infer=1.5", "infer=1.5 is not 1 to 64"),
        ("infer=65", "infer=65 is not 1 to 64"),
        ("infer=٣", "is not 1 to 64"),
        ("infer=99999999999999999999", "is not 1 to 64"),
        ("infer=1,infer=2", "infer occurs twice"),
        ("envoy=2", "no service is called 'envoy': there are coord, store, infer, ingest"),
        ("=2", "no service is called ''"),
    ],
)
def test_wrong_replicas_are_named(text: str, named: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_replicas(text)
    assert caught.value.message.startswith(f"--replicas {text!r}")
    assert named in caught.value.message


def test_services_come_in_the_order_of_their_start_and_with_coord() -> None:
    assert parse_services("") == SERVICES
    assert parse_services(" infer, store ") == ("coord", "store", "infer")


@pytest.mark.parametrize("text", ["nope", "infer,,store", "infer;store", ","])
def test_unknown_services_are_named(text: str) -> None:
    with pytest.raises(InvalidArgument, match=r"--services .*no service is called .*there are coord, store"):
        parse_services(text)


def test_replicas_of_a_service_that_is_left_out_are_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="--replicas names ingest, which --services leaves out"):
        checked(data_dir=tmp_path, services="infer", replicas="ingest=2")


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("http://h:1", "h:1"),
        ("h:1", "h:1"),
        ("http://a:1/, b:2", "a:1,b:2"),
        ("[::1]:9", "[::1]:9"),
        ("unix:/e:0", "unix:/e:0"),
    ],
)
def test_etcd_as_people_write_it(text: str, meant: str) -> None:
    assert parse_etcd(text) == meant


@pytest.mark.parametrize("text", ["", "h", "http://h", "h:0", "h:70000", "https://h:1", "a:1,,b:2", "mongodb://h:1"])
def test_a_wrong_etcd_is_named(text: str) -> None:
    with pytest.raises(InvalidArgument, match="--etcd "):
        parse_etcd(text)


@pytest.mark.parametrize("text", ["", "h:27017", "http://h", "mongodb://", "mongodb:///x"])
def test_a_wrong_mongo_is_named(text: str) -> None:
    with pytest.raises(InvalidArgument, match=r"--mongo .*expected mongodb://HOST:PORT"):
        parse_mongo(text)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"gateway_port": 65536}, "--gateway-port 65536"),
        ({"admin_port": -1}, "--admin-port -1"),
        ({"gateway_port": 9901}, "both 9901"),
        ({"name": "a/b"}, "--node 'a/b'"),
        ({"name": ""}, "--node ''"),
    ],
)
def test_other_wrong_options_are_named(tmp_path: Path, options: dict[str, object], named: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        checked(data_dir=tmp_path, **options)  # type: ignore[arg-type]
    assert named in caught.value.message


def test_data_goes_where_the_user_keeps_data() -> None:
    assert default_data_dir(None) == Path("~/.local/share/shoal")
    assert default_data_dir("/x") == Path("/x/shoal")
    assert default_data_dir("relative") == Path("~/.local/share/shoal")


def up(*args: str, **env: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "shoal.cli.main", "up", *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env={**os.environ, **env})
    return done.returncode, done.stderr


def test_a_mistake_ends_the_command_with_2_and_starts_nothing(tmp_path: Path) -> None:
    data = tmp_path / "data"
    status, said = up("--data-dir", str(data), "--replicas", "infer=0")
    assert (status, said.count("\n")) == (2, 1)
    assert said.startswith("shoal: --replicas 'infer=0'")
    assert not data.exists()


def test_a_data_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    status, said = up("--data-dir", str(tmp_path / "file" / "data"), "--gateway-port", "0", "--admin-port", "0")
    assert status == 2
    assert f"--data-dir {tmp_path}/file/data: cannot be used: Not a directory" in said


def test_a_ready_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    ready = tmp_path / "folder"
    ready.mkdir()
    args = ("--data-dir", str(tmp_path / "data"), "--gateway-port", "0", "--admin-port", "0")
    status, said = up(*args, "--ready-file", str(ready))
    assert (status, f"the ready file {ready} cannot be written" in said) == (2, True)


def test_a_gateway_port_in_use_is_named_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        port = str(sock.getsockname()[1])
        status, said = up("--data-dir", str(tmp_path), "--gateway-port", port, "--admin-port", "0")
    assert status == 1
    assert f"port {port} of 127.0.0.1 is in use: is another node running? Give another port with --gateway-port" in said
    assert not list((tmp_path / "logs").iterdir())


def test_a_missing_part_is_named_before_anything_starts(tmp_path: Path) -> None:
    args = ("--data-dir", str(tmp_path), "--gateway-port", "0", "--admin-port", "0")
    status, said = up(*args, SHOAL_ENVOY_BINARY="/nowhere/envoy")
    assert (status, said) == (1, "shoal: SHOAL_ENVOY_BINARY=/nowhere/envoy: no executable file there\n")
    assert not list((tmp_path / "logs").iterdir())


def test_an_address_of_other_machines_is_refused_before_anything_starts(tmp_path: Path) -> None:
    data = tmp_path / "data"
    status, said = up("--data-dir", str(data), "--listen", "0.0.0.0:0")
    assert status == 2
    assert "--listen 0.0.0.0:0: other machines can reach this address" in said
    for way in ("--tls-cert FILE --tls-key FILE", "--tls auto", "--insecure"):
        assert way in said
    assert not data.exists()


def test_a_key_of_another_certificate_ends_the_start_before_anything_runs(tmp_path: Path) -> None:
    cert, _, _ = issued(tmp_path / "a")
    _, key, _ = issued(tmp_path / "b")
    args = ("--data-dir", str(tmp_path / "data"), "--gateway-port", "0", "--admin-port", "0")
    status, said = up(*args, "--tls-cert", str(cert), "--tls-key", str(key))
    assert (status, f"--tls-key {key}: the key belongs to another certificate" in said) == (2, True), said
    assert not list((tmp_path / "data" / "logs").iterdir())


def test_every_command_has_help_with_an_example() -> None:
    for command in ("up", "serve"):
        done = subprocess.run(
            [sys.executable, "-m", "shoal.cli.main", command, "--help"], capture_output=True, text=True, check=True
        )
        assert f"shoal {command} " in done.stdout.partition("Examples")[2]


def test_the_version() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "shoal.cli.main", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("shoal ")


def test_a_wrong_file_of_connectors_is_explained_before_anything_starts(tmp_path: Path) -> None:
    file = tmp_path / "streams.toml"
    file.write_text("[connectors.reviews]\nmodel = 3\n")
    argv = [
        sys.executable,
        "-m",
        "shoal.cli.main",
        "up",
        "--data-dir",
        str(tmp_path / "data"),
        "--connectors",
        str(file),
    ]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode != 0
    assert "connectors.reviews.model: should be a valid string" in " ".join(done.stderr.split())
    assert "connectors.reviews.source is required" in " ".join(done.stderr.split())
    assert not (tmp_path / "data").exists()


def test_connectors_need_ingest(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="--connectors is for ingest"):
        checked(data_dir=tmp_path, services="infer", connectors=tmp_path / "streams.toml")
    assert checked(data_dir=tmp_path, connectors=Path("streams.toml")).connectors == Path.cwd() / "streams.toml"
