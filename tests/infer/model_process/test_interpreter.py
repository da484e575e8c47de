"""Which Python is taken, in processes of every kind."""

from __future__ import annotations

import os
import sys

import numpy as np
import pytest

from services.infer.model_process import interpreter
from services.infer.model_process.python_runtime import PythonRuntime
from services.infer.runtimes.runtime import About, SessionOptions
from shoal.errors import FailedPrecondition


def test_the_servers_own_interpreter_is_the_default():
    assert interpreter.find_interpreter({}) == sys.executable


def test_shoal_python_has_precedence_and_must_be_executable(tmp_path):
    assert interpreter.find_interpreter({"SHOAL_PYTHON": sys.executable}) == sys.executable
    for wrong in (str(tmp_path), str(tmp_path / "none"), __file__):
        with pytest.raises(FailedPrecondition, match=f"SHOAL_PYTHON is '{wrong}'"):
            interpreter.find_interpreter({"SHOAL_PYTHON": wrong})


def test_an_embedding_program_is_skipped_for_the_prefix(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", "/usr/bin/true")
    monkeypatch.setattr(sys, "_base_executable", "/usr/bin/true")
    assert interpreter.find_interpreter({}).startswith(f"{sys.prefix}/bin/python3")
    (tmp_path / "bin").mkdir()
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert interpreter.find_interpreter({}).startswith(f"{sys.base_prefix}/bin/python3")
    monkeypatch.setattr(sys, "base_prefix", str(tmp_path))
    with pytest.raises(FailedPrecondition, match="set SHOAL_PYTHON"):
        interpreter.find_interpreter({"PATH": str(tmp_path)})
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    (tmp_path / "bin" / version).symlink_to(os.path.realpath(f"/proc/{os.getpid()}/exe"))
    assert interpreter.find_interpreter({"PATH": str(tmp_path / "bin")}) == str(tmp_path / "bin" / version)


def test_variables_of_an_embedding_program_are_dropped():
    given = {"LD_PRELOAD": "/lib/libpython.so", "PYTHONHOME": "/x", "PYTHONPATH": "/y", "HOME": "/home/me"}
    made = interpreter.environment(given)
    assert "LD_PRELOAD" not in made
    assert "PYTHONHOME" not in made
    assert made["HOME"] == "/home/me"
    assert {path for path in sys.path if path and os.path.exists(path)} <= set(made["PYTHONPATH"].split(os.pathsep))


KEPT = """
PATH HOME TMPDIR TZ LANG LC_ALL PYTHONHASHSEED OMP_NUM_THREADS OPENBLAS_NUM_THREADS MKL_NUM_THREADS CUDA_VISIBLE_DEVICES
NVIDIA_VISIBLE_DEVICES ROCR_VISIBLE_DEVICES HIP_VISIBLE_DEVICES LD_LIBRARY_PATH KERNELS_BACKEND SHOAL_MODEL_DATA
"""
DROPPED = """
SHOAL_STORE_MONGO SHOAL_INFER_MESH SHOAL_TOKEN MONGODB_URI AWS_SECRET_ACCESS_KEY AZURE_CLIENT_SECRET HF_TOKEN
GITHUB_TOKEN GOOGLE_APPLICATION_CREDENTIALS LANGSMITH_API_KEY SSH_AUTH_SOCK PYTHONHOME PYTHONSTARTUP PYTHONINSPECT
LD_PRELOAD
"""


def test_a_model_process_gets_only_the_listed_variables():
    made = interpreter.environment({key: f"{key}'s value" for key in (KEPT + DROPPED).split()})
    assert made.keys() == {*KEPT.split(), "PYTHONPATH", "PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE"}
    assert all(made[key] == f"{key}'s value" for key in KEPT.split())


def test_a_model_cannot_read_the_servers_secrets(tmp_path):
    (tmp_path / "model.py").write_text(READS_ENVIRONMENT)
    environ = {**os.environ, "MONGODB_URI": "mongodb://user:password@host", "SHOAL_MODEL_GREETING": "hello"}
    session = PythonRuntime(environ).load(tmp_path / "model.py", SessionOptions(1, about=About("m")))
    try:
        (found,) = session.run({"x": np.array([[b"MONGODB_URI"], [b"SHOAL_MODEL_GREETING"]], object)}, ["y"])
    finally:
        session.close()
    assert found.tolist() == [[b"unset"], [b"hello"]]


READS_ENVIRONMENT = """
import os
import numpy as np


class Model:
    inputs = {"x": ("BYTES", [-1, 1])}
    outputs = {"y": ("BYTES", [-1, 1])}

    def predict(self, batch):
        values = [[os.environ.get(name.decode(), "unset").encode()] for name in batch["x"].ravel()]
        return {"y": np.array(values, object)}
"""
