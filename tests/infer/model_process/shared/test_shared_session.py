"""A shared model's owner, used by two infer processes' sessions: one process, its end, and what its deaths do."""

from __future__ import annotations

import os
import signal
import subprocess
import textwrap
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from services.infer.model_process.python_runtime import IsolatedOnnxRuntime, PythonRuntime
from services.infer.model_process.session import ModelDied, ProcessSession
from services.infer.model_process.shared.owners import Owners
from services.infer.runtimes.runtime import About, ExecutionPlacement, ModelFailed, SessionOptions
from shoal.errors import FailedPrecondition
from shoal.inference.v2 import model_config_pb2 as pb
from tests.breakable import PATIENCE_S
from tests.infer import onnx_files
from tests.infer.model_process.test_model_process import is_alive, model, pids, run, wait_until

Load = Callable[..., ProcessSession]


@pytest.fixture
def folder(run_dir: Path) -> Path:
    run_dir.chmod(0o700)
    return run_dir


@pytest.fixture
def load(folder: Path, tmp_path: Path) -> Iterator[Load]:
    with ExitStack() as loaded:

        def load(source: str, *, instances: int = 1, digest: str = "", **parameters: str) -> ProcessSession:
            """As another infer process would: with owners of its own, on the same folder."""
            config = pb.ModelConfig(name="m")
            for key, value in {"isolation": "shared", **parameters}.items():
                config.parameters[key].string_value = value
            file = tmp_path / "m" / "1" / "model.py"
            file.parent.mkdir(parents=True, exist_ok=True)
            if not file.exists() or file.read_text() != source:
                file.write_text(source)
            about = About("m", 1, file.parent.parent, config, instances, digest=digest)
            owners = loaded.enter_context(Owners(folder))
            session = PythonRuntime(owners=owners).load(file, SessionOptions(1, about=about))
            loaded.callback(session.close)
            return session

        yield load


def test_two_sessions_share_one_process_which_ends_with_the_last_session(load):
    one, two = load(model("")), load(model(""))
    (pid,) = pids(one)
    assert pids(two) == [pid]
    assert (run(one), run(two)) == ([[2, 4]], [[2, 4]])
    one.close()
    assert run(two) == [[2, 4]]
    assert pids(two) == [pid]
    two.close()
    wait_until(lambda: not is_alive(pid))
    three = load(model(""))
    assert pids(three) != [pid]
    assert run(three) == [[2, 4]]


def test_changed_content_gets_a_separate_process(load):
    one, two = load(model(""), digest="a"), load(model(""), digest="b")
    (first,), (second,) = pids(one), pids(two)
    assert first != second
    one.close()
    wait_until(lambda: not is_alive(first))
    assert run(two) == [[2, 4]]


def test_each_instance_of_a_python_model_is_one_shared_process(load):
    one, two = load(model(""), instances=2), load(model(""), instances=2)
    assert len(set(pids(one))) == 2
    assert pids(one) == pids(two)


def test_each_session_gets_its_own_results_under_load(load):
    sessions = [load(model("")), load(model(""))]

    def ask(n: int) -> None:
        for k in range(50):
            x = np.array([[n, k]], np.float32)
            assert run(sessions[n % 2], x) == [[2 * n, 2 * k]]

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(ask, range(6)))


def test_a_shared_process_killed_while_idle_restarts_without_a_failed_request(load):
    one, two = load(model("")), load(model(""))
    (pid,) = pids(one)
    os.kill(pid, signal.SIGKILL)
    assert (run(one), run(two)) == ([[2, 4]], [[2, 4]])
    assert pids(one) == pids(two) != [pid]
    assert not one.poison
    assert not two.poison


def test_a_batch_that_was_waiting_at_the_crash_is_retried_and_not_recorded_as_poison(load, tmp_path):
    gate = tmp_path / "gate"
    source = model(f"if x[0, 0] == 13:\n    open({str(gate)!r}, 'w').close()\n    time.sleep(0.3)\n    os._exit(3)")
    one, two = load(source), load(source)
    with ThreadPoolExecutor(2) as threads:
        guilty = threads.submit(run, one, np.array([[13, 0]], np.float32))
        wait_until(gate.exists)
        innocent = threads.submit(run, two)
        with pytest.raises(ModelDied, match="exit code 3") as err:
            guilty.result(PATIENCE_S)
        assert (err.value.is_confirmed, err.value.is_alone) == (True, True)
        assert innocent.result(PATIENCE_S) == [[2, 4]]


