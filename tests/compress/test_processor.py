"""The processor that a report names."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from shoal.cli import quantizing
from shoal.compress.compression import Rows, run
from shoal.compress.method import Method
from shoal.compress.processor import this_processor
from tests.compress import models


def test_the_model_and_the_instruction_sets_that_matter_are_named(tmp_path: Path) -> None:
    core = "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nflags\t\t: fpu avx2 avx512f avx512_vnni amx_int8\n\n"
    (tmp_path / "cpuinfo").write_text(core + core.replace("Some", "Other"))
    assert str(this_processor(tmp_path / "cpuinfo")) == "Some CPU @ 2 GHz, AVX2, AVX-512, AVX-512 VNNI, AMX"


def test_an_old_processor_has_no_instruction_sets_that_matter(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("model name : Old\nflags : fpu sse2\n")
    assert str(this_processor(tmp_path / "cpuinfo")) == "Old"


def test_a_system_that_says_nothing_still_has_a_name(tmp_path: Path) -> None:
    assert this_processor(tmp_path / "none").name


def test_a_pushed_version_is_labelled_with_the_processor(tmp_path: Path) -> None:
    source = models.perceptron(tmp_path / "m.onnx")
    rows = Rows([{"x": np.ones((4, 16), "f4")}], "rows.npz")
    made = run(Method.PRUNE, source, tmp_path / "out.onnx", rows, name="m", bounds=None, threads=1)
    assert made.processor == this_processor()
    assert quantizing._labels(made)["measured_on"] == str(this_processor())[:256]
