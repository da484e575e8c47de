"""Generate the Python stubs of proto/ into shoal/, or (--check) fail when the committed stubs are stale."""

from __future__ import annotations

import sys
import tempfile
from importlib import resources
from pathlib import Path

from google.api import annotations_pb2
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTO = ROOT / "proto"


def include_paths() -> list[str]:
    """Return the options of protoc that name folders of .proto files, in the order of the search."""
    well_known = Path(str(resources.files("grpc_tools"))) / "_proto"
    # The folder with google/api/annotations.proto.
    google_api = Path(annotations_pb2.__file__).parents[2]
    return [f"-I{folder}" for folder in (PROTO, well_known, google_api)]


def generate(out: Path) -> None:
    """Write every stub below `out`, in folders that mirror proto/."""
    protos = sorted(str(path) for path in PROTO.rglob("*.proto"))
    outs = [f"--{kind}_out={out}" for kind in ("python", "pyi", "grpc_python")]
    if protoc.main(["protoc", *include_paths(), *outs, *protos]) != 0:
        sys.exit("protoc failed: its messages are above")
    for stub in (out / "shoal").rglob("*_pb2_grpc.py"):
        # A file of messages only has an empty service module.
        if "class " not in stub.read_text():
            stub.unlink()


def stale(fresh: Path) -> list[str]:
    """Return the committed stubs under shoal/ that differ from `fresh`, are missing, or have no .proto file."""
    new = {path.relative_to(fresh): path.read_bytes() for path in (fresh / "shoal").rglob("*_pb2*")}
    old = {
        path.relative_to(ROOT): path.read_bytes()
        for path in (ROOT / "shoal").rglob("*_pb2*.py*")
        if path.suffix != ".pyc"
    }
    return sorted(str(path) for path in new.keys() | old.keys() if new.get(path) != old.get(path))


def main() -> None:
    if "--check" not in sys.argv[1:]:
        generate(ROOT)
        return
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        if names := stale(Path(folder)):
            sys.exit("stale generated code: run `make proto`:\n  " + "\n  ".join(names))
    print("generated code is up to date")


if __name__ == "__main__":
    main()
