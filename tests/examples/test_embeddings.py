"""Embeddings of the documentation: those of sentence-transformers, and a check that tells when they are not."""

from __future__ import annotations

import re

import numpy as np
import onnx
import pytest

from examples.embeddings import demo
from examples.embeddings.bert import Shape
from examples.embeddings.build import build
from tests.examples.conftest import Run


@pytest.mark.node
@pytest.mark.timeout(200)
def test_every_vector_agrees_with_the_original(run: Run) -> None:
    done = run("examples.embeddings.demo")
    assert done.returncode == 0, done.stdout + done.stderr
    count = len(demo.paragraphs(60)) + len(demo.ODD)
    assert count > 60
    assert f"{count} of {count} vectors agree with sentence-transformers" in done.stdout
    assert len(re.findall(r"^  0\.\d\d  ", done.stdout, re.MULTILINE)) == 3, "the answers to the question"


@pytest.mark.parametrize("broken", [np.nan, 0.1])
def test_the_check_fails_when_a_vector_differs(capsys: pytest.CaptureFixture[str], broken: float) -> None:
    vectors = np.eye(3, 8, dtype=np.float32)
    assert demo.compare(["a", "b", "c"], vectors, vectors) == 0
    other = vectors.copy()
    other[1, 0] = broken
    assert demo.compare(["a", "b", "c"], other, vectors) == 1
    assert "'b'" in capsys.readouterr().out


def test_the_texts_are_real_and_odd() -> None:
    lengths = [len(text.split()) for text in demo.paragraphs(60)]
    assert min(lengths) < 20 < 60 < max(lengths)
    assert "" in demo.ODD
    assert any(len(text.split()) > 256 for text in demo.ODD)


def test_the_repository_has_a_checked_graph(tmp_path) -> None:
    models = build(tmp_path / "models")
    graph = onnx.load(models / "embed_minilm/1/model.onnx")
    onnx.checker.check_model(graph, full_check=True)
    assert all((model / "config.pbtxt").is_file() and (model / "1").is_dir() for model in models.iterdir())


def test_another_encoder_is_refused(tmp_path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "roberta", "hidden_act": "gelu"}')
    with pytest.raises(ValueError, match="expected a BERT with gelu, got roberta"):
        Shape.read(tmp_path / "config.json")
