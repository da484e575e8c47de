"""config.pbtxt and repositories as nobody should write them: refused with a reason, at no cost to their neighbours."""

from __future__ import annotations

import math
import os
import random
import sys
from pathlib import Path

import pytest
from google.protobuf import text_format
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import given, settings
from hypothesis import strategies as st

from services.infer.loading import model_config
from services.infer.models import override
from services.infer.requests.signature import TensorSpec
from services.infer.runtimes import onnx_settings
from services.infer.runtimes.onnx_devices import resolve_devices
from services.infer.runtimes.onnx_runtime import OnnxRuntime
from services.infer.scheduling import rules
from services.infer.sources.repository import look, scan
from shoal.errors import FailedPrecondition, InvalidArgument
from shoal.inference.v2 import inference_pb2 as pb
from shoal.inference.v2 import model_config_pb2
from shoal.oip.datatypes import BY_NAME
from tests.breakable import until
from tests.infer import onnx_files
from tests.infer.conftest import Repository, floats, output, request
from tests.long_form import by_form

RUNTIME = OnnxRuntime()
X, Y = TensorSpec("x", BY_NAME["FP32"], (-1, 4)), TensorSpec("y", BY_NAME["FP32"], (-1, -1))

GOOD = """
name: "m" backend: "onnxruntime" max_batch_size: 8
input [{ name: "x" data_type: TYPE_FP32 dims: [4] reshape { shape: [4] } }]
output [{ name: "y" data_type: TYPE_FP32 dims: [-1] label_filename: "l.txt" }]
dynamic_batching { preferred_batch_size: [4] max_queue_delay_microseconds: 100
  default_queue_policy { max_queue_size: 3 default_timeout_microseconds: 1000 } priority_levels: 2
  default_priority_level: 1 priority_queue_policy { key: 1 value { timeout_action: DELAY } } }
instance_group [{ count: 2 kind: KIND_CPU }]
version_policy { specific { versions: [1, 2] } }
optimization { graph { level: 1 } execution_accelerators { cpu_execution_accelerator [{ name: "openvino" }] } }
parameters { key: "intra_op_thread_count" value { string_value: "2" } }
parameters { key: "slo_ms" value { string_value: "20" } }
model_warmup [{ name: "w" batch_size: 1 inputs { key: "x" value { data_type: TYPE_FP32 dims: 4 zero_data: true } } }]
response_cache { enable: true }
"""

PIECES = st.sampled_from(
    [
        *GOOD.split(),
        "{",
        "}",
        "[",
        "]",
        ":",
        "-1",
        "0",
        "1e400",
        "99999999999999999999",
        '"',
        "'",
        "\0",
        "é",
        "#",
        "\\x",
    ]
)


def all_the_way(config: model_config_pb2.ModelConfig, *, batch_is_given: bool) -> None:
    """What loading does with a configuration; it may only be refused."""
    numbers = model_config.served_versions(config, {1, 2, 3}, 2)
    assert set(numbers) <= {1, 2, 3}
    try:
        model_config.check(config, RUNTIME)
        options = onnx_settings.session_options(config, 2)
        assert resolve_devices(options, ["CUDAExecutionProvider", "CPUExecutionProvider"], lambda: 2)
        done = model_config.complete(
            config, [X], [Y], runtime=RUNTIME, text=True, batch_is_given=batch_is_given, labels={}
        )
    except FailedPrecondition:
        return
    assert model_config.instances(done.config) >= 1
    assert rules.of(done.config).levels
    assert done.config.max_batch_size == done.signature.max_batch_size >= 0


@settings(max_examples=by_form(100, 300))
@given(st.lists(PIECES, max_size=30).map(" ".join) | st.text(max_size=200))
def test_any_text(text):
    try:
        config = model_config.parse(text)
    except FailedPrecondition:
        return
    all_the_way(config, batch_is_given=model_config.says_max_batch_size(text))


@settings(max_examples=by_form(100, 300))
@given(st.data())
def test_a_good_text_with_something_else_in_it(data):
    words = GOOD.split()
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(words) - 1))
        words[at : at + data.draw(st.integers(0, 3))] = data.draw(st.lists(PIECES, max_size=2))
        if not words:
            break
    try:
        config = model_config.parse(" ".join(words))
    except FailedPrecondition:
        return
    all_the_way(config, batch_is_given=True)


def message(kind: type[Message], chance: random.Random, depth: int = 0) -> Message:
    """Any message of this kind, with values that like to be wrong."""
    made = kind()
    fields = [field for field in kind.DESCRIPTOR.fields if depth < 4 or field.message_type is None]
    for field in chance.sample(fields, min(len(fields), chance.randint(0, 5))):
        for _ in range(chance.randint(1, 3) if field.is_repeated else 1):
            put(made, field, chance, depth)
    return made


