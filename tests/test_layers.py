"""Imports point down only, between packages and inside each (`LAYERS`), and modules are named by what they are about.

shoal.cli -> shoal.client, shoal.convert, shoal.compress, shoal.discovery, shoal.node
shoal.node -> mesh, shoal's stubs and errors; names the services, and starts them as processes
shoal.compress -> shoal.convert -> shoal's errors; only when a model is converted or compressed
services  -> mesh, kernels, shoal's stubs, errors, tensor codec, own_packages and rates; never each other
mesh      -> shoal's stubs and errors; names no service, not even in a string
kernels   -> nothing of ours, no grpc, no asyncio
shoal.access -> shoal's errors; all others may ask it who may call what
shoal.client, shoal.discovery -> shoal's stubs, errors and tensor codec
shoal.client -> mesh.rpc.client, and nothing else of the mesh: a gRPC client that knows neither nodes nor services, with
                which ingest calls the others, too
"""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("shoal", "mesh", "services", "kernels")
LAYERS = {
    "services/infer": """
        __main__ app metrics rest rpc fast_path model_stream_infer core decoupled_responses models ensembles operators
        config policy_file sources
        loading response_cache sequences scheduling remote model_process runtimes requests model_files sans_io offload
        error_text
    """,
    "services/ingest": """
        __main__ app areas metrics fast_submit rest rpc operations dead_letters batches schedules mongo_jobs dispatch
        config retention connectors queries
        intake job_events tracing job_access tenants job_scan documents job_fields instance store_calls messages
        dependencies ulid job_store job tenant_queue limits group_commit polls
    """,
    "services/store": """
        __main__ app metrics rest rpc artifact_rpc config audit retention registry exports backups garbage usage results
        allowed_locations page_token artifacts transactions documents replica_set limits
    """,
    "services/coord": """
        __main__ app metrics rest rpc first_start policy_copy access_rpc share_rpc share_claims leader_channel
        share_messages shares messages sampling history policies keys enforcement instances spans health issuer_keys
        fetch duties configurations gateway_policy presence traffic inference statistics cluster drains config
    """,
    "mesh": """
        rest xds log_reads rpc http1 metrics h2 keyring cluster mongo_lease removal_guard mongo_clock change_tokens
        mongo tenant_locations process
    """,
    "shoal": """
        cli node compress convert __init__ client discovery own_packages oip store ingest coord inference remote access
        rates errors tenant_header _version
    """,
    "shoal/access": """
        audit gateway limits objectives cluster decision tokens policy patterns rpc_groups rest_paths caller_header
    """,
    "shoal/client": """
        __init__ blocking face aio access audit tenants store instances spans status history jobs models inference
        transport
    """,
    "kernels": """
        operations tabular staging stack_rows softmax_topk top_k resize_norm quantize_rows pool_normalize pad_tokens nms
        numba_launch memory
        cuda_source arrays backend
    """,
}
"""Folders and files of each package, top to bottom: an entry may import the entries after it, and none before it."""
STUBS = ("shoal.ingest", "shoal.store", "shoal.coord", "shoal.inference", "shoal.remote")


@cache
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


@cache
def nodes_of(module: str) -> list[ast.AST]:
    return [*ast.walk(ast.parse(source_of(module).read_text()))]


@cache
def imports_of(module: str) -> set[str]:
    """Every module that `module` imports, at the top or inside a function, as absolute names."""
    names: set[str] = set()
    for node in nodes_of(module):
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
    bottom = (
        *STUBS,
        "shoal.access",
        "shoal.errors",
        "shoal.rates",
        "shoal.tenant_header",
        "shoal.oip",
        "shoal.__version__",
        "shoal._version",
    )
    if within(module, "shoal.access"):
        return ("shoal.access", "shoal.errors")
    if within(module, "kernels"):
        return ("kernels",)
    if within(module, "mesh"):
        return ("mesh", *bottom)
    if within(module, "services"):
        own = ".".join(module.split(".")[:2])
        return (own, "mesh", "kernels", "shoal.own_packages", *bottom)
    if within(module, "shoal.cli"):
        return ("shoal", "mesh")
    if within(module, "shoal.node"):
        return ("shoal.node", "mesh", *bottom)
    if within(module, "shoal.convert"):
        return ("shoal.convert", "shoal.errors")
    if within(module, "shoal.compress"):
        return ("shoal.compress", "shoal.convert", "shoal.errors")
    if within(module, "shoal.client"):
        return ("shoal.client", "shoal.discovery", "mesh.rpc.client", *bottom)
    return ("shoal.client", "shoal.discovery", *bottom)


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_down(package: str) -> None:
    wrong = {
        f"{module} -> {name}"
        for module in modules()
        if within(module, package)
        for name in imports_of(module)
        if within(name, *PACKAGES) and not within(name, *allowed(module))
    }
    assert not wrong, sorted(wrong)


