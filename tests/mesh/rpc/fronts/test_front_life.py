"""Start and stop of an instance: stops interrupt no call, kills end everything, nothing is left over."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from shoal.node import processes
from tests.breakable import PATIENCE_S, until
from tests.free_ports import free_port
from tests.long_form import by_form
from tests.mesh.rpc.fronts.conftest import UNARY, Client, Front, serves

Make = Callable[..., Front]


@pytest.fixture
def make(python: str, run_dir: Path) -> Iterator[Make]:
    """Starts servers of the test's own; the same address again with `at`."""
    fronts: list[Front] = []

    def start(transport: str = "unix", at: str = "", **env: str) -> Front:
        front = Front(python, run_dir, transport, at, {key.upper(): value for key, value in env.items()})
        front.start()
        fronts.append(front)
        return front

    yield start
    for front in fronts:
        front.__exit__()


@pytest.mark.parametrize("transport", ["unix", "tcp", "envoy"])
async def test_a_stop_under_load_cuts_no_call(make: Make, transport: str) -> None:
    for _ in range(by_form(1, 3)):
        front = make(transport)
        await front.until_serving()
        outcomes: list[str] = []
        async with front.client() as one, front.client() as two:
            callers = [
                asyncio.create_task(until_refused(client, method, outcomes))
                for client in (one, two)
                for method in ("Unary", "Short", "Tasked", "ServerStream", "Bidi")
                for _ in range(4)
            ]
            await until(lambda so_far=outcomes: len(so_far) > 200, "load")
            assert await asyncio.to_thread(front.terminate) == 0
            await asyncio.gather(*callers)
        # Each caller goes on until it is refused: that must be UNAVAILABLE, and nothing else may have happened.
        assert set(outcomes) == {"OK", "UNAVAILABLE"}
        assert outcomes.count("UNAVAILABLE") == len(callers)


async def until_refused(client: Client, method: str, outcomes: list[str]) -> None:
    while True:
        request = iter([b"x", b"y"]) if method == "Bidi" else b"x"
        call = client.call(method, request, {"do": "sleep", "ms": 5, "count": 2})
        try:
            got = [part async for part in call] if method in ("ServerStream", "Bidi") else await call
        except grpc.aio.AioRpcError as err:
            outcomes.append(err.code().name if is_unstarted(err) else f"{err.code().name}: {err.details()}")
            return
        assert got in (b"x", [b"x", b"x"], [b"x", b"y"])
        outcomes.append("OK")


def is_unstarted(err: grpc.aio.AioRpcError) -> bool:
    """Whether the call was refused before anybody worked on it: a client may go elsewhere with it."""
    said = (err.details() or "").lower()
    return err.code() is grpc.StatusCode.UNAVAILABLE and ("connect" in said or "refused" in said or "stopping" in said)


@pytest.mark.parametrize("transport", ["unix", "envoy"])
async def test_calls_under_way_finish_while_it_stops(make: Make, transport: str) -> None:
    front = make(transport)
    await front.until_serving()
    async with front.client() as client:
        calls = [
            asyncio.ensure_future(client.call(method, b"x", {"do": "sleep", "ms": 700, "mark": f"{method}{n}"}))
            for method in UNARY
            for n in range(20)
        ]
        await client.until_seen(*(f"started {method}{n}" for method in UNARY for n in range(20)))
        assert await asyncio.to_thread(front.terminate) == 0
        assert await asyncio.gather(*calls) == [b"x"] * 20 * len(UNARY)


@pytest.mark.parametrize("transport", ["unix", "envoy"])
async def test_the_drain_has_an_end(make: Make, transport: str) -> None:
    front = make(transport, shoal_fronts_drain_ms="300")
    await front.until_serving()
    async with front.client() as client:
        calls = [asyncio.ensure_future(client.fails(m, b"", {"do": "wait", "mark": m})) for m in UNARY]
        await client.until_seen(*(f"started {method}" for method in UNARY))
        assert await asyncio.to_thread(front.terminate) == 0
        for err in await asyncio.gather(*calls):
            assert err.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


