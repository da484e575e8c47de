"""Which Python is taken, in processes of every kind."""

from __future__ import annotations

import os
import sys

import pytest

from services.infer.model_process import interpreter
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
