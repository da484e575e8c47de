"""A node outlives the login that started it: its folders and its signals do not depend on the user's session."""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.node import folder, plan
from shoal.node.node import Signals
from shoal.node.options import Options
from shoal.node.plan import Layout


class Silent:
    """Screen that shows nothing."""

    def __getattr__(self, name: str) -> object:
        return lambda *args: None


@pytest.fixture
def handlers() -> Iterator[None]:
    before = signal.getsignal(signal.SIGHUP)
    yield
    signal.signal(signal.SIGHUP, before)


def test_sockets_are_not_in_the_folder_that_goes_with_the_last_login(run_dir: Path) -> None:
    session, temporary = run_dir / "session", run_dir / "t"
    session.mkdir(mode=0o700)
    temporary.mkdir()
    environ = {"XDG_RUNTIME_DIR": str(session), "TMPDIR": str(temporary)}
    data = run_dir / "data"
    with folder.lock(data), folder.run_dir(data, environ) as sockets:
        shutil.rmtree(session)
        assert sockets.is_dir()
        # systemd-tmpfiles spares what is locked, however old it is.
        descriptor = os.open(sockets, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        os.close(descriptor)
    assert not sockets.exists()


def test_sockets_are_not_in_a_folder_whose_path_mongod_would_split(run_dir: Path) -> None:
    temporary = run_dir / "a,b"
    temporary.mkdir()
    with folder.private({"TMPDIR": str(temporary)}) as sockets:
        assert "," not in str(sockets)


def test_the_path_of_the_sockets_is_absolute(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run_dir)
    (run_dir / "t").mkdir()
    with folder.private({"TMPDIR": "t"}) as sockets:
        assert sockets.is_absolute()


def test_the_bootstrap_of_envoy_lies_in_the_data_folder(tmp_path: Path) -> None:
    options, layout = Options(data_dir=tmp_path), Layout(tmp_path / "run", 1, 2)
    specs = {spec.name: spec for group in plan.groups(options, layout, {}, os.getpid()) for spec in group}
    assert str(tmp_path / "envoy.json") in specs["envoy"].argv


async def test_a_hangup_that_was_ignored_at_the_start_stops_nothing(handlers: None) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signals = Signals(Silent())
    with signals.caught():
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        os.kill(os.getpid(), signal.SIGHUP)
        await asyncio.sleep(0)
        assert not signals.stop.is_set()
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(signals.stop.wait(), 10)


async def test_a_hangup_stops_a_node_of_a_terminal(handlers: None) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signals = Signals(Silent())
    with signals.caught():
        os.kill(os.getpid(), signal.SIGHUP)
        await asyncio.wait_for(signals.stop.wait(), 10)
