"""config.pbtxt: what is read, completed, refused by name."""

from __future__ import annotations

import time

import pytest

from services.infer.loading import model_config
from services.infer.requests.signature import TensorSpec
from services.infer.runtimes import onnx_settings
from services.infer.runtimes.onnx_runtime import OnnxRuntime
from shoal.errors import FailedPrecondition
from shoal.oip.datatypes import BY_NAME

RUNTIME = OnnxRuntime()
X = TensorSpec("x", BY_NAME["FP32"], (-1, 4))
Y = TensorSpec("y", BY_NAME["INT64"], (-1, -1))


def completed(text: str, inputs=(X,), outputs=(Y,)):
    config = model_config.parse(text)
    model_config.check(config, RUNTIME)
    return model_config.complete(
        config,
        inputs,
        outputs,
        runtime=RUNTIME,
        text=True,
        batch_is_given=model_config.says_max_batch_size(text),
        labels={},
    )


REFUSED = {
    'platform: "tensorrt_plan"': "platform 'tensorrt_plan' is not supported",
    'backend: "python"': "backend 'python' is not supported",
    "model_transaction_policy { decoupled: true }": "decoupled is not supported",
    "max_batch_size: -1": "max_batch_size -1: expected 0 to",
    "instance_group [{ count: 1000 }]": "instance_group count 1000",
    f"instance_group [{', '.join(['{ count: 64 }'] * 5)}]": "320 instances in all groups: expected 256 at most",
    "instance_group { count: 33 kind: KIND_GPU gpus: [0, 1, 2, 3, 4, 5, 6, 7] }": "264 instances in all groups",
    "max_batch_size: 4 dynamic_batching { preferred_batch_size: [8] }": "preferred_batch_size 8: expected 1 to",
    'default_model_filename: "../../etc/passwd"': "expected a name without folders",
    'input [{ name: "x" data_type: TYPE_FP32 dims: [0] }]': "dims [0]: expected 1 or more",
    'input [{ name: "x" dims: [4] }]': "'x': data_type is missing",
    'input [{ name: "x" data_type: TYPE_FP32 dims: [4] reshape { shape: [2, 3] } }]': "the same number of elements",
    'input [{ name: "x" data_type: TYPE_FP32 dims: [4] reshape { shape: [-1] } }]': "expected as many -1 in both",
    'input [{ name: "x" data_type: TYPE_FP32 dims: [4] reshape { shape: [0] } }]': "expected 1 or more",
    'max_batch_size: 8 input [{ name: "x" data_type: TYPE_FP32 dims: [4] optional: true }]': "the model needs it",
    'input [{ name: "x" data_type: TYPE_FP32 dims: [4] format: FORMAT_NHWC }]': "FORMAT_NHWC has three dims",
    'output [{ name: "y" }, { name: "y" }]': "output 'y' is given more than once",
    "no_such_field: 1": 'Message type "inference.ModelConfig" has no field named "no_such_field"',
    "max_batch_size: many": "1:17",
    'input [{ name: "x" data_type: 999999999999 dims: [4] }]': "config.pbtxt: Value out of range: 999999999999",
    # Against the model:
    'max_batch_size: 8 input [{ name: "z" data_type: TYPE_FP32 dims: [4] }]': "input 'z', the model has 'x'",
    'max_batch_size: 8 input [{ name: "x" data_type: TYPE_FP64 dims: [4] }]': "says FP64, the model FP32",
    'max_batch_size: 8 input [{ name: "x" data_type: TYPE_FP32 dims: [5] }]': "says [5] with a batch dimension",
    'input [{ name: "x" data_type: TYPE_FP32 dims: [4] }]': "says [4], the model [-1,4]",
    'max_batch_size: 8 output [{ name: "y" data_type: TYPE_INT64 dims: [] }]': "says [] with a batch",
}


@pytest.mark.parametrize("text", REFUSED)
def test_refused_by_name(text):
    with pytest.raises(FailedPrecondition) as err:
        completed(text)
    assert REFUSED[text] in err.value.message


def test_all_that_is_wrong_is_named_at_once():
    with pytest.raises(FailedPrecondition, match=r"backend 'x'.*batch_input.*max_batch_size -2"):
        completed('backend: "x" batch_input {} max_batch_size: -2')