def put(made: Message, field: FieldDescriptor, chance: random.Random, depth: int) -> None:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        entry, target = field.message_type.fields_by_name, getattr(made, field.name)
        key = value(entry["key"], chance)
        if entry["value"].message_type is not None:
            target[key].CopyFrom(message(entry["value"].message_type._concrete_class, chance, depth + 1))
        else:
            target[key] = value(entry["value"], chance)
    elif field.message_type is not None:
        part = message(field.message_type._concrete_class, chance, depth + 1)
        (getattr(made, field.name).add() if field.is_repeated else getattr(made, field.name)).CopyFrom(part)
    elif field.is_repeated:
        getattr(made, field.name).append(value(field, chance))
    else:
        setattr(made, field.name, value(field, chance))


WORDS = ("", "x", "y", "m", "../x", "1", "-1", "true", "onnxruntime", "tensorrt", "é", "\n", "intra_op_thread_count")


def value(field: FieldDescriptor, chance: random.Random) -> object:
    if field.enum_type is not None:
        return chance.choice([*(each.number for each in field.enum_type.values), 99])
    if field.type == FieldDescriptor.TYPE_STRING:
        return chance.choice(WORDS)
    if field.type == FieldDescriptor.TYPE_BOOL:
        return chance.random() < 0.5
    if field.type in (FieldDescriptor.TYPE_FLOAT, FieldDescriptor.TYPE_DOUBLE):
        return chance.choice([0.0, -1.0, math.inf, math.nan])
    bits = 31 if field.type in (FieldDescriptor.TYPE_INT32, FieldDescriptor.TYPE_UINT32) else 63
    is_unsigned = field.type in (FieldDescriptor.TYPE_UINT32, FieldDescriptor.TYPE_UINT64)
    negative = [] if is_unsigned else [-1, -2, -(1 << bits)]
    return chance.choice([0, 1, 2, 3, 4, 8, (1 << bits) - 1, *negative])


@settings(max_examples=by_form(200, 1000))
@given(st.integers(0, 1 << 32), st.booleans())
def test_any_message(seed, batch_is_given):
    config = message(model_config_pb2.ModelConfig, random.Random(seed))
    all_the_way(config, batch_is_given=batch_is_given)
    assert model_config.parse(text_format.MessageToString(config)).name == config.name


@settings(max_examples=by_form(60, 200))
@given(
    st.dictionaries(
        st.sampled_from(["config", "file:", "file:1/model.onnx", "file:../x", "file:/x", "other"])
        | st.text(max_size=12),
        st.sampled_from(["{}", "[", "null", '{"a":1}', '{"max_batch_size": "x"}']) | st.text(max_size=30) | st.binary(),
        max_size=4,
    )
)
def test_any_override(parameters):
    asked = pb.RepositoryModelLoadRequest()
    for key, content in parameters.items():
        if isinstance(content, bytes):
            asked.parameters[key].bytes_param = content
        else:
            asked.parameters[key].string_param = content
    try:
        given_ = override.read(asked.parameters)
    except (FailedPrecondition, InvalidArgument):
        return
    for path in given_.files if given_ else ():
        assert not path.is_absolute()
        assert ".." not in path.parts


def hostile(root: Path) -> None:
    """Everything that a folder can hold instead of a model."""
    outside = root.parent / "outside"
    outside.mkdir()
    (outside / "secret.txt").write_text("nobody may read this")
    for name in ("pipe", "device", "huge", "loop", "filed", "deep", "labels", "warm", "many"):
        (root / name).mkdir()
    os.mkfifo(root / "pipe" / "config.pbtxt")
    (root / "pipe" / "1").mkdir()
    (root / "device" / "1").mkdir()
    (root / "device" / "1" / "model.onnx").symlink_to("/dev/zero")
    (root / "device" / "config.pbtxt").symlink_to("/dev/zero")
    (root / "huge" / "1").mkdir()
    with (root / "huge" / "1" / "model.onnx").open("wb") as file:
        file.truncate(1 << 36)
    with (root / "huge" / "config.pbtxt").open("wb") as file:
        file.truncate(1 << 36)
    (root / "loop" / "1").symlink_to(root / "loop")
    (root / "filed" / "1").write_text("a version that is a file")
    (root / "nowhere").symlink_to(root / "missing")
    (root / "circle").symlink_to(root / "circle")
    (root / "nowhere.onnx").symlink_to(outside / "missing.onnx")
    (root / "text.onnx").symlink_to(outside / "secret.txt")
    (root / "deep" / "1" / "/".join("d" * 200)).mkdir(parents=True)
    (root / "labels" / "1").mkdir()
    (root / "labels" / "1" / "model.onnx").write_bytes(onnx_files.scale().SerializeToString())
    (root / "labels" / "config.pbtxt").write_text(
        'max_batch_size: 4 output { name: "y" data_type: TYPE_FP32 dims: 4 label_filename: "../../outside/secret.txt" }'
    )
    (root / "warm" / "1").mkdir()
    (root / "warm" / "1" / "model.onnx").write_bytes(onnx_files.scale().SerializeToString())
    (root / "warm" / "warmup").mkdir()
    os.mkfifo(root / "warm" / "warmup" / "x")
    (root / "warm" / "config.pbtxt").write_text(
        "max_batch_size: 4 model_warmup { inputs { "
        'key: "x" value { data_type: TYPE_FP32 dims: 4 input_data_file: "x" } } }'
    )
    for n in range(300):
        (root / "many" / str(n + 1)).mkdir()


