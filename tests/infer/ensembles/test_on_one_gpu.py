"""Steps on one GPU hand tensors on there; what anybody else wants comes to the host. On a simulated GPU."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from services.infer.operators.kernels_runtime import KernelsRuntime
from services.infer.runtimes.choice import Runtimes
from services.infer.runtimes.gpu_stream import GpuStreams
from services.infer.runtimes.onnx_runtime import OnnxRuntime
from services.infer.scheduling.queue import QueueLimits
from tests.infer import onnx_files
from tests.infer.conftest import floats, output, request, serving
from tests.infer.ensembles.conftest import EnsembleRepository, parameter, step
from tests.infer.runtimes.simulated_gpu import SimulatedGpuOnnx, SimulatedMemory, gpu_streams_of

ON_GPU = "instance_group { kind: KIND_GPU gpus: [0] }\n"
SHARED = ON_GPU + parameter("gpu_stream", "shared")
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (12, 9, 14, 3), dtype=np.uint8)


def operation(name: str, **parameters: str) -> str:
    said = {"operation": name, **parameters}
    return 'backend: "kernels"\n' + "".join(parameter(key, value) for key, value in said.items())


def net():
    """image [n, 3, 4, 4] -> logits [n, 5]."""
    weights = np.random.default_rng(1).standard_normal((48, 5)).astype(np.float32)
    return onnx_files.model(
        [helper.make_node("Flatten", ["image"], ["flat"]), helper.make_node("MatMul", ["flat", "w"], ["logits"])],
        [("image", TensorProto.FLOAT, ("n", 3, 4, 4))],
        [("logits", TensorProto.FLOAT, ("n", 5))],
        [numpy_helper.from_array(weights, "w")],
    )


PIXELS_TO_NET = step("pixels", {"image": "image"}, {"image": "small"})
NET = step("net", {"image": "small"}, {"logits": "logits"})
BEST = step("best", {"logits": "logits"}, {"scores": "scores", "indices": "indices"})
OUTPUTS = """
output [ { name: "scores" data_type: TYPE_FP32 dims: 2 }, { name: "indices" data_type: TYPE_INT64 dims: 2 } ]
"""
INPUT = 'input { name: "image" data_type: TYPE_UINT8 dims: [ -1, -1, 3 ] }\n'
ALL = "max_batch_size: 8\n" + INPUT + OUTPUTS
MIDDLE = ALL + 'output { name: "logits" data_type: TYPE_FP32 dims: 5 }\n'


def put(folder: EnsembleRepository, *, gpu: bool, net_more: str = "", best_more: str = "") -> None:
    on, shared = (ON_GPU, SHARED) if gpu else ("", "")
    for name, text in (
        ("pixels", operation("resize_norm", size="4,4", mean="0.5", std="0.25") + on),
        ("best", operation("softmax_topk", k="2") + (best_more or on)),
    ):
        (folder.root / name / "1").mkdir(parents=True, exist_ok=True)
        (folder.root / name / "config.pbtxt").write_text(text)
    folder.put("net", net(), config=(net_more or shared) + "max_batch_size: 8\n")


@pytest.fixture
def memory() -> SimulatedMemory:
    return SimulatedMemory()


@pytest.fixture
def runtimes(memory: SimulatedMemory) -> Runtimes:
    lanes = gpu_streams_of(memory)
    return Runtimes([SimulatedGpuOnnx(lanes), KernelsRuntime(lanes=lanes)])


def over(folder: EnsembleRepository, run_dir, runtimes: Runtimes):
    return serving(folder.root, run_dir / "infer.sock", QueueLimits(), runtimes)


async def responses(served, model: str, count: int = 12, names=("scores", "indices")) -> list[list[np.ndarray]]:
    calls = [served.stub.ModelInfer(request(model, image=PIXELS[n : n + 1])) for n in range(count)]
    return [[output(response, name) for name in names] for response in await asyncio.gather(*calls)]


async def on_the_cpu(tmp_path, run_dir, steps: tuple[str, ...], more: str, names=("scores", "indices")):
    folder = EnsembleRepository(tmp_path / "cpu")
    put(folder, gpu=False)
    folder.ensemble("all", *steps, more=more)
    runtimes = Runtimes([OnnxRuntime(), KernelsRuntime()])
    async with serving(folder.root, run_dir / "cpu.sock", QueueLimits(), runtimes) as served:
        return await responses(served, "all", names=names)


def check_same(got, expected) -> None:
    for ours, theirs in zip(got, expected, strict=True):
        for array, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(array, other, atol=1e-5)


@pytest.fixture
def models_folder(tmp_path) -> EnsembleRepository:
    return EnsembleRepository(tmp_path / "models")


async def test_tensors_stay_between_steps(models_folder, runtimes, memory, tmp_path, run_dir):
    put(models_folder, gpu=True, net_more=SHARED + "dynamic_batching { max_queue_delay_microseconds: 100000 }\n")
    models_folder.ensemble("all", PIXELS_TO_NET, NET, BEST, more=ALL)
    async with over(models_folder, run_dir, runtimes) as served:
        steps = served.models.find("all", "").loaded.plan.steps
        assert [[wanted.stays for wanted in each.outputs] for each in steps] == [[True], [True], [False, False]]
        memory.forget()
        await responses(served, "all", 1)
        # In: pixels and table of the images, and the slot of the model's, which has nothing in it. Out: the result.
        assert (memory.copies_in, memory.copies_out) == (2, 2)
        got = await responses(served, "all")
        deadline = asyncio.get_running_loop().time() + 60
        while not memory.joins:  # Rows of several requests are put together there.
            assert asyncio.get_running_loop().time() < deadline
            await responses(served, "all")
    check_same(got, await on_the_cpu(tmp_path, run_dir, (PIXELS_TO_NET, NET, BEST), ALL))


async def test_requested_outputs_are_copied_to_the_host(models_folder, runtimes, memory, tmp_path, run_dir):
    put(models_folder, gpu=True)
    models_folder.ensemble("all", PIXELS_TO_NET, NET, BEST, more=MIDDLE)
    names = ("scores", "indices", "logits")
    async with over(models_folder, run_dir, runtimes) as served:
        steps = served.models.find("all", "").loaded.plan.steps
        assert [[wanted.stays for wanted in each.outputs] for each in steps] == [[True], [False], [False, False]]
        got = await responses(served, "all", names=names)
    check_same(got, await on_the_cpu(tmp_path, run_dir, (PIXELS_TO_NET, NET, BEST), MIDDLE, names))


@pytest.mark.parametrize(
    ("case", "stays"),
    [
        ("condition", [[True], [False], [False, False]]),
        ("step on the host", [[True], [False], [False, False]]),
        ("own stream", [[False], [False], [False, False]]),
        ("kept results", [[False], [False], [False, False]]),
        ("row by row", [[True], [False], [False, False]]),
    ],
)
async def test_tensors_that_other_steps_read_are_copied_to_the_host(
    models_folder, runtimes, tmp_path, run_dir, case, stays
):
    more = ALL
    net_more = {"own stream": ON_GPU, "kept results": SHARED + "response_cache { enable: true }\n"}.get(case, "")
    best_more = "instance_group { kind: KIND_CPU }\n" if case == "step on the host" else ""
    put(models_folder, gpu=True, net_more=net_more, best_more=best_more)
    if case == "condition":
        more += parameter("when.best", "count(logits) > 0")
    if case == "row by row":
        more = ALL.replace("max_batch_size: 8", "max_batch_size: 0").replace("[ -1, -1, 3 ]", "[ -1, -1, -1, 3 ]")
        more = more.replace("dims: 2", "dims: [ -1, 2 ]") + parameter("each.best", "logits")
    models_folder.ensemble("all", PIXELS_TO_NET, NET, BEST, more=more)
    async with over(models_folder, run_dir, runtimes) as served:
        assert not [row for row in served.models.index() if row.reason]
        steps = served.models.find("all", "").loaded.plan.steps
        assert [[wanted.stays for wanted in each.outputs] for each in steps] == stays
        got = await responses(served, "all")
    check_same(got, await on_the_cpu(tmp_path, run_dir, (PIXELS_TO_NET, NET, BEST), more))


async def test_calls_from_outside_and_from_an_ensemble_at_once(models_folder, runtimes, tmp_path, run_dir):
    put(models_folder, gpu=True)
    models_folder.ensemble("all", PIXELS_TO_NET, NET, BEST, more=ALL)
    logits = [floats(list(RNG.standard_normal(5))) for _ in range(12)]
    async with over(models_folder, run_dir, runtimes) as served:
        direct = asyncio.gather(*(served.stub.ModelInfer(request("best", logits=each)) for each in logits))
        got = await responses(served, "all")
        for each, response in zip(logits, await direct, strict=True):
            assert output(response, "indices")[0].tolist() == np.argsort(-each[0])[:2].tolist()
    check_same(got, await on_the_cpu(tmp_path, run_dir, (PIXELS_TO_NET, NET, BEST), ALL))


async def test_no_rows_and_images_of_several_sizes(models_folder, runtimes, run_dir):
    put(models_folder, gpu=True)
    models_folder.ensemble("all", PIXELS_TO_NET, NET, BEST, more=ALL)
    sizes = [(9, 14), (3, 5), (40, 2), (1, 1)]
    images = [RNG.integers(0, 256, (1, *size, 3), dtype=np.uint8) for size in sizes]
    async with over(models_folder, run_dir, runtimes) as served:
        calls = [served.stub.ModelInfer(request("all", image=image)) for image in images]
        together = [output(response, "scores") for response in await asyncio.gather(*calls)]
        alone = [output(await served.stub.ModelInfer(request("all", image=image)), "scores") for image in images]
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.gpu
async def test_a_real_gpu_gives_the_results_of_the_cpu(models_folder, tmp_path, run_dir):
    put(models_folder, gpu=True)
    models_folder.ensemble("all", PIXELS_TO_NET, NET, BEST, more=ALL)
    lanes = GpuStreams()
    runtimes = Runtimes([OnnxRuntime(lanes), KernelsRuntime(lanes=lanes)])
    async with over(models_folder, run_dir, runtimes) as served:
        steps = served.models.find("all", "").loaded.plan.steps
        assert [[wanted.stays for wanted in each.outputs] for each in steps] == [[True], [True], [False, False]]
        got = [await responses(served, "all") for _ in range(20)]
    expected = await on_the_cpu(tmp_path, run_dir, (PIXELS_TO_NET, NET, BEST), ALL)
    for each in got:
        # A grey level of the resized pixels, times the weights.
        for ours, theirs in zip(each, expected, strict=True):
            np.testing.assert_allclose(ours[0], theirs[0], atol=0.05)
