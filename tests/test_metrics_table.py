"""docs/metrics.md names every family in the code, and nothing else."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys

from mesh.metrics.families import Family
from tests.test_layers import ROOT, imports_of, modules
from tools.metrics_table import TABLES


def declared() -> set[Family]:
    """Every family that a module of ours declares, in its table or not."""
    found: set[Family] = set()
    for name in modules():
        if "mesh.metrics.families.Family" in imports_of(name):
            values = vars(importlib.import_module(name)).values()
            found |= {value for value in values if isinstance(value, Family)}
    return found


def test_every_family_is_in_a_table_and_each_table_is_fresh() -> None:
    listed = [family for families in TABLES.values() for family in families]
    assert declared() == {*listed}
    assert len(listed) == len({family.prometheus for family in listed})
    done = subprocess.run(
        [sys.executable, "tools/metrics_table.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_every_name_on_the_page_is_a_family() -> None:
    text = (ROOT / "docs/metrics.md").read_text()
    named = set(re.findall(r"\b((?:shoal|nv|process)_[a-z_]+)\b", text))
    known = {
        name
        for families in TABLES.values()
        for family in families
        for name in (family.prometheus, family.prometheus + "_total")
    }
    assert named <= known


def test_every_help_is_a_sentence() -> None:
    assert not [family.name for family in declared() if not family.help.endswith(".")]
