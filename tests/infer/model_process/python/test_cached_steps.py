"""A step with a response cache: what its model sees of requests decides, not that its results are kept."""

from __future__ import annotations

import pytest

from tests.infer import onnx_files
from tests.infer.conftest import floats, output, request
from tests.infer.ensembles.conftest import step, written
from tests.infer.model_process.python.test_optional_inputs import CONFIG, MODEL

KEPT = "response_cache { enable: true }\n"


def ensemble(repo, name: str, model: str) -> None:
    (repo.root / name / "1").mkdir(parents=True)
    (repo.root / name / "config.pbtxt").write_text(written(step(model, {"x": "x"}, {"y": "y"})))


@pytest.mark.parametrize("more", ["", KEPT])
async def test_a_step_that_wants_requests_gets_the_whole_request(repo, serve, more):
    repo.python("wants", MODEL, CONFIG + more)
    repo.put("computes", onnx_files.scale(), config=more)
    ensemble(repo, "of_wants", "wants")
    ensemble(repo, "of_computes", "computes")
    serving = await serve()
    found = {name: serving.models.find(name, "").needs_tensors_only for name in ("of_wants", "of_computes")}
    assert found == {"of_wants": False, "of_computes": True}
    x = floats([1, 2, 3, 4])
    for _ in range(2):
        assert output(await serving.stub.ModelInfer(request("of_wants", x=x)), "y").tolist() == (x + 100).tolist()
        assert output(await serving.stub.ModelInfer(request("of_computes", x=x)), "y").tolist() == (2 * x).tolist()