async def test_a_stop_does_not_wait_for_a_thread(make: Make) -> None:
    front = make(shoal_fronts_drain_ms="300")
    await front.until_serving()
    async with front.client() as client:
        call = asyncio.ensure_future(client.fails("Unary", b"", {"do": "block", "mark": "a"}))
        await client.until_seen("started a")
        assert await asyncio.to_thread(front.terminate, PATIENCE_S) == 0
        assert (await call).code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        # The log is whole.
        assert '"event": "service.stopping"' in front.log.read_text()


@pytest.mark.parametrize("transport", ["unix", "envoy"])
async def test_an_idle_instance_with_open_watches_stops_immediately(make: Make, transport: str) -> None:
    front = make(transport, shoal_fronts_drain_ms="60000")
    await front.until_serving()
    async with front.client() as client:
        bidi = client.call("Bidi", None)
        await bidi.write(b"x")
        assert await bidi.read() == b"x"
        assert await asyncio.to_thread(front.terminate) == 0
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await bidi.read()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_second_signal_ends_the_instance_immediately(make: Make, number: int) -> None:
    front = make(shoal_fronts_drain_ms="60000")
    await front.until_serving()
    async with front.client() as client:
        waiting = asyncio.ensure_future(client.fails("Unary", b"", {"do": "wait", "mark": "a"}))
        await client.until_seen("started a")
        os.kill(front.pid, number)
        await until(lambda: "stopping on" in front.log.read_text(), "the first signal")
        os.kill(front.pid, number)
        await until(lambda: not front.is_running(), "the end")
        assert (await waiting).code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("transport", by_form(["unix"], ["unix", "tcp"]))
async def test_a_stop_at_any_moment_of_the_start_is_a_stop(make: Make, transport: str, run_dir: Path) -> None:
    for moment in range(0, 12, by_form(2, 1)):
        front = make(transport, tmpdir=str(run_dir))
        await asyncio.sleep(moment * 0.08)  # Not to wait for anything: to be somewhere in the start.
        # Until the process handles the signal it ends by it.
        assert await asyncio.to_thread(front.terminate) in (0, -signal.SIGTERM)
        assert front.log.read_text().count("Traceback") == 0


async def test_kill_9_leaves_no_process_and_the_socket_is_replaced(make: Make) -> None:
    front = make()
    for _ in range(3):
        await front.until_serving()
        children = descendants(front.pid)
        front.kill()
        await until(lambda gone=children: not any(Path(f"/proc/{pid}").exists() for pid in gone), "no orphan")
        front.start()
    await front.until_serving()
    async with front.client() as client:
        assert await client.call("Unary", b"x") == b"x"


