"""Operations in a model repository: clients send bytes. Calls of any sizes share executions, alone and in ensembles."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import grpc
import magika
import numpy as np
import pytest
from onnx import TensorProto, helper

from shoal.inference.v2 import inference_pb2 as pb
from tests.infer import onnx_files
from tests.infer.conftest import output, request
from tests.infer.operators.images import array, encoded, pixels

DECODE = 'backend: "kernels" parameters { key: "operation" value { string_value: "decode_image" } }'
TOGETHER = (
    " max_batch_size: 64 dynamic_batching { max_queue_delay_microseconds: 60000000 preferred_batch_size: [ %d ] }"
)


def operation(name: str, /, **parameters: str) -> str:
    """A configuration."""
    given = {"operation": name, **parameters}
    said = (f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}' for key, value in given.items())
    return "\n".join(['backend: "kernels"', *said])


@pytest.fixture
def put(models_folder):
    """`put(name, config, files)`: a model without a model file."""

    def put(name: str, config: str, **files: str | bytes) -> None:
        folder = models_folder.root / name
        (folder / "1").mkdir(parents=True)
        (folder / "config.pbtxt").write_text(config)
        for file, content in files.items():
            path = folder / "1" / file.replace("__", ".")
            path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return put


async def executions(serving, model: str) -> tuple[int, int]:
    """How many executions there were, and of how many rows."""
    (row,) = (await serving.stub.ModelStatistics(pb.ModelStatisticsRequest(name=model))).model_stats
    return row.execution_count, row.inference_count


async def test_clients_send_bytes(serve, models_folder, put):
    put("decode", DECODE)
    serving = await serve(models_folder.root)
    response = await serving.stub.ModelInfer(request("decode", image=array(encoded(pixels(20, 30), "png"))))
    np.testing.assert_array_equal(output(response, "image")[0], pixels(20, 30))
    described = await serving.stub.ModelMetadata(pb.ModelMetadataRequest(name="decode"))
    assert [(t.name, t.datatype, list(t.shape)) for t in described.inputs] == [("image", "BYTES", [-1, 1])]
    assert [(t.name, list(t.shape)) for t in described.outputs] == [("image", [-1, -1, -1, 3]), ("size", [-1, 2])]
    config = (await serving.stub.ModelConfig(pb.ModelConfigRequest(name="decode"))).config
    assert (config.max_batch_size, config.platform, config.backend) == (16, "kernels", "kernels")


async def test_images_of_different_sizes_share_one_execution(serve, models_folder, put):
    count = 24
    together = TOGETHER % count
    put("decode", DECODE + together)
    put("resize", operation("resize_norm", size="16", datatype="UINT8", antialias="false") + together)
    serving = await serve(models_folder.root)
    images = [pixels(5 + n, 60 - n, n) for n in range(count)]
    asked = [request("decode", image=array(encoded(image, "png"))) for image in images]
    # Before outputs of varying size are measured, a request runs alone.
    await serving.stub.ModelInfer(asked[0])
    responses = await asyncio.gather(*(serving.stub.ModelInfer(each) for each in asked))
    for image, response in zip(images, responses, strict=True):
        np.testing.assert_array_equal(output(response, "image")[0], image)
    assert await executions(serving, "decode") == (2, count + 1)
    asked = [request("resize", image=image[np.newaxis]) for image in images]
    responses = await asyncio.gather(*(serving.stub.ModelInfer(each) for each in asked))
    assert await executions(serving, "resize") == (1, count)
    assert all(output(response, "image").shape == (1, 3, 16, 16) for response in responses)


async def test_a_very_long_row_of_tokens_pads_only_its_own_request(serve, models_folder, put):
    put("pad", operation("pad_tokens") + TOGETHER % 8)
    serving = await serve(models_folder.root)
    lengths = [3, 5, 50_000, 9, 8, 1, 2, 10_000]
    asked = [request("pad", input_ids=np.ones((1, length), np.int64)) for length in lengths]
    await serving.stub.ModelInfer(asked[0])
    responses = await asyncio.gather(*(serving.stub.ModelInfer(each) for each in asked))
    assert await executions(serving, "pad") == (2, 9)
    for length, response in zip(lengths, responses, strict=True):
        for name in ("input_ids", "attention_mask", "token_type_ids"):
            padded = output(response, name)
            assert padded.shape == (1, -(-length // 8) * 8)
            assert padded.sum() == (0 if name == "token_type_ids" else length)


async def test_a_bad_image_fails_alone_in_its_batch(serve, models_folder, put):
    put("decode", DECODE + TOGETHER % 3)
    serving = await serve(models_folder.root)
    good = encoded(pixels(9, 9), "png")
    asked = [request("decode", image=array(data)) for data in (good, good[:-20], good)]
    await serving.stub.ModelInfer(asked[0])
    outcomes = await asyncio.gather(*(serving.stub.ModelInfer(each) for each in asked), return_exceptions=True)
    assert await executions(serving, "decode") == (2, 4)
    assert outcomes[1].code() is grpc.StatusCode.INVALID_ARGUMENT
    assert outcomes[1].details() == (
        "model 'decode': input 'image': this PNG cannot be decoded: it is truncated or damaged"
    )
    for response in (outcomes[0], outcomes[2]):
        np.testing.assert_array_equal(output(response, "image")[0], pixels(9, 9))


async def test_rows_of_one_request_must_be_even_to_be_a_tensor(serve, models_folder, put):
    put("decode", DECODE)
    serving = await serve(models_folder.root)
    even = array(encoded(pixels(9, 9), "png"), encoded(pixels(9, 9, 1), "png"))
    assert output(await serving.stub.ModelInfer(request("decode", image=even)), "image").shape == (2, 9, 9, 3)
    uneven = array(encoded(pixels(9, 9), "png"), encoded(pixels(9, 8), "png"))
    with pytest.raises(grpc.RpcError) as err:
        await serving.stub.ModelInfer(request("decode", image=uneven))
    assert err.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "its 2 rows have different shapes" in err.value.details()
    # What can be a tensor can be asked for by itself.
    asked = request("decode", image=uneven)
    asked.outputs.add(name="size")
    assert sizes_of(await serving.stub.ModelInfer(asked)) == [[9, 9], [9, 8]]


def sizes_of(response: pb.ModelInferResponse) -> list[list[int]]:
    sizes: list[list[int]] = np.frombuffer(response.raw_output_contents[0], "<i4").reshape(-1, 2).tolist()
    return sizes


async def test_images_without_pixels_are_not_taken_by_the_million(serve, models_folder, put):
    put("crop", operation("crop_boxes"))
    serving = await serve(models_folder.root)
    rows = 1 << 28
    image, boxes = np.empty((rows, 0, 1, 3), np.uint8), np.empty((rows, 0, 4, 2), np.float32)
    with pytest.raises(grpc.aio.AioRpcError) as err:
        await serving.stub.ModelInfer(request("crop", image=image, boxes=boxes))
    assert err.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "] is given row by row: expected at most 100000 rows" in err.value.details()


async def test_wrong_configurations_are_told_in_the_index(serve, models_folder, put):
    wrong = {
        "unknown_operation": (operation("resise"), "operation 'resise' is unknown"),
        "none": ('backend: "kernels"', "parameter 'operation' is missing"),
        "unknown_parameter": (operation("decode_image", colour="rgb"), "parameter 'colour' is unknown"),
        "unbatched": (operation("crop_boxes") + " max_batch_size: 4", "max_batch_size 4"),
        "gpu": (operation("decode_image") + " instance_group [ { kind: KIND_GPU } ]", "instance_group"),
        "other_input": (
            DECODE + ' max_batch_size: 4 input [ { name: "picture" data_type: TYPE_STRING dims: [ 1 ] } ]',
            "the configuration has input 'picture', the model has 'image'",
        ),
        "other_type": (
            DECODE + ' max_batch_size: 4 input [ { name: "image" data_type: TYPE_UINT8 dims: [ 1 ] } ]',
            "input 'image': the configuration says UINT8, the model BYTES",
        ),
        "ragged": (
            DECODE + ' input [ { name: "image" data_type: TYPE_STRING dims: [ 1 ] allow_ragged_batch: true } ]',
            "allow_ragged_batch is not supported",
        ),
        "promise": (
            operation("resize_norm", fit="multiple")
            + ' output [ { name: "image" data_type: TYPE_FP32 dims: [ 3, 640, 640 ] } ]',
            "output 'image': the configuration has [3,640,640], operation resize_norm has [3,-1,-1]",
        ),
        "file": (DECODE + ' default_model_filename: "model.onnx"', "default_model_filename without a model file"),
        "reshape": (
            DECODE + ' input [ { name: "image" data_type: TYPE_STRING dims: [ 1 ] reshape { shape: [ ] } } ]',
            "reshape is not supported of an operation",
        ),
        "accelerated": (DECODE + " optimization { graph { level: 1 } }", "optimization.graph.level is not supported"),
        "no_tokenizer": (operation("tokenize"), "none of the files 'tokenizer.json', 'vocab.txt'"),
        "bare_folder": ("", "has no file model.onnx"),
    }
    for name, (config, _) in wrong.items():
        put(name, config)
    serving = await serve(models_folder.root)
    reasons = {row.name: row.reason for row in (await serving.stub.RepositoryIndex(pb.RepositoryIndexRequest())).models}
    for name, (_, says) in wrong.items():
        assert says in reasons[name], name


async def test_a_configuration_may_say_what_the_operation_has_anyway(serve, models_folder, put):
    said = """
        max_batch_size: 5
        input [ { name: "image" data_type: TYPE_UINT8 dims: [ -1, -1, 3 ] allow_ragged_batch: true } ]
        output [ { name: "image" data_type: TYPE_FP32 dims: [ 3, 8, 8 ] } ]
        parameters { key: "slo_ms" value { string_value: "50" } }
        parameters { key: "intra_op_thread_count" value { string_value: "1" } }
        instance_group [ { count: 2 kind: KIND_CPU } ]
        response_cache { enable: true }
    """
    put("resize", operation("resize_norm", size="8") + said)
    serving = await serve(models_folder.root)
    asked = request("resize", image=pixels(20, 30)[np.newaxis])
    first, second = [await serving.stub.ModelInfer(asked) for _ in range(2)]
    assert [each.name for each in first.outputs] == ["image"]
    assert first == second
    assert await executions(serving, "resize") == (1, 1)
    too_many = request("resize", image=np.stack([pixels(2, 2)] * 6))
    with pytest.raises(grpc.RpcError, match="batch-size must be <= 5"):
        await serving.stub.ModelInfer(too_many)


async def test_what_is_kept_of_uneven_rows_is_kept(serve, models_folder, put):
    """The response cache holds rows as well; only their way to the wire is closed."""
    put("decode", DECODE + " response_cache { enable: true }")
    serving = await serve(models_folder.root)
    asked = request("decode", image=array(encoded(pixels(9, 9), "png"), encoded(pixels(9, 8), "png")))
    for _ in range(2):
        with pytest.raises(grpc.RpcError, match="different shapes"):
            await serving.stub.ModelInfer(asked)
    one = request("decode", image=array(encoded(pixels(3, 4), "png")))
    assert (await serving.stub.ModelInfer(one)) == (await serving.stub.ModelInfer(one))
    assert (await executions(serving, "decode"))[0] == 2


def ensemble(*steps: tuple[str, dict[str, str], dict[str, str]]) -> str:
    said = []
    for model, inputs, outputs in steps:
        maps = [
            *(f'input_map {{ key: "{key}" value: "{value}" }}' for key, value in inputs.items()),
            *(f'output_map {{ key: "{key}" value: "{value}" }}' for key, value in outputs.items()),
        ]
        said.append(f'{{ model_name: "{model}" model_version: -1 {" ".join(maps)} }}')
    return f'platform: "ensemble" ensemble_scheduling {{ step [ {", ".join(said)} ] }}'


async def test_from_the_bytes_of_an_image_to_the_name_of_its_class(serve, models_folder, put):
    means = onnx_files.model(
        [helper.make_node("ReduceMean", ["image"], ["y"], axes=[2, 3], keepdims=0)],
        [("image", TensorProto.FLOAT, ("n", 3, 8, 8))],
        [("y", TensorProto.FLOAT, ("n", 3))],
    )
    models_folder.put("means", means, config="max_batch_size: 16")
    put("decode", DECODE)
    put("resize", operation("resize_norm", size="8"))
    put("names", operation("softmax_topk", k="1", labels="labels.txt"), labels__txt="red\ngreen\nblue\n")
    steps = (
        ("decode", {"image": "bytes"}, {"image": "pixels"}),
        ("resize", {"image": "pixels"}, {"image": "small"}),
        ("means", {"image": "small"}, {"y": "logits"}),
        ("names", {"logits": "logits"}, {"labels": "label", "scores": "score"}),
    )
    put("colour", ensemble(*steps))
    serving = await serve(models_folder.root)
    colours = {"red": (200, 10, 10), "green": (10, 200, 10), "blue": (10, 10, 200)}
    # Images of one request, of different sizes: between the steps they are rows.
    files = [encoded(np.full((5 + n, 9, 3), colour, np.uint8), "jpg") for n, colour in enumerate(colours.values())]
    response = await serving.stub.ModelInfer(request("colour", bytes=array(*files)))
    assert [label.decode() for label in output(response, "label")[:, 0]] == list(colours)
    with pytest.raises(grpc.RpcError) as err:
        await serving.stub.ModelInfer(request("colour", bytes=array(b"no image")))
    assert err.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "expected jpeg, png, webp, bmp" in err.value.details()


async def test_crops_of_an_image_are_rows_of_the_next_steps(serve, models_folder, put):
    """One image, some boxes, as many crops, of different sizes: each is a call of the steps that follow."""
    put("decode", DECODE)
    put("crops", operation("crop_boxes", corners="false", turn_from="0"))
    put("resize", operation("resize_norm", size="8", datatype="UINT8"))
    each = 'max_batch_size: 0 parameters { key: "each.resize" value { string_value: "crops" } } '
    steps = (
        ("decode", {"image": "file"}, {"image": "image"}),
        ("crops", {"image": "image", "boxes": "boxes"}, {"crops": "crops", "row": "row"}),
        ("resize", {"image": "crops"}, {"image": "small", "transform": "transform"}),
    )
    put("pieces", each + ensemble(*steps))
    serving = await serve(models_folder.root)
    image = pixels(60, 80)
    boxes = np.array([[[0, 0, 30, 20], [5, 6, 17, 50], [40, 10, 41, 11]]], np.float32)
    asked = request("pieces", file=array(encoded(image, "png")), boxes=boxes)
    asked.outputs.add(name="small")
    small = output(await serving.stub.ModelInfer(asked), "small").reshape(3, 3, 8, 8)
    for (left, top, right, bottom), got in zip(boxes[0].astype(int), small, strict=True):
        alone = request("resize", image=np.ascontiguousarray(image[top:bottom, left:right])[np.newaxis])
        np.testing.assert_array_equal(got, output(await serving.stub.ModelInfer(alone), "image")[0])
    nothing = request("pieces", file=array(encoded(image, "png")), boxes=boxes[:, :0])
    nothing.outputs.add(name="small")
    assert output(await serving.stub.ModelInfer(nothing), "small").shape[0] == 0


MAGIKA = Path(magika.__file__).parent / "models/standard_v3_3"


async def test_magika_as_an_ensemble_gives_the_packages_own_results(serve, models_folder, put):

    space = json.loads((MAGIKA / "config.min.json").read_text())["target_labels_space"]
    models_folder.put("magika", (MAGIKA / "model.onnx").read_bytes())
    put("windows", operation("byte_windows"))
    put("names", operation("softmax_topk", k="1", activation="none", labels="labels.txt"), labels__txt="\n".join(space))
    put(
        "filetype",
        ensemble(
            ("windows", {"data": "file"}, {"bytes": "bytes"}),
            ("magika", {"bytes": "bytes"}, {"target_label": "scores"}),
            ("names", {"logits": "scores"}, {"labels": "label", "scores": "score"}),
        ),
    )
    serving = await serve(models_folder.root)
    files = [
        Path(__file__).read_bytes(),
        encoded(pixels(40, 40), "png"),
        encoded(pixels(40, 40), "jpg"),
        b'{"a": [1, 2, 3], "b": {"c": "some longer text here"}}',
        b"<!doctype html><html><body><p>Hello</p></body></html>",
        (MAGIKA / "model.onnx").read_bytes()[:100_000],
    ]
    own = magika.Magika()
    for file in files:
        response = await serving.stub.ModelInfer(request("filetype", file=array(file)))
        expected = own.identify_bytes(file)
        assert output(response, "label")[0, 0].decode() == str(expected.dl.label)
        assert output(response, "score")[0, 0] == pytest.approx(expected.score, abs=1e-5)
