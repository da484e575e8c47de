"""Model processes: how they die, what is told of it, and that nothing is left of them."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import re
import signal
import sys
import textwrap
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import pytest

from services.infer.model_process import started
from services.infer.model_process.python_runtime import IsolatedOnnxRuntime, PythonRuntime
from services.infer.model_process.session import ModelDied, ProcessSession
from services.infer.runtimes.runtime import About, ModelFailed, SessionOptions
from shoal.errors import FailedPrecondition, Unavailable
from shoal.inference.v2 import model_config_pb2 as pb
from tests.breakable import PATIENCE_S, until
from tests.infer import onnx_files
from tests.long_form import by_form

X = np.array([[1, 2]], np.float32)


def model(predict: str, *, head: str = "", load: str = "", unload: str = "") -> str:
    lines = [
        "import ctypes, os, signal, sys, threading, time",
        "import numpy as np",
        head,
        "class Model:",
        '    inputs = {"x": ("FP32", [-1, -1])}',
        '    outputs = {"y": ("FP32", [-1, -1])}',
        "    def load(self, folder, config):",
        textwrap.indent(load or "pass", " " * 8),
        "    def predict(self, batch):",
        '        x = batch["x"]',
        textwrap.indent(predict, " " * 8),
        '        return {"y": 2 * x}',
        "    def unload(self):",
        textwrap.indent(unload or "pass", " " * 8),
    ]
    return "\n".join(lines)


@pytest.fixture
def load(tmp_path: Path):
    with ExitStack() as loaded:

        def load(source: str, *, instances: int = 1, is_given_up=bool, **parameters: str) -> ProcessSession:
            config = pb.ModelConfig(name="m")
            for key, value in parameters.items():
                config.parameters[key].string_value = value
            folder = tmp_path / "m" / "1"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "model.py").write_text(source)
            about = About("m", 1, folder.parent, config, instances, is_given_up)
            session = PythonRuntime().load(folder / "model.py", SessionOptions(1, about=about))
            loaded.callback(session.close)
            return session

        yield load


def run(session: ProcessSession, x: np.ndarray = X) -> list:
    return session.run({"x": x}, ["y"])[0].tolist()


def pids(session: ProcessSession) -> list[int]:
    return [instance.running(PATIENCE_S).pid for instance in session.instances]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # The latter when it goes while its file is read.
        return False


DEATHS = {
    "os._exit": ("os._exit(3)", r"process died \(exit code 3\)"),
    "segfault": ("ctypes.string_at(0)", r"process died \(signal 11, SIGSEGV\)"),
    "abort": ("os.abort()", r"process died \(signal 6, SIGABRT\)"),
    "kill -9 of itself": ("os.kill(os.getpid(), signal.SIGKILL)", r"process died \(signal 9, SIGKILL\)"),
    "closed socket": ("os.closerange(3, 100)", "process died"),
    "no frame": ("[os.write(fd, b'x' * 64) for fd in range(3, 300) if os.path.exists(f'/proc/self/fd/{fd}') and "
                 "'socket' in os.readlink(f'/proc/self/fd/{fd}')]", "process died .its channel failed: the other"),
}  # fmt: skip


@pytest.mark.parametrize("death", DEATHS)
def test_a_crash_is_reported_and_the_next_request_uses_a_new_process(load, death):
    what, told = DEATHS[death]
    session = load(model(f"if x[0, 0] == 13: {what}"))
    (before,) = pids(session)
    with pytest.raises(ModelDied, match=told):
        run(session, X * 0 + 13)
    assert run(session) == [[2, 4]]
    (after,) = pids(session)
    assert after != before
    assert not is_alive(before)


def test_a_process_killed_while_idle_restarts_without_a_failed_request(load):
    session = load(model(""))
    for _ in range(3):
        (pid,) = pids(session)
        os.kill(pid, signal.SIGKILL)
        assert run(session) == [[2, 4]]
    assert not session.poison


def test_requests_during_a_restart_get_unavailable_with_a_retry_delay(load, tmp_path):
    session = load(
        model("if x[0, 0] == 13: os._exit(1)", load="while os.path.exists(f'{folder}/wait'): time.sleep(0.01)")
    )
    gate = tmp_path / "m" / "1" / "wait"
    gate.touch()
    with pytest.raises(ModelDied):
        run(session, X * 0 + 13)
    with pytest.raises(Unavailable, match=r"restarting \(exit code 1\); retry after \d+ ms") as err:
        session.run_requests({"x": [X]}, ["y"], [1], [])
    assert err.value.retry_after_ms
    gate.unlink()
    assert run(session) == [[2, 4]]


def test_a_restart_that_fails_to_load_is_retried(load, tmp_path):
    session = load(model("if x[0, 0] == 13: os._exit(1)"))
    file = tmp_path / "m" / "1" / "model.py"
    good = file.read_text()
    file.write_text("no Python")
    with pytest.raises(ModelDied):
        run(session, X * 0 + 13)
    instance = session.instances[0]
    wait_until(lambda: instance.restarts >= 2)
    with pytest.raises(Unavailable, match="invalid syntax"):
        session.run_requests({"x": [X]}, ["y"], [1], [])
    file.write_text(good)
    assert run(session) == [[2, 4]]


def wait_until(is_so) -> None:
    asyncio.run(until(is_so))


LOOPS = ["while True: pass", "ctypes.CDLL(None).sleep(1000)", "time.sleep(1000)"]


@pytest.mark.parametrize("loop", by_form(LOOPS[:2], LOOPS))
def test_an_execution_beyond_its_timeout_is_killed(load, loop):
    # A run beside it ends within this time on a busy machine, too.
    session = load(model(f"if x[0, 0] == 13:\n    {loop}"), execution_timeout_ms="2000")
    with pytest.raises(ModelDied, match="a run took longer than execution_timeout_ms, 2000"):
        run(session, X * 0 + 13)
    assert run(session) == [[2, 4]]


@pytest.mark.parametrize("then", ["time.sleep(1000)", "pass"])
def test_a_model_that_closes_its_channel_while_loading_fails_to_load(load, monkeypatch, then):
    monkeypatch.setattr("services.infer.model_process.process._END_S", 0.2)
    with pytest.raises(FailedPrecondition, match="ended while it loaded the model"):
        load(model("", load=f"os.closerange(3, 100); {then}"))


def test_loading_beyond_its_timeout_fails(load):
    with pytest.raises(FailedPrecondition, match="loading took too long: see parameter load_timeout_ms"):
        load(model("", load="while True: pass"), load_timeout_ms="700")
    given_up = threading.Event()
    threading.Timer(0.3, given_up.set).start()
    with pytest.raises(FailedPrecondition):
        load(model("", load="while True: pass"), is_given_up=given_up.is_set)


WRONG_PREDICTIONS = [
    ("raise ValueError('no such number')", r"ValueError: no such number \(model.py, line \d+\)"),
    ("raise SystemExit(5)", r"called sys.exit\(5\)"),
    ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    ("return {'z': x}", "returned no output 'y': it returned 'z'"),
    ("return [x]", "predict returned a list, expected a dict"),
    ("return None", "predict returned a NoneType"),
    ("return {'y': x.astype(np.float64)}", "output 'y' is FP64, expected FP32"),
    ("return {'y': x.astype(complex)}", "output 'y' is complex64, expected FP32|complex128"),
    ("return {'y': np.array([object()])}", "output 'y' is BYTES, expected FP32|object"),
    ("return {'y': [[1], [2, 3]]}", "output 'y' is not an array"),
    ("return (i for i in range(3))", "predict returned a generator"),
]


def test_errors_of_predict_are_reported_and_the_process_goes_on(load):
    predicts = [f"if x[0, 0] == 13 and x[0, 1] == {n}: {predict}" for n, (predict, _) in enumerate(WRONG_PREDICTIONS)]
    session = load(model("\n".join(predicts)))
    (before,) = pids(session)
    for n, (predict, told) in enumerate(WRONG_PREDICTIONS):
        with pytest.raises(ModelFailed) as err:
            run(session, np.array([[13, n]], np.float32))
        assert re.search(told, str(err.value)), predict
        assert run(session) == [[2, 4]], predict
    assert pids(session) == [before]


@pytest.mark.parametrize(
    "forged",
    [
        {"op": "result", "responses": []},
        {"op": "result", "responses": [5]},
        {"op": "result", "responses": 5},
        {"op": "result", "responses": [{"outputs": 10**9}]},
        {"op": "result", "responses": [{"outputs": "all"}]},
        {"op": "result", "responses": [{"outputs": 0}, {"outputs": 0}]},
        {"op": "result", "responses": [{"error": [1]}]},
        {"op": "result", "responses": [{"error": "x", "own": True, "code": 7}]},
        {"op": "result"},
        {"op": "error"},
        {"op": "result", "id": "one"},
        {"op": "nonsense"},
        {"op": "loaded"},
        {"op": "response", "final": True},
    ],
)
def test_forged_responses_affect_only_their_own_model(load, forged):
    head = """