def descendants(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return [int(line) for line in listed.stdout.split()]


async def test_it_ends_with_its_launcher(make: Make) -> None:
    launcher = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    launcher.kill()
    launcher.wait()
    front = make(shoal_parent_pid=str(launcher.pid))
    await until(lambda: not front.is_running(), "the end")
    assert "the launcher" in front.log.read_text()


async def test_a_port_in_use_is_one_clear_line(make: Make) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        front = make(at=f"127.0.0.1:{other.getsockname()[1]}")
        await until(lambda: not front.is_running(), "the end")
    said = front.log.read_text()
    assert f"cannot listen on {front.address}" in said
    assert "in use" in said
    assert "Traceback" not in said
    assert front._popen.returncode == 1


async def test_a_port_is_not_shared_by_default(make: Make) -> None:
    front = make("tcp")
    await front.until_serving()
    second = make(at=front.address)
    await until(lambda: not second.is_running(), "the end")
    assert "in use" in second.log.read_text()
    async with front.client() as client:
        assert await client.call("Unary", b"x") == b"x"


async def test_wrong_settings_are_named(make: Make) -> None:
    front = make("tcp", shoal_fronts_nonsense="1", shoal_fronts_drain_ms="many")
    await until(lambda: not front.is_running(), "the end")
    assert front._popen.returncode == 2
    said = front.log.read_text()
    assert "SHOAL_FRONTS_DRAIN_MS='many'" in said
    assert "SHOAL_FRONTS_NONSENSE is not a setting" in said


async def test_an_address_that_others_can_reach_is_refused_unless_it_is_allowed(make: Make) -> None:
    address = f"0.0.0.0:{free_port()}"
    front = make(at=address)
    await until(lambda: not front.is_running(), "the end")
    assert front._popen.returncode == 2
    said = front.log.read_text()
    assert f"SHOAL_FRONTS_LISTEN={address!r}: other machines can reach this address" in said
    assert "or set SHOAL_FRONTS_INSECURE=true" in said
    assert "Traceback" not in said
    front = make(at=address, shoal_fronts_insecure="true")
    await until(lambda: serves(address.replace("0.0.0.0", "127.0.0.1")), "serving")


@pytest.mark.parametrize("transport", ["unix", "tcp"])
async def test_nothing_is_left_after_a_stop(
    make: Make, transport: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = run_dir / "t"
    scratch.mkdir()
    front = make(transport, tmpdir=str(scratch))
    await front.until_serving()
    assert await asyncio.to_thread(front.terminate) == 0
    assert list(scratch.rglob("*")) == []
    assert [path.name for path in run_dir.iterdir() if path.is_socket()] == []


async def test_the_death_of_the_process_fails_a_call_with_unavailable(make: Make) -> None:
    front = make()
    await front.until_serving()
    async with front.client() as client:
        err = await client.fails("Unary", order={"do": "die"})
    assert err.code() is grpc.StatusCode.UNAVAILABLE
    await until(lambda: not front.is_running(), "the end")
    assert front._popen.returncode == 3


async def test_children_hear_signals_and_are_not_preloaded(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    front = make()
    await front.until_serving()
    async with front.client() as client:
        assert (await client.call("Unary", order={"do": "child"})).split() == [b"None", b"None", b"set()"]


async def test_short_calls_keep_no_memory(make: Make) -> None:
    front = make()
    await front.until_serving()

    async def some(count: int) -> None:
        for _ in range(count // 500):
            await asyncio.gather(*(client.call("Short", b"x" * 100) for _ in range(500)))

    async with front.client() as client:
        await some(5_000)
        before = rss_kb(front.pid)
        calls = by_form(10_000, 20_000)
        await some(calls)
        # Less than half a kilobyte of each call.
        assert rss_kb(front.pid) - before < 0.4 * calls


def rss_kb(pid: int) -> int:
    with open(f"/proc/{pid}/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))


@pytest.mark.parametrize("transport", ["tcp", "envoy"])
@pytest.mark.parametrize("tenant", ["", "acme"])
async def test_a_client_that_takes_what_memory_it_may_leaves_room_to_others_of_its_tenant(
    make: Make, transport: str, tenant: str
) -> None:
    front = make(transport, shoal_fronts_body_bytes=str(4 << 20))
    await front.until_serving()
    body, names = bytes(200_000), [("x-shoal-tenant", tenant)] if tenant else []
    async with front.client() as hog, front.client() as other:
        order = {"do": "wait", "mark": "hog"}
        calls = [hog.call("Unary", body, order, metadata=names, timeout=60) for _ in range(40)]

        async def are_refused() -> bool:
            return sum(call.done() for call in calls) >= 20

        await until(are_refused, "the rest is refused")
        for _ in range(5):
            assert await other.call("Unary", body, metadata=names) == body
        kept = [call for call in calls if not call.done()]
        assert 4 <= len(kept) <= 20
        assert {await call.code() for call in calls if call.done()} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        for call in kept:
            call.cancel()


async def test_files_in_the_users_folder_do_no_harm(python: str, run_dir: Path, monkeypatch) -> None:
    for name in ("numpy.py", "grpc.py", "uvloop.py"):
        (run_dir / name).write_text("raise SystemExit('the wrong one')\n")
    for name in ("mesh", "services", "google"):
        (run_dir / name).mkdir()
        (run_dir / name / "__init__.py").write_text("raise SystemExit('the wrong one')\n")
    (run_dir / "m").mkdir()
    address = f"127.0.0.1:{free_port()}"
    env = {"SHOAL_INFER_LISTEN": address, "SHOAL_INFER_REPOSITORY": str(run_dir / "m")}
    process = subprocess.Popen(
        processes.service_command("infer"), cwd=run_dir, env={**os.environ, **env}, stderr=subprocess.PIPE, text=True
    )
    try:
        await until(lambda: serves(address), "infer")
    finally:
        process.terminate()
        _, said = process.communicate()
    assert (process.returncode, "wrong one" in said) == (0, False)