@pytest.mark.parametrize("package", LAYERS)
def test_folders_import_downward_only(package: str) -> None:
    order = LAYERS[package].split()
    root = package.replace("/", ".")
    there = {name.removeprefix(root + ".").split(".")[0] for name in modules() if within(name, root) and name != root}
    assert there <= {*order}, f"not in LAYERS: {sorted(there - {*order})}"
    upward = set()
    for module in (name for name in modules() if within(name, root)):
        own = module.removeprefix(root).lstrip(".").split(".")[0] or "__init__"
        if own not in order:
            continue
        for name in imports_of(module):
            other = name.removeprefix(root + ".").split(".")[0]
            if within(name, root) and name != root and other in order and order.index(other) < order.index(own):
                upward.add(f"{module} -> {name}")
    assert not upward, sorted(upward)


def test_no_modules_import_each_other_in_a_circle() -> None:
    # Imports for the type checker count, too: a reader follows them. Raises CycleError, which names one circle.
    known = {*modules()}
    TopologicalSorter({module: {of_module(name, known) for name in imports_of(module)} for module in known}).prepare()


def of_module(name: str, known: set[str]) -> str:
    """Return the module that an imported name is, or is in; empty for others' modules."""
    return name if name in known else parent if (parent := name.rpartition(".")[0]) in known else ""


SERVICES = ("ingest", "infer", "store", "coord")


def test_mesh_names_no_service() -> None:
    named = {
        f"{module} names {service}"
        for module in modules()
        if within(module, "mesh")
        for node in nodes_of(module)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        for service in SERVICES
        if node.value == service or f"services.{service}" in node.value
    }
    assert not named, sorted(named)


def test_kernels_know_no_transport() -> None:
    transports = {
        f"{module} -> {name}"
        for module in modules()
        if within(module, "kernels")
        for name in imports_of(module)
        if within(name, "grpc", "asyncio", "google", "pymongo")
    }
    assert not transports, sorted(transports)


def test_envoys_messages_are_imported_where_pydantic_is_kept_from_them() -> None:
    importing = {m for m in modules() for name in imports_of(m) if within(name, "envoy_data_plane")}
    assert importing == {"mesh.xds.messages"}
    code = "from mesh.xds.messages import Cluster; print(hasattr(Cluster, '__pydantic_fields__'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


FRAMEWORKS = ("torch", "sklearn", "skl2onnx", "xgboost", "lightgbm", "onnxmltools", "joblib", "skops", "onnx")


def test_the_command_line_imports_frameworks_only_to_convert_and_no_pydantic_to_call() -> None:
    # pydantic checks policies and configurations: a command that reads none of them starts sooner without it.
    code = "import sys, shoal.cli.models, shoal.client.transport.local_h2; print([*sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not set(ast.literal_eval(loaded)) & {*FRAMEWORKS, "pydantic"}


@pytest.mark.parametrize("service", ["coord", "store"])
def test_a_service_that_reads_no_tensors_imports_no_numpy(service: str) -> None:
    # A tenth of their imports, and 9 MiB.
    code = f"import sys, services.{service}.app; print('numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_no_module_is_named_by_pattern_or_like_a_package_that_we_import() -> None:
    patterns = {"utils", "util", "helpers", "helper", "common", "manager", "misc"}
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
    named = [module for module in modules() if module.rpartition(".")[2] in patterns | clashes]
    assert not named


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_ships_its_types(package: str) -> None:
    assert (ROOT / package / "py.typed").exists()