import socket
from services.infer.model_process.channel import Channel

def forge(number):
    fds = [fd for fd in range(3, 30) if os.path.exists(f"/proc/self/fd/{fd}")]
    fd = next(fd for fd in fds if "socket" in os.readlink(f"/proc/self/fd/{fd}"))
    Channel(socket.socket(fileno=os.dup(fd))).send({"id": number, **FORGED})

FORGED = """ + repr(forged)
    session = load(model("if x[0, 0] == 13: forge(int(x[0, 1]))", head=head))
    first = run(session)
    assert first == [[2, 4]]
    try:
        got = session.run({"x": np.array([[13, 2]], np.float32)}, ["y"])
    except (ModelFailed, ModelDied):
        pass
    else:
        assert got == [] or (13 * 2) in got[0]
    assert run(session) == [[2, 4]]


def test_output_of_the_process_is_logged(load, caplog):
    caplog.set_level(logging.INFO)
    noise = "print('out ' + 'é' * 10); print('err', file=sys.stderr); os.write(1, b'\\xff raw\\n')"
    session = load(model(noise + "; os.write(2, b'a' * 99999)"))
    run(session)
    session.close()
    lines = [record.getMessage() for record in caplog.records if record.name == "services.infer.model_process.process"]
    for text in ("out éééééééééé", "err", "\ufffd raw"):
        assert f"model m version 1: {text}" in lines
    assert sum(line.count("a") for line in lines if "aaaa" in line) >= 99999
    assert max(map(len, lines)) < 10_000


def test_a_model_that_writes_endless_output_while_loading_loads(load):
    assert run(load(model("", load="for _ in range(3000): print('x' * 100)"))) == [[2, 4]]


def test_a_model_may_keep_and_modify_its_inputs(load):
    session = load(model("self.kept = getattr(self, 'kept', x); x += 1; x = self.kept"))
    big = np.ones((1, 1 << 20), np.float32)
    first = session.run({"x": big}, ["y"])[0]
    assert first.max() == first.min() == 4
    assert session.run({"x": big * 7}, ["y"])[0].max() == 4
    assert big.max() == 1


def test_unloading_frees_the_memory_and_runs_the_clean_up(load, tmp_path):
    session = load(
        model(
            "",
            load="self.held = np.ones(200 << 20, np.uint8); self.folder = folder",
            unload="open(f'{self.folder}/bye', 'w')",
        )
    )
    (pid,) = pids(session)
    held = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096
    assert held > 200 << 20
    fds = len(os.listdir("/proc/self/fd"))
    session.close()
    assert not is_alive(pid)
    assert (tmp_path / "m" / "1" / "bye").exists()
    assert len(os.listdir("/proc/self/fd")) < fds


@pytest.mark.parametrize("unload", ["while True: pass", "raise RuntimeError", "os._exit(1)"])
def test_a_failing_clean_up_does_not_block_unloading(load, monkeypatch, unload):
    monkeypatch.setattr("services.infer.model_process.instance._GRACE_S", 0.5)
    session = load(model("", unload=unload))
    (pid,) = pids(session)
    session.close()
    assert not is_alive(pid)


def test_processes_started_by_the_model_end_with_its_process(load, tmp_path):
    session = load(
        model(
            "",
            head="import subprocess",
            load="open(f'{folder}/pid', 'w').write(str(subprocess.Popen(['sleep', '1000']).pid))",
        )
    )
    started = int((tmp_path / "m" / "1" / "pid").read_text())
    assert is_alive(started)
    os.kill(pids(session)[0], signal.SIGKILL)
    wait_until(lambda: not is_alive(started))


DAEMON = """
def daemon():
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.execvp("sleep", ["sleep", "1000"])
        os._exit(0)
    os.wait()
