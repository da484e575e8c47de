"""A model of scikit-learn into a real node, asked there, and made smaller with the requests that the node kept."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import shoal
from shoal.client import JobRequest
from tests.node.conftest import Node

pytestmark = [pytest.mark.node, pytest.mark.timeout(600)]

TRAIN = """
import sys, joblib, numpy
from sklearn import datasets, neural_network, pipeline, preprocessing
iris = datasets.load_iris()
net = neural_network.MLPClassifier((64,), max_iter=80, random_state=0)
model = pipeline.make_pipeline(preprocessing.StandardScaler(), net)
joblib.dump(model.fit(iris.data, iris.target_names[iris.target]), sys.argv[1] + "/flowers.joblib")
numpy.savez(sys.argv[1] + "/flowers.npz", x=iris.data, label=model.predict(iris.data).astype("S16"))
"""


@pytest.fixture(scope="module")
def original(repository_root: Path, running: Node, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs Python in the environment of the frameworks, beside the node."""
    python = repository_root / ".venv-originals/bin/python"
    if not python.exists():
        pytest.fail("the frameworks have an environment of their own: run `make test`")
    # Threads of the frameworks beside a whole node would only wait for each other.
    environ = {**running.environ, "PYTHONPATH": str(repository_root), "OMP_NUM_THREADS": "1"}

    def run(*args: object) -> subprocess.CompletedProcess[str]:
        command = [str(python), *map(str, args)]
        return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=300, check=False)

    return run


def test_from_a_pickle_to_int8(running: Node, original: Any, tmp_path: Path) -> None:
    assert original("-c", TRAIN, tmp_path).returncode == 0
    push = ["-m", "shoal.cli.main", "models", "push", tmp_path / "flowers.joblib", "--trust-pickle", "--json"]
    done = original(*push)
    assert done.returncode == 0, done.stderr
    (pushed,) = json.loads(done.stdout)
    assert (pushed["ready"], pushed["model"]["version"]) == (True, 1)
    labels = pushed["model"]["labels"]
    assert labels["source_format"] == "scikit-learn"
    assert labels["source"] == "flowers.joblib"
    assert "skl2onnx" in labels["converted_with"]
    assert float(labels["drift_max_relative"]) == pytest.approx(
        max(each["max_relative"] for each in pushed["conversion"]["tried"][-1]["drift"]["outputs"]), rel=0.01
    )
    again = json.loads(original(*push).stdout)
    assert [(each["existed"], each["model"]["version"]) for each in again] == [(True, 1)]

    with np.load(tmp_path / "flowers.npz") as data:
        rows, label = data["x"].astype(np.float32), data["label"]
    with shoal.Client(running.gateway) as client:
        answer = client.infer("flowers", {"x": rows[:64]})
        assert answer["label"].tolist() == label[:64].tolist()
        nothing = running.shoal("models", "quantize", "flowers", "--method", "static", check=False)
        assert nothing.returncode == 1
        assert "a node that kept requests of it" in nothing.stderr
        requests = [JobRequest("flowers", {"x": rows[n : n + 3]}, keep_request=True) for n in range(0, 150, 3)]
        for ack in client.jobs.submit_many(requests):
            client.jobs.result(ack.job_id)
        np.testing.assert_array_equal(client.jobs.inputs(ack.job_id)["x"].shape, (3, 4))

        # Newer ones that were not kept hide none that were.
        for ack in client.jobs.submit_many(JobRequest("flowers", {"x": rows[:1]}) for _ in range(60)):
            client.jobs.result(ack.job_id)
    few = running.shoal(
        *("models", "quantize", "flowers", "--method", "dynamic", "--recorded", "5", "--json"),
        *("--output", str(tmp_path / "few.onnx")),
    )
    assert json.loads(few.stdout)["rows"] == "5 requests that the node kept"

    smaller = running.shoal(
        "models", "quantize", "flowers", "--method", "static", "--max-flips", "10%", "--push", "--json"
    )
    said = json.loads(smaller.stdout)
    assert said["rows"] == "50 requests that the node kept"
    assert said["drift"]["rows"] + said["calibrated_on"] == 150
    (pushed,) = said["pushed"]
    assert (pushed["ready"], pushed["model"]["version"]) == (True, 2)
    assert pushed["model"]["labels"]["compressed_from"] == "flowers version 1"
    assert {each["path"] for each in pushed["model"]["files"]} == {
        "model.onnx",
        "../config.pbtxt",
        "../labels_probabilities.txt",
    }
    with shoal.Client(running.gateway) as client:
        answer = client.infer("flowers", {"x": rows[:64]})
        assert answer.model_version == "2"
        assert (answer["label"] == label[:64]).mean() > 0.9
