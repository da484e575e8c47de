"""Imports point down only, and modules are named by what they are about.

shoal.cli -> shoal.client, shoal.discovery, mesh.node
services  -> mesh, kernels, shoal's stubs and errors; never each other
mesh      -> shoal's stubs and errors; no service
kernels   -> nothing of ours, no grpc, no asyncio
shoal.client, shoal.discovery -> shoal's stubs and errors
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("shoal", "mesh", "services", "kernels")
STUBS = ("shoal.ingest", "shoal.store", "shoal.coord", "shoal.inference")


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
    bottom = (*STUBS, "shoal.errors", "shoal.__version__", "shoal._version")
    if within(module, "kernels"):
        return ("kernels",)
    if within(module, "mesh"):
        return ("mesh", *bottom)
    if within(module, "services"):
        own = ".".join(module.split(".")[:2])
        return (own, "mesh", "kernels", *bottom)
    if within(module, "shoal.cli"):
        return ("shoal", "mesh")
    return ("shoal.client", "shoal.discovery", *bottom)


@pytest.mark.parametrize("module", modules())
def test_imports_point_down(module: str) -> None:
    ours = {name for name in imports_of(module) if within(name, *PACKAGES)}
    wrong = {name for name in ours if not within(name, *allowed(module))}
    assert not wrong, f"{module} may not import {sorted(wrong)}"


@pytest.mark.parametrize("module", [name for name in modules() if within(name, "kernels")])
def test_kernels_know_no_transport(module: str) -> None:
    assert not {name for name in imports_of(module) if within(name, "grpc", "asyncio", "google", "pymongo")}


@pytest.mark.parametrize("module", modules())
def test_no_module_is_named_by_pattern_or_like_a_package_that_we_import(module: str) -> None:
    name = module.rpartition(".")[2]
    assert name not in {"utils", "util", "helpers", "helper", "common", "manager", "misc"}
    clashes = {
        "grpc",
        "numpy",
        "cupy",
        "pymongo",
        "pydantic",
        "obstore",
        "onnxruntime",
        "aetcd",
        "numba",
        "typer",
        "rich",
    }
    assert name not in clashes, f"{module} is named like a package"


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_ships_its_types(package: str) -> None:
    assert (ROOT / package / "py.typed").exists()
