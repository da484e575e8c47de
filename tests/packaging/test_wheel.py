"""The wheel with the extra `node`, in an empty environment outside the checkout, starts `shoal serve` and `shoal up`.

    wheel ──metadata──> the distributions that it and its extra name, and what those name
                            │ linked file by file from the environment that runs the tests: no network
                            v
    a new environment that has these, the wheel, and nothing else

What the metadata does not name is not there, and what the wheel does not contain is not there.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator
from importlib import metadata
from importlib.util import cache_from_source
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from shoal import __version__
from tests.compress import models

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("shoal", "mesh", "services", "kernels")
PROOF_S = 100


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=100)
    return folder


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (wheel,) = dist.glob("*.whl")
    return wheel


def checked_in() -> set[str]:
    """The files of our packages in the checkout."""
    files = (path for name in PACKAGES for path in (ROOT / name).rglob("*") if path.is_file())
    return {str(path.relative_to(ROOT)) for path in files if "__pycache__" not in path.parts}


def test_the_wheel_has_every_file_of_our_packages_and_no_others(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = f"shoal-{__version__}.dist-info"
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
        described = archive.read(f"{info}/METADATA").decode()
        assert archive.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert {name for name in names if not name.startswith(info)} == checked_in()
    assert "shoal = shoal.cli.main:main" in entry_points
    assert "License-Expression: Apache-2.0" in described
    assert "Description-Content-Type: text/markdown" in described


def test_the_source_archive_has_what_the_wheel_is_built_from_and_no_tests(dist: Path) -> None:
    (source,) = dist.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert checked_in() <= names
    assert {"LICENSE", "README.md", "pyproject.toml"} <= names
    assert not {name for name in names if name.split("/")[0] in ("tests", "bench", "locks", ".ci")}


def needed(wheel: Path, extra: str) -> list[metadata.Distribution]:
    """The installed distributions that the wheel names, with `extra`, and all that those name."""
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(f"shoal-{__version__}.dist-info/METADATA").decode()
    lines = text.partition("\n\n")[0].splitlines()
    open_ = [
        (Requirement(line.removeprefix("Requires-Dist: ")), {extra})
        for line in lines
        if line.startswith("Requires-Dist: ")
    ]
    found: dict[str, metadata.Distribution] = {}
    seen: set[tuple[str, str]] = set()
    while open_:
        wanted, extras = open_.pop()
        if wanted.marker and not any(wanted.marker.evaluate({"extra": each}) for each in (*extras, "")):
            continue
        name = canonicalize_name(wanted.name)
        new = {each for each in (*wanted.extras, "") if (name, each) not in seen}
        if not new:
            continue
        seen |= {(name, each) for each in new}
        found[name] = metadata.distribution(name)
        open_ += [(Requirement(line), new) for line in found[name].requires or ()]
    return list(found.values())


def link(distribution: metadata.Distribution, site: Path) -> None:
    """Put the files of an installed distribution into another environment's `site`, with their bytecode."""
    for file in distribution.files or ():
        source = Path(str(distribution.locate_file(file)))
        placed = [(source, site / file)]
        if source.suffix == ".py":
            placed.append((Path(cache_from_source(str(source))), Path(cache_from_source(str(site / file)))))
        for old, new in placed:
            if old.is_file() and not new.exists():
                new.parent.mkdir(parents=True, exist_ok=True)
                try:
                    os.link(old, new)
                except OSError:  # Another file system.
                    shutil.copy2(old, new)


class Installed:
    """The environment that has the wheel. Commands run in a folder of its own, without PYTHONPATH."""

    def __init__(self, folder: Path, wheel: Path) -> None:
        self.folder = folder
        self.bin = folder / "venv/bin"
        uv = shutil.which("uv")
        subprocess.run(
            [sys.executable, "-m", "venv", *(["--without-pip"] if uv else []), str(folder / "venv")],
            check=True,
            timeout=PROOF_S,
        )
        (self.site,) = (folder / "venv/lib").glob("python*/site-packages")
        for distribution in needed(wheel, "node"):
            link(distribution, self.site)
        python = str(self.bin / "python")
        installer = [uv, "pip", "install", "--python", python] if uv else [python, "-m", "pip", "install"]
        self.run(*installer, "--quiet", "--no-index", f"{wheel}[node]")

    @property
    def environ(self) -> dict[str, str]:
        runtime = self.folder / "runtime"
        runtime.mkdir(mode=0o700, exist_ok=True)
        kept = {name: os.environ[name] for name in ("HOME", "LANG", "TMPDIR") if name in os.environ}
        return {**kept, "PATH": f"{self.bin}:/usr/bin:/bin", "XDG_RUNTIME_DIR": str(runtime)}

    def run(self, *command: object) -> str:
        """Run `command`, which must succeed, and return its output."""
        argv = [str(each) for each in command]
        done = subprocess.run(
            argv, cwd=self.folder, env=self.environ, capture_output=True, text=True, timeout=PROOF_S, check=False
        )
        assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
        return done.stdout

    def start(self, *args: object) -> subprocess.Popen[str]:
        argv = [str(self.bin / "shoal"), *map(str, args)]
        return subprocess.Popen(argv, cwd=self.folder, env=self.environ, stdout=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Installed:
    return Installed(tmp_path_factory.mktemp("installed"), wheel)


@pytest.fixture
def started(installed: Installed) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that end with the test."""
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if process.stdout:
            process.stdout.close()


def test_the_environment_has_the_wheel_and_not_the_checkout(installed: Installed) -> None:
    assert installed.run(installed.bin / "shoal", "--version") == f"shoal {__version__}\n"
    code = "import kernels, mesh, services, shoal; print(*(m.__file__ for m in (kernels, mesh, services, shoal)))"
    for path in installed.run(installed.bin / "python", "-c", code).split():
        assert Path(path).is_relative_to(installed.site)
    assert not list(installed.site.glob("pytest*"))


def test_serve_answers(installed: Installed, started: list[subprocess.Popen[str]]) -> None:
    models.perceptron(installed.folder / "m.onnx")
    started.append(installed.start("serve", "m.onnx", "--port", 0, "--json"))
    text = ""
    while not text.endswith("\n}\n"):
        line = started[0].stdout.readline()  # type: ignore[union-attr]
        assert line, f"it ended with {started[0].wait()} after {text!r}"
        text += line
    row = json.dumps({"x": np.ones((1, 16)).tolist()})
    address = json.loads(text)["address"]
    answer = json.loads(installed.run(installed.bin / "shoal", "infer", "m", row, "--gateway", address, "--json"))
    assert "scores" in json.dumps(answer)
    started[0].send_signal(signal.SIGTERM)
    assert started[0].wait(60) == 0


@pytest.mark.node
def test_up_becomes_ready_and_stops(installed: Installed, started: list[subprocess.Popen[str]]) -> None:
    ready = installed.folder / "ready.json"
    ports = ("--gateway-port", 0, "--admin-port", 0)
    started.append(installed.start("up", "--data-dir", "data", "--ready-file", ready, *ports, "--json"))
    deadline = time.monotonic() + PROOF_S
    while not ready.exists():
        assert started[0].poll() is None, f"it ended with {started[0].returncode}"
        assert time.monotonic() < deadline, "the node did not become ready"
        time.sleep(0.05)
    status = installed.run(installed.bin / "shoal", "status")
    assert all(service in status for service in ("coord", "store", "infer", "ingest"))
    started[0].send_signal(signal.SIGTERM)
    assert started[0].wait(60) == 0
