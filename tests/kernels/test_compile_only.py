"""Every GPU kernel compiles for sm_80 and sm_90 with CUDA 12 and 13: no spills, no stack frame, no double precision.

The short form compiles for one architecture with each version of CUDA.

The compilers are in environments of their own, `make .venv-cuda12/.installed .venv-cuda13/.installed`.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from kernels import operations
from tests.long_form import by_form

COMPILING = Path(__file__).parent / "compile_only" / "compiling.py"
FAULTS = Path(__file__).parent / "shim" / "faults.cu"
ARCHS = ["sm_80", "sm_90"]
COMPILED = {"cuda12": by_form(["sm_80"], ARCHS), "cuda13": by_form(["sm_90"], ARCHS)}


def compiled(root: Path, cuda: str, out: Path, archs: list[str], *given: str) -> subprocess.CompletedProcess[str]:
    python = root / f".venv-{cuda}/bin/python"
    if not python.exists():
        pytest.fail(f"no compilers for {cuda}: make .venv-{cuda}/.installed")
    return subprocess.run(
        [python, COMPILING, out, ",".join(archs), *given], capture_output=True, text=True, timeout=100
    )


@pytest.fixture(scope="module", params=COMPILED)
def cuda(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def reports(cuda: str, repository_root: Path, tmp_path_factory: Any) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("compiled") / "reports.json"
    ran = compiled(repository_root, cuda, out, COMPILED[cuda])
    assert ran.returncode == 0, ran.stderr[-4000:]
    return json.loads(out.read_text())


def test_every_operation_is_compiled_for_each_architecture(cuda: str, reports: list[dict[str, Any]]) -> None:
    on_gpu = {name for name in operations.names() if list((operations.ROOT / name).glob("*cuda.py"))}
    for arch in COMPILED[cuda]:
        assert {report["operation"] for report in reports if report["arch"] == arch} == on_gpu


def test_machine_code_is_lean(reports: list[dict[str, Any]]) -> None:
    wrong = [
        report
        for report in reports
        if report["spill_bytes"]
        or report["stack_bytes"]
        or report["f64"]
        or (report["limit"] and report["registers"] > report["limit"])
    ]
    assert not wrong


def test_a_kernel_that_does_not_compile_is_told(cuda: str, repository_root: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.cu"
    broken.write_text("__global__ void broken(int* out) { out[0] = undeclared; }")
    ran = compiled(repository_root, cuda, tmp_path / "reports.json", ARCHS, str(broken), "broken")
    assert ran.returncode != 0
    assert 'identifier "undeclared" is undefined' in ran.stderr


def test_double_precision_and_stack_frames_are_seen(repository_root: Path, tmp_path: Path) -> None:
    fat = tmp_path / "fat.cu"
    fat.write_text(
        "__global__ void fat(int* o, int n) {"
        "    int a[64];"
        "    for (int i = 0; i < 64; ++i) a[i] = o[i];"
        "    o[n] = a[o[n]] * 0.1;"
        "}"
    )
    out = tmp_path / "reports.json"
    ran = compiled(repository_root, "cuda13", out, ARCHS, str(fat), "fat")
    assert ran.returncode == 0, ran.stderr
    for report in json.loads(out.read_text()):
        assert report["f64"] > 0
        assert report["stack_bytes"] >= 256
