"""A foreign `kernels`, `mesh` or `services` in the environment is named at the start, with what to do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shoal import own_packages

ROOT = Path(own_packages.__file__).parent.parent
SHOAL = Path(sys.executable).parent / "shoal"


def package(folder: Path, name: str, *, distribution: str = "") -> Path:
    """A foreign package `name` in `folder`, installed as `distribution` where one is given."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text("VALUE = 1\n")
    if distribution:
        info = folder / f"{distribution}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        (info / "RECORD").write_text(f"{name}/__init__.py,,\n{info.name}/METADATA,,\n{info.name}/RECORD,,\n")
    return folder / name


def run(*command: object, path: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PYTHONPATH": str(path)}
    argv = [str(each) for each in command]
    return subprocess.run(argv, env=environ, cwd=cwd, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("name", own_packages.PACKAGES)
@pytest.mark.parametrize("command", [["--version"], ["up"], ["serve", "m.onnx"]])
def test_the_command_line_names_a_foreign_package(tmp_path: Path, name: str, command: list[str]) -> None:
    foreign = package(tmp_path / "other", name)
    done = run(SHOAL, *command, path=tmp_path / "other", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"shoal: Python finds another package '{name}', at {foreign}, before Shoal's. Shoal's own is at {ROOT / name}. "
        f"Either start with a PYTHONPATH without {foreign.parent}, or install Shoal in an environment of its own.\n"
    )


def test_the_distribution_of_a_foreign_package_is_named(tmp_path: Path) -> None:
    package(tmp_path / "other", "kernels", distribution="fast-kernels")
    done = run(SHOAL, "status", path=tmp_path / "other", cwd=tmp_path)
    assert done.returncode == 1
    assert "of the distribution fast-kernels, before Shoal's" in done.stderr
    assert "Either uninstall fast-kernels, or install Shoal in an environment of its own" in done.stderr


@pytest.mark.parametrize("service", ["coord", "store", "infer", "ingest", "ingest.connectors"])
def test_a_service_process_names_a_foreign_package(tmp_path: Path, service: str) -> None:
    foreign = package(tmp_path / "other", "mesh")
    done = run(sys.executable, "-P", "-m", f"services.{service}", path=tmp_path / "other", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"shoal: Python finds another package 'mesh', at {foreign}, before Shoal's.")
    assert "Traceback" not in done.stderr


def test_a_plain_module_of_the_name_is_foreign_too(tmp_path: Path) -> None:
    (tmp_path / "kernels.py").write_text("")
    done = run(SHOAL, "status", path=tmp_path, cwd=tmp_path)
    assert done.returncode == 1
    assert f"another package 'kernels', at {tmp_path / 'kernels.py'}" in done.stderr


def test_a_folder_that_is_no_package_is_no_matter(tmp_path: Path) -> None:
    (tmp_path / "services").mkdir()
    done = run(SHOAL, "--version", path=tmp_path, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture
def importable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_a_package_that_was_installed_over_ours_is_told_by_its_text(importable: Path) -> None:
    package(importable, "shoal_test_mesh", distribution="other-mesh")
    text = own_packages.problem(["shoal_test_mesh"], importable)
    assert "another package 'shoal_test_mesh' was installed over Shoal's own" in text
    assert "Either uninstall other-mesh and install Shoal again" in text


def test_a_missing_package_is_said_to_be_missing(importable: Path) -> None:
    text = own_packages.problem(["shoal_test_gone"], importable)
    assert f"'shoal_test_gone' is missing: there is no {importable / 'shoal_test_gone'}" in text


def test_shoals_own_packages_are_found_to_be_its_own() -> None:
    assert own_packages.problem() == ""


def test_the_check_imports_none_of_the_packages_and_nothing_heavy() -> None:
    code = (
        "import sys; from shoal import own_packages; own_packages.exit_when_foreign();"
        "unwanted = {'kernels', 'mesh', 'services', 'numpy', 'grpc'};"
        "print([name for name in sys.modules if name.partition('.')[0] in unwanted])"
    )
    done = run(sys.executable, "-c", code, path=ROOT, cwd=ROOT)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
