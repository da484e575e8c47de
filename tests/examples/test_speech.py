"""Streams of speech: the segments of silero-vad, a state for each stream, and a check that tells when they differ."""

from __future__ import annotations

import re
import wave
from pathlib import Path

import numpy as np
import onnx
import pytest

from examples import originals
from examples.speech import demo
from examples.speech.build import CHUNK, build, with_state
from examples.speech.demo import StreamResult, compare, read
from examples.speech.segments import Segment, segments
from tests.examples.conftest import Run

HERE = Path(__file__).parent


@pytest.mark.node
@pytest.mark.timeout(200)
def test_every_stream_agrees_with_the_original_and_they_batch(run: Run) -> None:
    done = run("examples.speech.demo")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{demo.STREAMS} of {demo.STREAMS} streams agree with silero-vad" in done.stdout
    lines = re.findall(r"^stream \d+, (\w+): (.*); prob.*batches of ([\d.]+)", done.stdout, re.MULTILINE)
    assert len(lines) == demo.STREAMS
    assert len({spoken for _, spoken, _ in lines}) == len({name for name, _, _ in lines}) == 3
    assert all(spoken.count(" s") >= 2 for _, spoken, _ in lines), "there is speech, with pauses"
    assert max(float(batch) for _, _, batch in lines) > 1, "streams share executions"


def test_segments_are_the_packages_own_for_any_probabilities() -> None:
    rng = np.random.default_rng(7)
    cases = []
    for _ in range(300):
        chunks = int(rng.integers(0, 120))
        smooth = np.convolve(rng.random(chunks + 8), np.ones(9) / 9, "valid") if chunks else np.empty(0)
        steep = 1 / (1 + np.exp(-(smooth - 0.5) * rng.choice([8, 40, 200])))
        samples = max(chunks * CHUNK - int(rng.integers(0, CHUNK)), 0)
        cases.append((steep.tolist(), samples))
    theirs = originals.ask(HERE / "silero_rule.py", cases)
    ours = [[[each.start, each.end] for each in segments(*case)] for case in cases]
    assert ours == theirs
    assert sum(len(found) > 1 for found in theirs) > 50
    assert any(found == [] for found in theirs)


def test_the_check_fails_when_a_stream_differs(capsys: pytest.CaptureFixture[str]) -> None:
    probabilities = [0.0] * 10 + [0.9] * 20 + [0.0] * 10
    samples = CHUNK * len(probabilities)
    original = {"segments": [[10 * CHUNK - 480, 30 * CHUNK + 480]], "probabilities": probabilities}
    assert segments(probabilities, samples) == [Segment(*original["segments"][0])]
    assert compare("s", StreamResult(probabilities, [1] * 40), samples, original)
    for other in ([*probabilities[:-1], 0.01], probabilities[:-1], [*probabilities[:-1], float("nan")]):
        assert not compare("s", StreamResult(other, [1] * len(other)), samples, original)
    assert not compare("s", StreamResult(probabilities, [1] * 40), samples, {**original, "segments": []})
    assert "DIFFERS" in capsys.readouterr().out


def test_the_repository_has_a_checked_graph(tmp_path) -> None:
    graph = onnx.load(build(tmp_path / "models") / "speech/1/model.onnx")
    onnx.checker.check_model(graph)
    assert [value.name for value in graph.graph.input] == ["audio", "state_in", "context_in"]
    with pytest.raises(ValueError, match="unknown version of silero-vad"):
        with_state(graph)


def test_a_recording_of_another_kind_is_refused(tmp_path) -> None:
    with wave.open(str(tmp_path / "x.wav"), "wb") as sound:
        sound.setparams((2, 2, 8000, 0, "NONE", "not compressed"))
    with pytest.raises(ValueError, match="got \\(2, 16, 8000\\)"):
        read(tmp_path / "x.wav")
