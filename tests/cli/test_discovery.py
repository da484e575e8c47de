"""Which node a command talks to."""

import json
import os
import stat
from pathlib import Path

import pytest

from shoal.discovery import (
    RunningServer,
    admin_of,
    announced,
    find_gateway,
    find_node,
    key_of,
    pointer_path,
    replace_key,
    running_nodes,
    running_servers,
)
from shoal.errors import FailedPrecondition, InvalidArgument, NotFound


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    runtime = tmp_path / "run"
    runtime.mkdir()
    return {"XDG_RUNTIME_DIR": str(runtime), "TMPDIR": str(tmp_path)}


def announce(environ: dict[str, str], gateway: str = "127.0.0.1:8080", pid: int | None = None) -> Path:
    path = pointer_path(environ, os.getpid() if pid is None else pid)
    path.write_text(json.dumps({"gateway": gateway, "admin": "127.0.0.1:9901", "data_dir": "/d", "pids": {"envoy": 7}}))
    return path


def test_the_flag_wins_over_the_variable_and_the_variable_over_the_running_node(environ: dict[str, str]) -> None:
    announce(environ, "127.0.0.1:3")
    environ["SHOAL_GATEWAY"] = "127.0.0.1:2"
    assert find_gateway("127.0.0.1:1", environ).address == "127.0.0.1:1"
    assert find_gateway(None, environ).address == "127.0.0.1:2"
    del environ["SHOAL_GATEWAY"]
    assert find_gateway(None, environ).address == "127.0.0.1:3"


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("http://h:1/", "h:1"),
        ("grpc://h:1", "h:1"),
        ("[::1]:80", "[::1]:80"),
        ("unix:/a/b", "unix:/a/b"),
        (" h:65535 ", "h:65535"),
    ],
)
def test_every_form_of_address_is_accepted(given: str, meant: str) -> None:
    assert find_gateway(given, {}).address == meant


@pytest.mark.parametrize("given", ["localhost", ":8080", "h:0", "h:65536", "h:x", "a b:1", "http://h:1/path", "h:1:2"])
def test_an_invalid_address_is_named_with_its_source(given: str) -> None:
    with pytest.raises(InvalidArgument, match=r"--gateway=.*expected HOST:PORT"):
        find_gateway(given, {})
    with pytest.raises(InvalidArgument, match=r"SHOAL_GATEWAY=.*expected HOST:PORT"):
        find_gateway(None, {"SHOAL_GATEWAY": given})


def test_without_a_node_the_error_says_what_to_do(environ: dict[str, str]) -> None:
    with pytest.raises(NotFound, match="start one with `shoal up`"):
        find_gateway(None, environ)


def test_a_node_that_is_named_has_its_ca_as_one_that_is_found(environ: dict[str, str]) -> None:
    path = announce(environ, "127.0.0.1:3")
    path.write_text(json.dumps({**json.loads(path.read_text()), "tls": {"ca": "/d/ca.pem", "name": "localhost"}}))
    named = find_gateway("https://127.0.0.1:3", environ)
    assert (named.ca, named.name) == (Path("/d/ca.pem"), "localhost")
    assert find_gateway("https://127.0.0.1:4", environ).ca is None


def test_two_nodes_are_an_error(environ: dict[str, str]) -> None:
    announce(environ, "127.0.0.1:1")
    announce(environ, "127.0.0.1:2", pid=os.getppid())
    with pytest.raises(FailedPrecondition, match=r"2 nodes are running on this machine.*--gateway"):
        find_node(environ)
    assert admin_of("127.0.0.1:2", environ) == "127.0.0.1:9901"
    assert admin_of("127.0.0.1:9", environ) is None


def test_a_stale_file_is_ignored_and_cleared_by_the_next_node(environ: dict[str, str]) -> None:
    stale = announce(environ).with_name(f"{os.getpid()}-1.json")  # This pid, but another process: it started elsewhen.
    announce(environ).rename(stale)
    assert running_nodes(environ) == []
    pointer_path(environ, os.getpid())
    assert not stale.exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"gateway": 1, "admin": 2, "data_dir": 3, "pids": 4}'])
def test_an_invalid_file_is_ignored(environ: dict[str, str], text: str) -> None:
    announce(environ).write_text(text)
    assert running_nodes(environ) == []


def test_a_server_is_found_while_it_runs_and_is_no_node(environ: dict[str, str]) -> None:
    server = RunningServer("127.0.0.1:8001", "127.0.0.1:8002")
    assert running_servers(environ) == []
    with announced(environ, server):
        assert running_servers(environ) == [server]
        assert running_nodes(environ) == []
        announce(environ)
        assert [node.gateway for node in running_nodes(environ)] == ["127.0.0.1:8080"]
        assert running_servers(environ) == [server]
    assert running_servers(environ) == []


def test_a_folder_that_others_may_write_to_is_ignored(environ: dict[str, str]) -> None:
    path = announce(environ)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    path.parent.chmod(0o777)
    assert running_nodes(environ) == []
    with pytest.raises(PermissionError, match="open to others"):
        pointer_path(environ, os.getpid())


def test_without_a_runtime_folder_the_temporary_folder_is_used(tmp_path: Path) -> None:
    environ = {"XDG_RUNTIME_DIR": str(tmp_path / "none"), "TMPDIR": str(tmp_path)}
    announce(environ)
    assert find_node(environ).pids == {"envoy": 7}


def test_the_key_that_a_node_has_made_for_its_user_is_found_and_replaced(
    environ: dict[str, str], tmp_path: Path
) -> None:
    file = tmp_path / "admin.key"
    file.write_text("secret\n")
    file.chmod(0o600)
    path = announce(environ, "127.0.0.1:3")
    path.write_text(json.dumps({**json.loads(path.read_text()), "key_file": str(file)}))
    here, named, other = (find_gateway(flag, environ) for flag in (None, "127.0.0.1:3", "127.0.0.1:4"))
    assert [key_of(gateway, environ) for gateway in (here, named, other)] == ["secret", "secret", ""]
    assert replace_key(other, "new", environ) is None
    assert replace_key(here, "new", environ) == file
    assert (key_of(here, environ), stat.S_IMODE(file.stat().st_mode)) == ("new", 0o600)
    file.chmod(0o640)
    with pytest.raises(InvalidArgument, match=r"other users can read the key .*chmod 600"):
        key_of(here, environ)
    file.unlink()
    assert key_of(here, environ) == ""
