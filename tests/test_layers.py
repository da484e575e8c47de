"""Imports point down only, and modules are named by what they are about.

shoal.cli -> shoal.client, shoal.convert, shoal.compress, shoal.discovery, shoal.node
shoal.compress -> shoal.convert -> shoal's errors; only when a model is converted or compressed
services  -> mesh, kernels, shoal's stubs, errors, tensor codec and own_packages; never each other
mesh      -> shoal's stubs and errors; no service
kernels   -> nothing of ours, no grpc, no asyncio
shoal.client, shoal.discovery -> shoal's stubs, errors and tensor codec
shoal.client -> mesh.rpc.client, and nothing else of the mesh: a gRPC client that knows neither nodes nor services, with
                which ingest calls the others, too
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("shoal", "mesh", "services", "kernels")
STUBS = ("shoal.ingest", "shoal.store", "shoal.coord", "shoal.inference", "shoal.remote")


def modules() -> list[str]:
    found = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return found


def source_of(module: str) -> Path:
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def imports_of(module: str) -> set[str]:
    """Every module that `module` imports, at the top or inside a function, as absolute names."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source_of(module).read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            base = node.module or ""
            names.update(f"{base}.{alias.name}" for alias in node.names)
    return names


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def allowed(module: str) -> tuple[str, ...]:
    """What of ours `module` may import."""
    bottom = (*STUBS, "shoal.errors", "shoal.oip", "shoal.__version__", "shoal._version")
    if within(module, "kernels"):
        return ("kernels",)
    if within(module, "mesh"):
        return ("mesh", *bottom)
    if within(module, "services"):
        own = ".".join(module.split(".")[:2])
        return (own, "mesh", "kernels", "shoal.own_packages", *bottom)
    if within(module, "shoal.cli"):
        return ("shoal", "mesh")
    if within(module, "shoal.convert"):
        return ("shoal.convert", "shoal.errors")
    if within(module, "shoal.compress"):
        return ("shoal.compress", "shoal.convert", "shoal.errors")
    if within(module, "shoal.client"):
        return ("shoal.client", "shoal.discovery", "mesh.rpc.client", *bottom)
    return ("shoal.client", "shoal.discovery", *bottom)


@pytest.mark.parametrize("module", modules())
def test_imports_point_down(module: str) -> None:
    ours = {name for name in imports_of(module) if within(name, *PACKAGES)}
    wrong = {name for name in ours if not within(name, *allowed(module))}
    assert not wrong, f"{module} may not import {sorted(wrong)}"


@pytest.mark.parametrize("module", [name for name in modules() if within(name, "kernels")])
def test_kernels_know_no_transport(module: str) -> None:
    assert not {name for name in imports_of(module) if within(name, "grpc", "asyncio", "google", "pymongo")}


FRAMEWORKS = ("torch", "sklearn", "skl2onnx", "xgboost", "lightgbm", "onnxmltools", "joblib", "skops", "onnx")


def test_the_command_line_imports_frameworks_only_to_convert() -> None:
    code = "import sys, shoal.cli.models, shoal.client; print([name for name in sys.modules if '.' not in name])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not set(ast.literal_eval(loaded)) & set(FRAMEWORKS)


@pytest.mark.parametrize("module", modules())
def test_no_module_is_named_by_pattern_or_like_a_package_that_we_import(module: str) -> None:
    name = module.rpartition(".")[2]
    assert name not in {"utils", "util", "helpers", "helper", "common", "manager", "misc"}
    clashes = {
        "grpc",
        "numpy",
        "pymongo",
        "pydantic",
        "obstore",
        "onnxruntime",
        "aetcd",
        "numba",
        "typer",
        "rich",
        "cupy",
    }
    clashes |= {*FRAMEWORKS}
    assert name not in clashes, f"{module} is named like a package"


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_ships_its_types(package: str) -> None:
    assert (ROOT / package / "py.typed").exists()