async def test_a_hostile_repository_harms_nobody(serve, models_folder: Repository):
    root = models_folder.root
    models_folder.put("good", onnx_files.scale())
    hostile(root)
    odd = ["a b", "ä", "emoji😀", "quote'\"", "new\nline", "%2e%2e", "x" * 200, "-rf", "$(id)", "\\", "\x1b[31m"]
    for name in odd:
        (root / name).mkdir()
        (root / name / "1").mkdir()
        (root / name / "1" / "model.onnx").write_bytes(onnx_files.scale().SerializeToString())
    if sys.platform == "linux":
        os.mkdir(os.fsencode(root) + b"/\xff\xfe")
    served = await serve(root)
    response = await served.stub.ModelInfer(request("good", x=floats([1, 2, 3, 4])))
    assert output(response, "y").tolist() == [[2, 4, 6, 8]]
    for name in odd:
        response = await served.stub.ModelInfer(request(name, x=floats([1, 2, 3, 4])))
        assert output(response, "y").tolist() == [[2, 4, 6, 8]]
    index = (await served.stub.RepositoryIndex(pb.RepositoryIndexRequest())).models
    reasons = {m.name: m.reason for m in index if m.state != "READY"}
    said = {
        "pipe": "cannot read config.pbtxt: it is no plain file",
        "device": "cannot read config.pbtxt: it is no plain file",
        "huge": "cannot read config.pbtxt: it has more than",
        "loop": "has no file model.onnx",
        "filed": "its folder has no version",
        "nowhere": "a symbolic link that leads nowhere",
        "circle": "a symbolic link that leads nowhere",
        "text": "ONNX Runtime cannot load text.onnx",
        "deep": "has no file model.onnx",
        "labels": "expected a file beside the config",
        "warm": "cannot read x: it is no plain file",
        "many": "version folder 300 has no file model.onnx",
        "\\xff\\xfe": "its name is not UTF-8",
    }
    for name, text in said.items():
        assert text in reasons[name], name
    assert "nobody may read" not in str(reasons.values())
    for name in said:
        with pytest.raises(Exception, match="load"):
            await served.stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name=name))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read(models_folder: Repository):
    folder = models_folder.put("m", onnx_files.scale())
    folder.chmod(0)
    try:
        (model,) = scan(models_folder.root)
        assert "cannot read its folder" in model.problem
    finally:
        folder.chmod(0o700)


def test_a_folder_that_breaks_while_it_is_read(models_folder: Repository, monkeypatch):
    models_folder.put("m", onnx_files.scale())
    models_folder.put("n", onnx_files.scale())
    real = os.listdir

    def listdir(path):
        if str(path).endswith("/m"):
            raise OSError(5, "Input/output error")
        return real(path)

    monkeypatch.setattr("os.listdir", listdir)
    m, n = scan(models_folder.root)
    assert (m.problem, n.problem) == ("cannot read its folder: Input/output error", "")
    assert look(models_folder.root, "m") == m


async def test_ten_thousand_folders(serve, models_folder: Repository):
    models_folder.put("good", onnx_files.scale())
    for n in range(10_000):
        (models_folder.root / f"m{n}").mkdir()
    served = await serve(models_folder.root)
    response = await served.stub.ModelInfer(request("good", x=floats([1, 2, 3, 4])))
    assert output(response, "y").tolist() == [[2, 4, 6, 8]]
    index = (await served.stub.RepositoryIndex(pb.RepositoryIndexRequest())).models
    assert len(index) == 10_001
    await served.stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="good"))
    await until(lambda: served.models.names() == ["good"])
