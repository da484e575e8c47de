"""`make demo`, as a newcomer runs it: every answer agrees, and nothing is left behind, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from examples.filetypes import demo
from tests.breakable import until
from tests.long_form import by_form

pytestmark = pytest.mark.node

DEMO = "examples.filetypes.demo"
# `make demo` sends 120.
FILES = by_form(40, 100)


@pytest.fixture
def folder() -> Iterator[Path]:
    """Where the demo's temporary files go; short, for its sockets."""
    with tempfile.TemporaryDirectory(prefix="d-") as folder:
        yield Path(folder)


def start(root: Path, folder: Path, *args: str, **environ: str) -> subprocess.Popen[str]:
    env = {**os.environ, "TMPDIR": str(folder), "XDG_RUNTIME_DIR": str(folder), **environ}
    return subprocess.Popen(
        [sys.executable, "-m", DEMO, *args],
        cwd=root,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def processes_of(folder: Path) -> list[str]:
    """Command lines of the processes that live in `folder`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(folder) in line:
            found.append(line)
    return found


def left_behind(folder: Path) -> list[str]:
    """Files but for the empty folders that a user's nodes share."""
    return [str(path) for path in folder.rglob("*") if not path.is_dir()]


def test_every_answer_agrees_and_nothing_is_left(repository_root: Path, folder: Path) -> None:
    process = start(repository_root, folder, "--files", str(FILES))
    output, _ = process.communicate(timeout=110)
    assert process.returncode == 0, output
    for said in ("at once agree with magika", "as jobs agree with magika", "as jobs agree with those at once"):
        assert f"{FILES} of {FILES} answers {said}" in output
    assert sum("local/infer-" in line and "%" not in line for line in output.splitlines()) >= FILES
    assert left_behind(folder) == []
    assert processes_of(folder) == []


@pytest.mark.parametrize("number", by_form([signal.SIGTERM], [signal.SIGINT, signal.SIGTERM]))
async def test_interrupted_while_the_node_starts(repository_root: Path, folder: Path, number: int) -> None:
    process = start(repository_root, folder)
    await until(lambda: any("mongod" in line for line in processes_of(folder)), "mongod")
    process.send_signal(number)
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 128 + number, output
    assert "Traceback" not in output
    assert left_behind(folder) == []
    assert processes_of(folder) == []


def test_a_node_that_does_not_start_shows_its_log(repository_root: Path, folder: Path) -> None:
    process = start(repository_root, folder, SHOAL_ENVOY_BINARY="/nothing/here")
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 1
    assert "before it was ready" in output
    assert "/nothing/here" in output
    assert "Traceback" not in output
    assert left_behind(folder) == []


def test_an_interruption_that_comes_out_of_an_extension_as_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    interruption: BaseException = KeyboardInterrupt()

    def interrupted(*_: object) -> int:
        raise RuntimeError("Could not create tensor from given input list") from interruption

    monkeypatch.setattr(demo, "_in_folder", interrupted)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["demo"])
    assert demo.main() == 130
    interruption = SystemExit(143)
    with pytest.raises(SystemExit) as ended:
        demo.main()
    assert ended.value.code == 143


def test_an_error_that_is_no_interruption_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> int:
        raise RuntimeError("broken")

    monkeypatch.setattr(demo, "_in_folder", broken)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["demo"])
    with pytest.raises(RuntimeError, match="broken"):
        demo.main()