def test_waiting_for_another_run_does_not_count_towards_the_execution_timeout(load, tmp_path):
    gate = tmp_path / "gate"
    source = model(f"if x[0, 0] == 13:\n    open({str(gate)!r}, 'w').close()\n    time.sleep(600)")
    one, two = (load(source, execution_timeout_ms="1500") for _ in range(2))
    with ThreadPoolExecutor(2) as threads:
        stuck = threads.submit(run, one, np.array([[13, 0]], np.float32))
        wait_until(gate.exists)
        waits = threads.submit(run, two)
        with pytest.raises(ModelDied, match="longer than execution_timeout_ms, 1500"):
            stuck.result(PATIENCE_S)
        assert waits.result(PATIENCE_S) == [[2, 4]]


def test_a_load_error_is_reported_to_each_session(load):
    broken = model("", load="raise ValueError('no such weights')")
    for _ in range(2):
        with pytest.raises(FailedPrecondition, match="no such weights"):
            load(broken)


def test_an_error_of_the_model_is_reported_to_the_requesting_session(load):
    one, two = (load(model("if x[0, 0] == 13: raise ValueError('thirteen')")) for _ in range(2))
    with pytest.raises(ModelFailed, match="thirteen"):
        run(one, np.array([[13, 0]], np.float32))
    assert run(two) == [[2, 4]]


def test_a_shared_onnx_model_is_one_session_with_concurrent_runs(folder: Path, tmp_path: Path):
    file = tmp_path / "model.onnx"
    file.write_bytes(onnx_files.scale().SerializeToString())
    config = pb.ModelConfig(name="m", parameters={"isolation": {"string_value": "shared"}})
    options = SessionOptions(
        1, placements=(ExecutionPlacement("cpu", None, 3),), about=About("m", config=config, instances=3)
    )
    with ExitStack() as stack:
        sessions = []
        for _ in range(2):
            runtime = IsolatedOnnxRuntime(owners=stack.enter_context(Owners(folder)))
            sessions.append(runtime.load(file, options))
            stack.callback(sessions[-1].close)
        assert len({pid for session in sessions for pid in pids(session)}) == 1
        barrier = threading.Barrier(6)

        def ask(n: int) -> None:
            x = np.full((1, 4), n, np.float32)
            barrier.wait(PATIENCE_S)
            for _ in range(30):
                (got,) = sessions[n % 2].run({"x": x}, ["y"])
                assert got.tolist() == [[2 * n] * 4]

        with ThreadPoolExecutor(6) as threads:
            list(threads.map(ask, range(6)))


def test_a_shared_folder_with_access_for_others_is_rejected(tmp_path: Path):
    tmp_path.chmod(0o755)
    with pytest.raises(FailedPrecondition, match="belongs to this user, with mode 0700"):
        Owners(tmp_path)
    with pytest.raises(FailedPrecondition, match="No such file"):
        Owners(tmp_path / "nowhere")


HOLDS = textwrap.dedent("""
    import sys
    from pathlib import Path
    from services.infer.model_process.python_runtime import PythonRuntime
    from services.infer.runtimes.runtime import About, SessionOptions
    from services.infer.model_process.shared.owners import Owners
    from shoal.inference.v2 import model_config_pb2 as pb

    file = Path(sys.argv[2])
    about = About("m", config=pb.ModelConfig(name="m", parameters={"isolation": {"string_value": "shared"}}))
    session = PythonRuntime(owners=Owners(Path(sys.argv[1]))).load(file, SessionOptions(1, about=about))
    print(session.instances[0].running().pid, flush=True)
    session.run({"x": __import__("numpy").zeros((1, 1), "f4")}, ["y"])
""")


def test_an_owner_dies_with_the_infer_processes_even_in_native_code(folder, tmp_path, python):
    """The model holds Python's lock in a call that does not end: none of its threads can see to anything."""
    file = tmp_path / "model.py"
    file.write_text(model("ctypes.PyDLL(None).sleep(600)"))
    holder = subprocess.Popen([python, "-c", HOLDS, str(folder), str(file)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout
        pid = int(holder.stdout.readline())
        assert is_alive(pid)
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    wait_until(lambda: not is_alive(pid))