def test_nothing_given():
    done = completed("")
    assert (done.config.max_batch_size, done.is_batch_guessed) == (64, True)
    assert done.signature.max_batch_size == 64
    assert [list(i.dims) for i in done.config.input] == [[4]]
    assert [list(o.dims) for o in done.config.output] == [[-1]]
    assert (done.config.instance_group[0].count, done.config.version_policy.latest.num_versions) == (1, 1)
    alone = done.unbatched()
    assert (alone.config.max_batch_size, alone.signature.max_batch_size) == (0, 0)
    assert [list(i.dims) for i in alone.config.input] == [[-1, 4]]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("max_batch_size: 0", True),
        ("\n\n  max_batch_size :\n 4", True),
        ('name: "m" max_batch_size: 0', True),
        ("name: 'it is \\' said' max_batch_size: 0", True),
        ("# a comment's\nmax_batch_size: 0", True),
        ("", False),
        ("# max_batch_size: 4", False),
        ('name: "max_batch_size: 4"', False),
        ("name: 'a \" max_batch_size: 4'", False),
        ('name: "# \\" max_batch_size: 4"', False),
    ],
)
def test_max_batch_size_is_found_where_it_is_a_field(text, says):
    model_config.parse(text)
    assert model_config.says_max_batch_size(text) == says


@pytest.mark.parametrize("text", ["\n", "a \n", "a:1 ", '"', '"\\"', "max_batch_size ", "#\n", "''"])
def test_the_search_for_max_batch_size_looks_once_at_each_part_of_a_text(text):
    # A search from each line, or from each quote, to the end takes minutes for a quarter of this text.
    most = 1 << 20
    began = time.thread_time()
    assert not model_config.says_max_batch_size(text * (most // len(text)))
    assert time.thread_time() - began < 5


def test_a_batch_that_is_given_is_not_guessed():
    done = completed("max_batch_size: 4")
    assert (done.config.max_batch_size, done.is_batch_guessed) == (4, False)
    for text in ("max_batch_size: 0", "# none\nmax_batch_size  : 0", "dynamic_batching {} max_batch_size:0"):
        assert completed(text).config.max_batch_size == 0
    assert completed("# max_batch_size: 0\n").config.max_batch_size == 64


def test_a_fixed_or_missing_first_dimension_is_no_batch():
    fixed = TensorSpec("x", BY_NAME["FP32"], (1, 4))
    assert completed("", inputs=(fixed,)).config.max_batch_size == 0
    assert completed("", outputs=(TensorSpec("y", BY_NAME["FP32"], ()),)).config.max_batch_size == 0
    with pytest.raises(FailedPrecondition, match="its first dimension is not free"):
        completed("max_batch_size: 8", inputs=(fixed,))


def test_dims_may_be_narrower_than_the_models():
    done = completed('max_batch_size: 8 output [{ name: "y" data_type: TYPE_INT64 dims: [7] }]')
    assert done.signature.outputs[0].shape == (-1, 7)


@pytest.mark.parametrize(
    ("text", "stable", "expected"),
    [
        ("", None, (4,)),
        ("version_policy { latest { num_versions: 2 } }", None, (3, 4)),
        ("version_policy { all {} }", None, (1, 3, 4)),
        ("version_policy { specific { versions: [1, 2] } }", None, (1,)),
        ("", 1, (1, 4)),
        ("", 2, (4,)),
        ("version_policy { specific { versions: [9] } }", None, ()),
    ],
)
def test_which_versions_are_served(text, stable, expected):
    assert model_config.served_versions(model_config.parse(text), {1, 3, 4}, stable) == expected


def test_session_options():
    text = """
    optimization { graph { level: -1 } }
    parameters { key: "intra_op_thread_count" value { string_value: "3" } }
    parameters { key: "session.set_denormal_as_zero" value { string_value: "1" } }
    parameters { key: "mine" value { string_value: "x" } }
    """
    options = onnx_settings.session_options(model_config.parse(text), 2)
    assert (options.intra_op_threads, options.inter_op_threads, options.graph_level) == (3, 1, -1)
    assert options.entries == {"session.set_denormal_as_zero": "1"}
    assert onnx_settings.session_options(model_config.parse(""), 2).intra_op_threads == 2


@pytest.mark.parametrize("threads", ["x", "-1", "100000", "1.5"])
def test_thread_counts_that_are_none(threads):
    text = f'parameters {{ key: "intra_op_thread_count" value {{ string_value: "{threads}" }} }}'
    with pytest.raises(FailedPrecondition, match="intra_op_thread_count"):
        onnx_settings.session_options(model_config.parse(text), 2)