"""
# Statements by which a model starts a process that leaves its process group.
STARTED = {
    "a session of its own": "subprocess.Popen(['sleep', '1000'], start_new_session=True)",
    "a daemon": "daemon()",
    "a fork that waits": "os.fork() or (os.setsid(), time.sleep(1000))",
    "no environment": "subprocess.Popen(['sleep', '1000'], env={}, process_group=0)",
    "a child of a child": "subprocess.Popen(['setsid', 'sh', '-c', 'env -i setsid sleep 1000; true'])",
}


def descendants(folder: Path) -> set[int]:
    """Return the processes whose working directory is `folder`, as a model's processes have it."""
    found = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            if os.readlink(f"/proc/{pid}/cwd") == str(folder) and is_alive(int(pid)):
                found.add(int(pid))
    return found


@pytest.mark.parametrize("how", STARTED)
@pytest.mark.parametrize("end", ["close", "crash"])
def test_processes_that_left_the_group_of_the_model_end_with_its_process(load, tmp_path, how, end):
    session = load(model("", head="import subprocess" + DAEMON, load=STARTED[how]))
    folder = tmp_path / "m" / "1"
    own = set(pids(session))
    wait_until(lambda: descendants(folder) - own)
    first = descendants(folder)
    if end == "close":
        session.close()
    else:
        os.kill(pids(session)[0], signal.SIGKILL)
    wait_until(lambda: not any(map(is_alive, first)))


