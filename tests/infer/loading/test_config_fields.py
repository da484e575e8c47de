"""Every field of ModelConfig is honoured or refused by name. A field that is new, and neither, fails here."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from services.infer.ensembles.graph import graph_of
from services.infer.loading import model_config
from services.infer.loading.loading import Loaded
from services.infer.requests.signature import TensorSpec
from services.infer.response_cache.cache import ttl_s
from services.infer.runtimes import onnx_settings
from services.infer.runtimes.onnx_runtime import OnnxRuntime
from services.infer.scheduling import rules
from services.infer.sequences import settings as sequences
from shoal.errors import FailedPrecondition
from shoal.inference.v2 import model_config_pb2 as pb
from shoal.oip.datatypes import BY_NAME
from tests.infer import onnx_files

RUNTIME = OnnxRuntime()
X = TensorSpec("x", BY_NAME["FP32"], (-1, -1, 1, 1))
Y = TensorSpec("y", BY_NAME["FP32"], (-1, -1, 1, 1))

IN = 'max_batch_size: 4 input { name: "x" data_type: TYPE_FP32 dims: [4, 1, 1] %s }'
OUT = 'max_batch_size: 4 output { name: "y" data_type: TYPE_FP32 dims: [4, 1, 1] %s }'
QUEUE = "dynamic_batching { default_queue_policy { %s } }"
LEVELS = (
    "dynamic_batching { priority_levels: 2 default_priority_level: 1 priority_queue_policy { key: 2 value { %s } } }"
)
ACCELERATED = "instance_group { kind: KIND_CPU } optimization { execution_accelerators { %s } }"
CPU_ACCELERATOR = ACCELERATED % 'cpu_execution_accelerator { name: "openvino" %s }'
GPU_ACCELERATOR = ACCELERATED % 'gpu_execution_accelerator { name: "%s" %s }'

REFUSED = {
    *("sequence_batching.iterative_sequence", "sequence_batching.state.use_growable_memory"),
    *("ensemble_scheduling.step.model_namespace", "batch_input", "batch_output", "cc_model_filenames"),
    *("model_operations", "model_repository_agents", "model_transaction_policy", "metric_tags", "model_metrics"),
    *("optimization.cuda", "optimization.priority", "optimization.gather_kernel_buffer_threshold"),
    *("optimization.eager_batching", "instance_group.rate_limiter", "instance_group.secondary_devices"),
    *("instance_group.profile", "instance_group.passive", "instance_group.host_policy", "input.is_shape_tensor"),
    *("input.allow_ragged_batch", "input.is_non_linear_format_io", "output.is_shape_tensor"),
    "output.is_non_linear_format_io",
}
"""These, and all that is below them."""

SEQUENCES = "max_batch_size: 4 sequence_batching { %s }"
CONTROL = SEQUENCES % 'control_input { name: "c" control { kind: CONTROL_SEQUENCE_START %s } }'
STATE = SEQUENCES % 'state { input_name: "i" output_name: "o" data_type: TYPE_FP32 dims: 1 %s }'
FIRST = STATE % "initial_state { data_type: TYPE_FP32 dims: 1 %s }"

DIFFERENT = {
    "max_batch_size": ("max_batch_size: 2", "max_batch_size: 3"),
    "version_policy.latest.num_versions": ("", "version_policy { latest { num_versions: 2 } }"),
    "version_policy.all": ("", "version_policy { all {} }"),
    "version_policy.specific.versions": ("", "version_policy { specific { versions: [1] } }"),
    "input.dims": (IN % "", 'max_batch_size: 4 input { name: "x" data_type: TYPE_FP32 dims: [5, 1, 1] }'),
    "output.dims": (OUT % "", 'max_batch_size: 4 output { name: "y" data_type: TYPE_FP32 dims: [5, 1, 1] }'),
    "instance_group.count": ("", "instance_group { count: 2 }"),
    "instance_group.kind": ("", "instance_group { kind: KIND_CPU }"),
    "instance_group.gpus": ("instance_group { kind: KIND_GPU }", "instance_group { kind: KIND_GPU gpus: [1] }"),
    "optimization.graph.level": ("", "optimization { graph { level: 1 } }"),
    "optimization.execution_accelerators.cpu_execution_accelerator.name": ("", CPU_ACCELERATOR % ""),
    "optimization.execution_accelerators.cpu_execution_accelerator.parameters.value": (
        CPU_ACCELERATOR % "",
        CPU_ACCELERATOR % 'parameters { key: "a" value: "b" }',
    ),
    "optimization.execution_accelerators.gpu_execution_accelerator.name": (
        GPU_ACCELERATOR % ("cuda", ""),
        GPU_ACCELERATOR % ("tensorrt", ""),
    ),
    "optimization.execution_accelerators.gpu_execution_accelerator.parameters.value": (
        GPU_ACCELERATOR % ("cuda", ""),
        GPU_ACCELERATOR % ("cuda", 'parameters { key: "a" value: "b" }'),
    ),
    "parameters.value.string_value": (
        "",
        'parameters { key: "intra_op_thread_count" value { string_value: "7" } }',
    ),
    "response_cache.enable": ("", "response_cache { enable: true }"),
    "dynamic_batching.preferred_batch_size": (
        "max_batch_size: 8",
        "max_batch_size: 8 dynamic_batching { preferred_batch_size: [4] }",
    ),
    "dynamic_batching.max_queue_delay_microseconds": (
        "max_batch_size: 8",
        "max_batch_size: 8 dynamic_batching { max_queue_delay_microseconds: 100 }",
    ),
    "dynamic_batching.preserve_ordering": ("", "dynamic_batching { preserve_ordering: true }"),
    "dynamic_batching.priority_levels": ("", "dynamic_batching { priority_levels: 2 default_priority_level: 1 }"),
    "dynamic_batching.default_priority_level": (
        "dynamic_batching { priority_levels: 2 default_priority_level: 1 }",
        "dynamic_batching { priority_levels: 2 default_priority_level: 2 }",
    ),
    "sequence_batching.direct.max_queue_delay_microseconds": (
        SEQUENCES % "direct { }",
        SEQUENCES % "direct { max_queue_delay_microseconds: 9 }",
    ),
    "sequence_batching.direct.minimum_slot_utilization": (
        SEQUENCES % "direct { }",
        SEQUENCES % "direct { minimum_slot_utilization: 0.5 }",
    ),
    **{
        f"sequence_batching.oldest.{name}": (
            SEQUENCES % "oldest { max_candidate_sequences: 3 }",
            SEQUENCES
            % f"oldest {{ {'' if name.endswith('candidate_sequences') else 'max_candidate_sequences: 3'} {text} }}",
        )
        for name, text in (
            ("max_candidate_sequences", "max_candidate_sequences: 4"),
            ("preferred_batch_size", "preferred_batch_size: 2"),
            ("max_queue_delay_microseconds", "max_queue_delay_microseconds: 9"),
            ("preserve_ordering", "preserve_ordering: true"),
        )
    },
    "sequence_batching.max_sequence_idle_microseconds": (
        SEQUENCES % "",
        SEQUENCES % "max_sequence_idle_microseconds: 9",
    ),
    "sequence_batching.control_input.name": (
        CONTROL % "fp32_false_true: [0, 1]",
        (CONTROL % "fp32_false_true: [0, 1]").replace('"c"', '"d"'),
    ),
    "sequence_batching.control_input.control.kind": (
        CONTROL % "fp32_false_true: [0, 1]",
        (CONTROL % "fp32_false_true: [0, 1]").replace("START", "END"),
    ),
    **{
        f"sequence_batching.control_input.control.{name}": (CONTROL % f"{name}: {before}", CONTROL % f"{name}: {after}")
        for name, before, after in (
            ("fp32_false_true", "[0, 1]", "[0, 2]"),
            ("int32_false_true", "[0, 1]", "[1, 0]"),
            ("bool_false_true", "[false, true]", "[true, false]"),
        )
    },
    "sequence_batching.control_input.control.data_type": tuple(
        (CONTROL % f"data_type: TYPE_{name}").replace("START", "CORRID") for name in ("INT64", "STRING")
    ),
    **{
        f"sequence_batching.state.{name}": (STATE % "", (STATE % "").replace(before, after))
        for name, before, after in (
            ("input_name", '"i"', '"j"'),
            ("output_name", '"o"', '"p"'),
            ("data_type", "TYPE_FP32", "TYPE_INT32"),
            ("dims", "dims: 1", "dims: 2"),
        )
    },
    "sequence_batching.state.initial_state.data_file": (FIRST % "zero_data: true", FIRST % 'data_file: "f"'),
    "sequence_batching.state.initial_state.dims": (
        (STATE % "").replace("dims: 1", "dims: -1"),
        (FIRST % "zero_data: true").replace("dims: 1", "dims: -1", 1).replace("dims: 1", "dims: 7"),
    ),
    **{
        f"dynamic_batching.{where}.{name}": (text % before, text % after)
        for where, text in (("default_queue_policy", QUEUE), ("priority_queue_policy.value", LEVELS))
        for name, before, after in (
            ("timeout_action", "", "timeout_action: DELAY default_timeout_microseconds: 5"),
            ("default_timeout_microseconds", "", "default_timeout_microseconds: 5"),
            ("max_queue_size", "", "max_queue_size: 5"),
            (
                "allow_timeout_override",
                "default_timeout_microseconds: 5",
                "default_timeout_microseconds: 5 allow_timeout_override: true",
            ),
        )
    },
}
"""A configuration without and one with it: what is made of them differs."""

TESTED = {
    "name": "loading.test_config_fields:test_names",
    "platform": "loading.test_model_config:test_refused_by_name",
    "backend": "loading.test_model_config:test_refused_by_name",
    "runtime": "loading.test_config_fields:test_names_of_the_runtime",
    "default_model_filename": "loading.test_config_fields:test_names",
    "input.name": "loading.test_model_config:test_refused_by_name",
    "input.data_type": "loading.test_model_config:test_refused_by_name",
    "output.name": "loading.test_model_config:test_dims_may_be_narrower_than_the_models",
    "output.data_type": "loading.test_model_config:test_dims_may_be_narrower_than_the_models",
    "output.label_filename": "models.test_load_unload:test_files_of_its_own_are_all_there_is",
    "input.reshape.shape": "runtimes.test_reshape:test_a_batched_model",
    "output.reshape.shape": "runtimes.test_reshape:test_a_batched_model",
    "input.optional": "loading.test_canary:test_an_input_may_be_left_out",
    "sequence_batching.state.initial_state.data_type": "sequences.test_sequence_settings:test_refused_by_name",
    "sequence_batching.state.initial_state.zero_data": "sequences.test_sequence_settings:test_refused_by_name",
    "model_warmup.name": "loading.test_warmup:test_samples_of_the_configuration_must_succeed",
    "model_warmup.batch_size": "loading.test_config_fields:test_samples_of_warm_up",
    "model_warmup.count": "loading.test_config_fields:test_samples_of_warm_up",
    "model_warmup.inputs.value.data_type": "loading.test_warmup:test_samples_of_the_configuration_must_succeed",
    "model_warmup.inputs.value.dims": "loading.test_warmup:test_samples_of_the_configuration_must_succeed",
    "model_warmup.inputs.value.zero_data": "loading.test_warmup:test_samples_of_the_configuration_must_succeed",
    "model_warmup.inputs.value.random_data": "loading.test_warmup:test_samples_of_the_configuration_must_succeed",
    "model_warmup.inputs.value.input_data_file": "loading.test_warmup:test_samples_of_the_configuration_must_succeed",
    "ensemble_scheduling.step.model_name": "ensembles.test_ensemble_graph:test_what_is_read",
    "ensemble_scheduling.step.model_version": "ensembles.test_ensemble_graph:test_what_is_read",
    "ensemble_scheduling.step.input_map.value": "ensembles.test_ensemble_graph:test_what_is_read",
    "ensemble_scheduling.step.output_map.value": "ensembles.test_ensemble_graph:test_what_is_read",
    "ensemble_scheduling.max_inflight_requests": "ensembles.test_fan_out:test_so_many_rows_at_a_time",
}
"""Where it is shown to be honoured."""

TOLD = {
    "input.format": "how an image is laid out: for clients, and it must have three dims",
    "instance_group.name": "a name",
    "sequence_batching.state.initial_state.name": "a name",
    "sequence_batching.state.use_same_buffer_for_input_output": "a hint on memory: what is computed is the same",
    "optimization.input_pinned_memory.enable": "a hint for copies to a GPU, which ONNX Runtime makes as it sees fit",
    "optimization.output_pinned_memory.enable": "the same",
}
"""Nothing but words for clients; ModelConfig repeats them."""


def leaves(message: Descriptor, path: str = "") -> Iterator[str]:
    for field in message.fields:
        here = f"{path}{field.name}"
        if field.message_type is None:
            yield here
        elif field.message_type.GetOptions().map_entry:
            value = field.message_type.fields_by_name["value"]
            yield from leaves(value.message_type, f"{here}.value.") if value.message_type else (f"{here}.value",)
        elif not field.message_type.fields:
            yield here
        else:
            yield from leaves(field.message_type, f"{here}.")


LEAVES = sorted(leaves(pb.ModelConfig.DESCRIPTOR))


def is_refused(path: str) -> bool:
    return any(path == prefix or path.startswith(f"{prefix}.") for prefix in REFUSED)


def set_leaf(message: Message, path: str) -> None:
    name, _, rest = path.partition(".")
    field = message.DESCRIPTOR.fields_by_name[name]
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        value, _, below = rest.partition(".")
        assert value == "value"
        entry = field.message_type.fields_by_name
        key = "k" if entry["key"].type == FieldDescriptor.TYPE_STRING else 1
        if entry["value"].message_type:
            set_leaf(getattr(message, name)[key], below) if below else getattr(message, name)[key]
        else:
            getattr(message, name)[key] = some(entry["value"])
    elif field.message_type is not None:
        child = getattr(message, name).add() if field.is_repeated else getattr(message, name)
        child.SetInParent() if not field.is_repeated else None
        if rest:
            set_leaf(child, rest)
    elif field.is_repeated:
        getattr(message, name).append(some(field))
    else:
        setattr(message, name, some(field))


def some(field: FieldDescriptor) -> object:
    """A value that is not the default."""
    if field.enum_type:
        return field.enum_type.values[-1].number
    return {FieldDescriptor.TYPE_STRING: "z", FieldDescriptor.TYPE_BOOL: True}.get(field.type, 1)


def effects(text: str) -> tuple[object, ...]:
    config = model_config.parse(text)
    model_config.check(config, RUNTIME)
    given = model_config.says_max_batch_size(text)
    done = model_config.complete(config, [X], [Y], runtime=RUNTIME, text=True, batch_is_given=given, labels={})
    loaded = Loaded(done, session=None)
    return (
        onnx_settings.session_options(config, 1),
        model_config.served_versions(config, [1, 2, 3]),
        model_config.instances(config),
        done.signature,
        loaded.batch_policy(),
        rules.of(config),
        ttl_s(config),
        sequences.of(config) if config.HasField("sequence_batching") else None,
    )


def test_no_field_is_forgotten():
    known = {*DIFFERENT, *TESTED, *TOLD}
    neither = [path for path in LEAVES if path not in known and not is_refused(path)]
    assert neither == []
    assert sorted(known - set(LEAVES)) == []
    assert [path for path in known if is_refused(path)] == []
    assert [prefix for prefix in REFUSED if not any(p == prefix or p.startswith(f"{prefix}.") for p in LEAVES)] == []


@pytest.mark.parametrize("path", [path for path in LEAVES if is_refused(path)])
def test_what_is_refused_is_named(path):
    config = pb.ModelConfig()
    set_leaf(config, path)
    with pytest.raises(FailedPrecondition) as err:
        graph_of(config) if config.HasField("ensemble_scheduling") else model_config.check(config, RUNTIME)
    prefix = next(prefix for prefix in REFUSED if path == prefix or path.startswith(f"{prefix}."))
    name = prefix.rpartition(".")[2].removeprefix("is_").replace("non_linear_format_io", "format")
    assert name.replace("_", " ") in err.value.message.replace("_", " ")


@pytest.mark.parametrize("path", DIFFERENT)
def test_what_is_honoured_makes_a_difference(path):
    before, after = DIFFERENT[path]
    assert effects(before) != effects(after)


@pytest.mark.parametrize("path", TESTED)
def test_what_is_tested_elsewhere_is_tested(path):
    module, _, test = TESTED[path].partition(":")
    found = importlib.import_module(f"tests.infer.{module}")
    if test:
        assert inspect.isfunction(getattr(found, test))
    assert path.rpartition(".")[2] in inspect.getsource(found)


@pytest.mark.parametrize("name", ["", "onnxruntime", "onnxruntime_onnx", "libtriton_onnxruntime.so"])
def test_names_of_the_runtime(name):
    model_config.check(model_config.parse(f'runtime: "{name}"'), RUNTIME)
    if not name.startswith("lib"):
        model_config.check(model_config.parse(f'backend: "{name}" platform: "{name}"'), RUNTIME)


def test_another_runtime():
    with pytest.raises(FailedPrecondition, match=r"runtime 'libtriton_x\.so' is not supported"):
        model_config.check(model_config.parse('runtime: "libtriton_x.so"'), RUNTIME)


async def test_names(serve, models_folder):
    folder = models_folder.put("m", onnx_files.scale(), config='name: "other" default_model_filename: "it.onnx"')
    (folder / "1/model.onnx").rename(folder / "1/it.onnx")
    models_folder.put("gone", onnx_files.scale(), config='default_model_filename: "it.onnx"')
    served = await serve(models_folder.root)
    config = served.models.find("m", "").loaded.model.config
    assert (config.name, config.default_model_filename) == ("m", "it.onnx")
    assert {row.name: row.reason for row in served.models.index()}["gone"] == "version folder 1 has no file it.onnx"


async def test_samples_of_warm_up(serve, models_folder):
    text = """
    max_batch_size: 4
    model_warmup { name: "s" batch_size: %d count: %d
      inputs { key: "x" value { data_type: TYPE_FP32 dims: [4] %s } } }
    """
    models_folder.put("good", onnx_files.scale(), config=text % (4, 3, "random_data: true"))
    models_folder.put("wide", onnx_files.scale(), config=text % (5, 3, "zero_data: true"))
    models_folder.put("many", onnx_files.scale(), config=text % (1, 100_000, "zero_data: true"))
    models_folder.put("path", onnx_files.scale(), config=text % (1, 1, 'input_data_file: "../x"'))
    served = await serve(models_folder.root)
    reasons = {row.name: row.reason for row in served.models.index()}
    assert reasons["good"] == ""
    assert "batch_size 5 is over max_batch_size 4" in reasons["wide"]
    assert "count 100000: expected 1000 at most" in reasons["many"]
    assert "expected a name without folders" in reasons["path"]
