"""Generated files are fresh: stubs, docs/openapi.json, dashboards. Every field of our own contracts is documented."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from tools import dashboards

ROOT = Path(__file__).resolve().parent.parent
PROTOS = sorted((ROOT / "proto").rglob("*.proto"))


def test_the_stubs_are_fresh() -> None:
    done = subprocess.run([sys.executable, "tools/gen_proto.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_openapi_document_is_fresh_and_whole() -> None:
    done = subprocess.run([sys.executable, "-m", "tools.openapi", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = (ROOT / "docs" / "openapi.json").read_text()
    document = json.loads(text)
    named = set(re.findall(r'"#/components/schemas/([^"]+)"', text))
    assert named == set(document["components"]["schemas"])
    assert document["paths"]["/shoal/v1/jobs"]["post"]["operationId"] == "Submit"
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert operation["description"]
            in_path = [each["name"] for each in operation["parameters"] if each["in"] == "path"]
            assert in_path == re.findall(r"{(\w+)}", path)


def test_the_files_of_the_dashboards_are_fresh() -> None:
    done = subprocess.run([sys.executable, "tools/dashboards.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {path.stem for path in dashboards.FOLDER.glob("*.json")} == dashboards.DASHBOARDS.keys()


@pytest.mark.parametrize("proto", PROTOS, ids=lambda path: path.name)
def test_every_call_is_documented(proto: Path) -> None:
    lines = proto.read_text().splitlines()
    bare = [
        line.strip()
        for before, line in pairwise(lines)
        if line.strip().startswith("rpc ") and not before.strip().startswith(("//", "rpc "))
    ]
    assert not bare