def test_a_daemon_without_an_environment_for_a_moment_ends_with_the_process_of_the_model(load, tmp_path, monkeypatch):
    session = load(model("", head="import subprocess" + DAEMON, load=STARTED["a daemon"]))
    folder = tmp_path / "m" / "1"
    wait_until(lambda: descendants(folder) - set(pids(session)))
    [daemon] = descendants(folder) - set(pids(session))
    looked = []
    environment = started._environment

    def replaces_its_program(pid: int) -> bytes:
        looked.extend([pid] * (pid == daemon))
        return b"" if looked == [daemon] else environment(pid)

    monkeypatch.setattr(started, "_environment", replaces_its_program)
    os.kill(pids(session)[0], signal.SIGKILL)
    wait_until(lambda: not is_alive(daemon))
    assert len(looked) >= 2


def test_a_process_is_reaped_where_the_processes_it_had_started_cannot_be_found(load, monkeypatch):
    def fails(mark: str, session: int) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(started, "end_all", fails)
    session = load(model(""))
    first = session.instances[0].running(PATIENCE_S)
    os.kill(first.pid, signal.SIGKILL)
    assert first.died.wait(PATIENCE_S)
    assert first.end == "signal 9, SIGKILL"


def test_processes_of_another_model_go_on(load, tmp_path):
    starts = "subprocess.Popen(['sleep', '1000'], start_new_session=True)"
    session = load(model("", head="import subprocess", load=starts), instances=2)
    folder = tmp_path / "m" / "1"
    wait_until(lambda: len(descendants(folder)) == 4)
    os.kill(pids(session)[0], signal.SIGKILL)
    wait_until(lambda: len(descendants(folder)) == 4 and len(set(pids(session))) == 2)
    session.close()
    wait_until(lambda: not descendants(folder))


def test_output_without_end_is_logged_in_part_and_other_work_goes_on(load, caplog):
    caplog.set_level(logging.INFO)
    session = load(model("[print('x' * 20) for _ in range(20_000)]"))
    run(session)
    session.close()
    lines = [record.getMessage() for record in caplog.records if record.name == "services.infer.model_process.process"]
    kept = sum("x" * 20 in line for line in lines)
    dropped = sum(int(found[1]) for line in lines if (found := re.search(r"dropped (\d+) lines", line)))
    assert 1_000 <= kept < 10_000
    assert kept + dropped == 20_000


def test_a_long_error_is_logged_in_part_and_the_model_does_not_wait_for_it(load, caplog):
    caplog.set_level(logging.INFO)
    session = load(model("raise ValueError('begin ' + 'x' * 20_000_000 + ' end')"))
    with pytest.raises(ModelFailed, match=r"ValueError: begin x+") as err:
        run(session)
    assert len(str(err.value)) < 2000
    session.close()
    lines = [record.getMessage() for record in caplog.records if record.name == "services.infer.model_process.process"]
    assert sum(line.count("x") for line in lines) < 20_000
    assert any("ValueError: begin x" in line for line in lines)
    assert any(line.endswith("x end") for line in lines)


def test_instances_run_concurrently(load):
    session = load(model("time.sleep(0.5); x = x * 0 + os.getpid() / 2"), instances=3)
    results: list[float] = []
    threads = [threading.Thread(target=lambda: results.append(run(session)[0][0])) for _ in range(3)]
    start = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {int(result) for result in results} == set(pids(session))
    assert time.monotonic() - start < PATIENCE_S


def test_a_crash_does_not_affect_other_instances(load):
    session = load(model("if x[0, 0] == 13: os._exit(1)", load="time.sleep(0.3)"), instances=2)
    with pytest.raises(ModelDied):
        run(session, X * 0 + 13)
    got = session.run_requests({"x": [X]}, ["y"], [1], [])  # Without patience.
    assert [array.tolist() for array in got[0]] == [[[2, 4]]]


def test_an_onnx_model_in_a_process(tmp_path):
    file = tmp_path / "model.onnx"
    file.write_bytes(onnx_files.lookup().SerializeToString())
    session = IsolatedOnnxRuntime().load(file, SessionOptions(1))
    try:
        (pid,) = pids(session)
        assert session.run({"i": np.array([[1]])}, ["y"])[0].tolist() == [[20]]
        with pytest.raises(ModelFailed, match="idx=3 must be within the inclusive range"):
            session.run({"i": np.array([[3]])}, ["y"])
        os.kill(pid, signal.SIGKILL)
        assert session.run({"i": np.array([[2]])}, ["y"])[0].tolist() == [[30]]
    finally:
        session.close()


def test_isolation_none_runs_the_model_in_the_server(load):
    session = load(model("x = x * 0 + os.getpid() / 2"), isolation="none", instances=2)
    assert int(run(session)[0][0]) == os.getpid()
    assert not [module for module in ("model",) if module in sys.modules]
    threads = threading.active_count()
    session.close()
    wait_until(lambda: threading.active_count() < threads)
    with pytest.raises(FailedPrecondition, match="execution_timeout_ms needs isolation 'process'"):
        load(model(""), isolation="none", execution_timeout_ms="5")


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("EXECUTION_ENV_PATH", "$$TRITON_MODEL_DIRECTORY/env.tar.gz", "parameter EXECUTION_ENV_PATH is not supported"),
        ("execution_timeout_ms", "soon", "parameter execution_timeout_ms 'soon': expected a number"),
        ("load_timeout_ms", "-1", "parameter load_timeout_ms '-1'"),
        ("max_streams", "0", "parameter max_streams '0': expected a number from 1"),
        ("isolation", "thread", "parameter isolation 'thread': expected"),
    ],
)
def test_an_invalid_parameter_is_named(load, key, value, told):
    with pytest.raises(FailedPrecondition) as err:
        load(model(""), **{key: value})
    assert told in err.value.message
