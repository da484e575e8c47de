"""A model's configuration: `config.pbtxt` read, checked, and completed from the model's file.

    text ──parse──> ModelConfig ──check──> only what Shoal does ──complete──> ModelConfig, Signature
                                                                     ^ inputs and outputs of the file

What is not in the text comes from the file. `max_batch_size` that is not written is guessed: 64 when the first
dimension of every input and output is free. A guess is only a candidate, which a trial run has to confirm (`warmup`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from google.protobuf import text_format

from services.infer.error_text import enumerated, listed
from services.infer.requests.signature import Signature, TensorSpec, fits
from services.infer.runtimes import reshape
from services.infer.runtimes.runtime import Runtime
from services.infer.scheduling import rules
from services.infer.sequences import checks as sequence_checks
from services.infer.sequences.settings import DEFAULT_IDLE_US
from shoal.errors import FailedPrecondition
from shoal.inference.v2 import model_config_pb2 as pb
from shoal.oip.datatypes import BY_NUMBER
from shoal.oip.tensors import shape_text

GUESSED_BATCH_SIZE = 64
"""Rows at most for a model that says nothing: most of what batching gives is had by then, and memory stays modest."""

ONNX = "onnxruntime"
KERNELS, REMOTE = "kernels", "remote"
"""The backends that this module knows by name."""

_OF = {KERNELS: "of an operation", REMOTE: "of a remote model"}

# Comments and quoted texts are matched to be passed over. No part of the text is looked at again: a search from the
# begin of each line to the end took hours for 1 MiB of empty lines, and no other thread runs during a search.
_SAYS_MAX_BATCH_SIZE = re.compile(
    r"""\#[^\n]* | "(?:[^"\\\n]|\\.)*"? | '(?:[^'\\\n]|\\.)*'? | (?P<field>\bmax_batch_size\s*:)""", re.VERBOSE
)

MOST_SAMPLES = 1000
"""Runs of one sample of `model_warmup`."""

# Instances of one group, and of all groups: each is a thread or a process.
_MAX_INSTANCES, _MAX_ALL_INSTANCES = 64, 256
_MAX_BATCH_SIZE = 1 << 16


def parse(text: str, where: str = "config.pbtxt") -> pb.ModelConfig:
    """Reads a configuration. Raises FailedPrecondition, mostly with line and column, when it is not one."""
    try:
        return text_format.Parse(text, pb.ModelConfig())
    except (text_format.ParseError, ValueError, RecursionError) as err:  # ValueError: an enum's number out of range.
        raise FailedPrecondition(f"{where}: {err}") from err


def says_max_batch_size(text: str) -> bool:
    """Return True when the text sets max_batch_size, also to 0, which the parsed message cannot tell from unset."""
    return any(found["field"] for found in _SAYS_MAX_BATCH_SIZE.finditer(text))


def served_versions(config: pb.ModelConfig, available: Collection[int], stable: int | None = None) -> tuple[int, ...]:
    """Return the available versions that the policy selects, ascending; always with that of the alias `stable`."""
    policy = config.version_policy
    newest_first = sorted(available, reverse=True)
    match policy.WhichOneof("policy_choice"):
        case "all":
            picked = set(newest_first)
        case "specific":
            picked = set(policy.specific.versions) & set(available)
        case _:
            picked = set(newest_first[: policy.latest.num_versions or 1])
    if stable is not None and stable in available:
        picked.add(stable)
    return tuple(sorted(picked))


def check(config: pb.ModelConfig, runtime: Runtime) -> None:
    """Raises FailedPrecondition that names every setting that Shoal does not do, or that is out of range."""
    wrong = [*_not_done(config, runtime), *_out_of_range(config), *rules.wrong(config), *sequence_checks.wrong(config)]
    if wrong:
        raise FailedPrecondition("the model's configuration: " + "; ".join(wrong))


def check_ensemble(config: pb.ModelConfig) -> None:
    """As `check`, for a model that is made of others and has no runtime of its own."""
    wrong = [*_unsupported(config), *_not_of_ensembles(config), *_out_of_range(config), *rules.wrong(config)]
    if wrong:
        raise FailedPrecondition("the ensemble's configuration: " + "; ".join(wrong))


def _not_of_ensembles(config: pb.ModelConfig) -> Iterator[str]:
    unsupported = {
        "backend": bool(config.backend),
        "runtime": bool(config.runtime),
        "default_model_filename": bool(config.default_model_filename),
        "instance_group": bool(config.instance_group),
        "optimization": config.HasField("optimization"),
        "sequence_batching": config.HasField("sequence_batching"),
        "model_transaction_policy.decoupled": config.model_transaction_policy.decoupled,
    }
    yield from (f"an ensemble has no {name}" for name, is_set in unsupported.items() if is_set)
    tensors: list[pb.ModelInput | pb.ModelOutput] = [*config.input, *config.output]
    yield from (f"'{t.name}': an ensemble has no reshape" for t in tensors if t.HasField("reshape"))


def _not_done(config: pb.ModelConfig, runtime: Runtime) -> Iterator[str]:
    names = ("", runtime.platform, runtime.backend)
    if config.platform not in names:
        yield f"platform '{config.platform}' is not supported: use {runtime.platform}"
    if config.backend not in names:
        yield f"backend '{config.backend}' is not supported: use {runtime.backend}"
    if config.runtime not in (*names, f"libtriton_{runtime.backend}.so"):
        yield f"runtime '{config.runtime}' is not supported: leave it out"
    if config.model_transaction_policy.decoupled and not runtime.can_decouple:
        yield "model_transaction_policy.decoupled is not supported"
    if config.default_model_filename and not runtime.model_file:
        yield "default_model_filename without a model file is not supported"
    yield from _unsupported(config, can_be_ragged=runtime.backend == KERNELS)
    if runtime.backend != ONNX:
        yield from _only_for_onnx(config, runtime)


def _unsupported(config: pb.ModelConfig, *, can_be_ragged: bool = False) -> Iterator[str]:
    """Yield the settings that no kind of model supports."""
    unsupported = {
        "response_cache of a decoupled model": config.response_cache.enable
        and config.model_transaction_policy.decoupled,
        "model_warmup of a decoupled model": bool(config.model_warmup) and config.model_transaction_policy.decoupled,
        "sequence_batching of an operation": config.HasField("sequence_batching") and can_be_ragged,
        "batch_input": bool(config.batch_input),
        "batch_output": bool(config.batch_output),
        "cc_model_filenames": bool(config.cc_model_filenames),
        "model_operations": bool(config.model_operations.op_library_filename),
        "model_repository_agents": bool(config.model_repository_agents.agents),
        "metric_tags": bool(config.metric_tags),
        "model_metrics": bool(config.model_metrics.metric_control),
        **_optimizations(config.optimization),
    }
    yield from (f"{name} is not supported" for name, is_set in unsupported.items() if is_set)
    for given in config.input:
        yield from (f"input '{given.name}': {what} is not supported" for what in _odd_input(given, can_be_ragged))
    for output in config.output:
        if output.is_shape_tensor or output.is_non_linear_format_io:
            yield f"output '{output.name}': shape tensors and other formats are not supported"
    yield from (f"instance_group: {what}" for group in config.instance_group for what in _odd_group(group))


def _optimizations(given: pb.ModelOptimizationPolicy) -> dict[str, bool]:
    # Pinned memory is a hint for copies to and from a GPU, which ONNX Runtime makes as it sees fit: nothing to refuse.
    return {
        "optimization.cuda": given.HasField("cuda"),
        "optimization.priority": given.priority != pb.ModelOptimizationPolicy.PRIORITY_DEFAULT,
        "optimization.gather_kernel_buffer_threshold": given.gather_kernel_buffer_threshold > 0,
        "optimization.eager_batching": given.eager_batching,
    }


def _odd_input(given: pb.ModelInput, can_be_ragged: bool) -> Iterator[str]:
    for name in ("allow_ragged_batch", "is_shape_tensor", "is_non_linear_format_io"):
        if getattr(given, name) and not (can_be_ragged and name == "allow_ragged_batch"):
            yield name


def _odd_group(group: pb.ModelInstanceGroup) -> Iterator[str]:
    for name in ("rate_limiter", "secondary_devices", "profile", "passive", "host_policy"):
        if group.HasField(name) if name == "rate_limiter" else getattr(group, name):
            yield f"{name} is not supported"


def _only_for_onnx(config: pb.ModelConfig, runtime: Runtime) -> Iterator[str]:
    """Yield the settings that only ONNX models support."""
    is_on_gpu = any(group.kind == pb.ModelInstanceGroup.KIND_GPU or group.gpus for group in config.instance_group)
    if is_on_gpu and runtime.backend != KERNELS:
        where = "its own server decides where it runs" if runtime.backend == REMOTE else "models run on the CPU"
        yield f"instance_group: KIND_GPU is not supported: {where}"
    if config.optimization.HasField("execution_accelerators"):
        yield "optimization.execution_accelerators is not supported"
    if config.optimization.graph.level:
        yield "optimization.graph.level is not supported"
    if config.HasField("sequence_batching") and runtime.backend in (KERNELS, REMOTE):
        yield f"sequence_batching is not supported with backend {runtime.backend}"
    yield from _no_reshape(config, _OF.get(runtime.backend, "of a Python model"))


def _no_reshape(config: pb.ModelConfig, where: str) -> Iterator[str]:
    tensors: list[pb.ModelInput | pb.ModelOutput] = [*config.input, *config.output]
    yield from (f"'{t.name}': reshape is not supported {where}" for t in tensors if t.HasField("reshape"))


def _out_of_range(config: pb.ModelConfig) -> Iterator[str]:
    if not 0 <= config.max_batch_size <= _MAX_BATCH_SIZE:
        yield f"max_batch_size {config.max_batch_size}: expected 0 to {_MAX_BATCH_SIZE}"
    for group in config.instance_group:
        if not 0 <= group.count <= _MAX_INSTANCES:
            yield f"instance_group count {group.count}: expected 0 (which means 1) to {_MAX_INSTANCES}"
    if instances(config) > _MAX_ALL_INSTANCES:
        yield f"instance_group: {instances(config)} instances in all groups: expected {_MAX_ALL_INSTANCES} at most"
    for size in config.dynamic_batching.preferred_batch_size:
        if not 1 <= size <= max(config.max_batch_size, 1):
            yield f"preferred_batch_size {size}: expected 1 to max_batch_size, {config.max_batch_size}"
    if config.default_model_filename and os.path.basename(config.default_model_filename) in ("", ".", ".."):
        yield f"default_model_filename '{config.default_model_filename}' is no file name"
    if os.path.basename(config.default_model_filename) != config.default_model_filename:
        yield f"default_model_filename '{config.default_model_filename}': expected a name without folders"
    tensors: list[pb.ModelInput | pb.ModelOutput] = [*config.input, *config.output]
    for tensor in tensors:
        if any(dim < -1 or dim == 0 for dim in tensor.dims):
            yield f"'{tensor.name}': dims {shape_text(tensor.dims)}: expected 1 or more, or -1 for any"
        if tensor.data_type not in BY_NUMBER:
            yield f"'{tensor.name}': data_type is missing"
        yield from reshape.reshape_errors("input" if isinstance(tensor, pb.ModelInput) else "output", tensor)
    for given in config.input:
        if given.format != pb.ModelInput.FORMAT_NONE and len(given.dims) != 3:
            name = enumerated(pb.ModelInput.Format.DESCRIPTOR, given.format)
            yield f"input '{given.name}': {name} has three dims, got {shape_text(given.dims)}"
    for what, names in (("input", [t.name for t in config.input]), ("output", [t.name for t in config.output])):
        if twice := sorted({name for name in names if names.count(name) > 1}):
            yield f"{what} {listed(twice)} is given more than once"
    for sample in config.model_warmup:
        if sample.count > MOST_SAMPLES:
            yield f"model_warmup '{sample.name}': count {sample.count}: expected {MOST_SAMPLES} at most"


@dataclass(frozen=True)
class Completed:
    """A configuration with nothing left open, and the signature that it and the file agree on."""

    config: pb.ModelConfig
    signature: Signature
    is_batch_guessed: bool
    """True when the batch dimension is a guess that a trial run must confirm; otherwise `unbatched` applies."""
    given_outputs: frozenset[str] = frozenset()
    """Outputs that the configuration describes; the others come from the model's file."""

    def unbatched(self) -> Completed:
        """Return the same model without a batch dimension."""
        config = pb.ModelConfig()
        config.CopyFrom(self.config)
        config.max_batch_size = 0
        for tensor, spec in zip(config.input, self.signature.inputs, strict=True):
            tensor.dims[:] = spec.shape
        for output, spec in zip(config.output, self.signature.outputs, strict=True):
            output.dims[:] = spec.shape
        return replace(self, config=config, signature=replace(self.signature, max_batch_size=0), is_batch_guessed=False)


def complete(
    config: pb.ModelConfig,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    *,
    runtime: Runtime,
    text: bool,
    batch_is_given: bool,
    labels: Mapping[str, tuple[str, ...]],
    gpus: Collection[int] = (),
) -> Completed:
    """Fills in what `config` leaves open from the file's inputs and outputs.

    Args:
        text: BYTES are UTF-8 for this session.
        batch_is_given: the configuration's max_batch_size is meant, even 0.
        labels: class names by output.
        gpus: where it runs; none: on the CPU.

    Raises:
        FailedPrecondition: configuration and file contradict each other; the message names the tensor.
    """
    done = pb.ModelConfig()
    done.CopyFrom(config)
    done.platform, done.backend = runtime.platform, runtime.backend
    done.default_model_filename = config.default_model_filename or runtime.model_file
    if not done.HasField("version_policy"):
        done.version_policy.latest.num_versions = 1
    if not done.instance_group:
        done.instance_group.add()
    for n, group in enumerate(done.instance_group):
        group.name, group.count = group.name or f"{done.name}_{n}", group.count or 1
        _place(group, gpus)
    if done.HasField("sequence_batching") and not done.sequence_batching.max_sequence_idle_microseconds:
        done.sequence_batching.max_sequence_idle_microseconds = DEFAULT_IDLE_US
    guess = not batch_is_given and not config.input and not config.output and not config.max_batch_size
    if guess and inputs and all(spec.shape[:1] == (-1,) for spec in (*inputs, *outputs)):
        done.max_batch_size = GUESSED_BATCH_SIZE
    batched = done.max_batch_size
    given_inputs = tuple(_agreed(given, inputs, batched, "input") for given in config.input)
    given_outputs = tuple(_agreed(given, outputs, batched, "output") for given in config.output)
    needed = tuple(spec for spec in inputs if not spec.is_optional)
    # What a file has a value for is hidden unless it is named; what an operation can do without is there.
    shown = tuple(inputs) if runtime.backend == KERNELS else needed
    if given_inputs and (missing := {spec.name for spec in needed} - {spec.name for spec in given_inputs}):
        raise FailedPrecondition(f"the configuration leaves out input {listed(sorted(missing))} of the model")
    all_inputs, all_outputs = given_inputs or shown, given_outputs or tuple(outputs)
    if not config.input:
        done.input.extend(_as_input(_batchable(spec, batched, "input"), batched) for spec in all_inputs)
    if not config.output:
        done.output.extend(_as_output(_batchable(spec, batched, "output"), batched) for spec in all_outputs)
    all_outputs = tuple(replace(spec, labels=labels.get(spec.name, ())) for spec in all_outputs)
    signature = Signature(all_inputs, all_outputs, batched, text)
    return Completed(done, signature, guess and batched > 0, frozenset(output.name for output in config.output))


def _agreed(given: pb.ModelInput | pb.ModelOutput, specs: Sequence[TensorSpec], batched: int, role: str) -> TensorSpec:
    spec = next((spec for spec in specs if spec.name == given.name), None)
    if spec is None:
        known = listed(spec.name for spec in specs)
        raise FailedPrecondition(f"the configuration has {role} '{given.name}', the model has {known}")
    datatype = BY_NUMBER[given.data_type]
    if datatype != spec.datatype:
        raise FailedPrecondition(
            f"{role} '{given.name}': the configuration says {datatype.name}, the model {spec.datatype.name}"
        )
    shape = ((-1,) if batched else ()) + tuple(given.dims)
    # The runtime says () of a scalar, and of a tensor of which the file says nothing: then the configuration does.
    if spec.shape and not fits(shape, spec.shape):
        fixed = batched == 1 and spec.shape[:1] == (1,) and fits((1, *given.dims), spec.shape)
        if not fixed:
            batch = f" with a batch dimension (max_batch_size {batched})" if batched else ""
            raise FailedPrecondition(
                f"{role} '{given.name}': the configuration says {shape_text(given.dims)}{batch}, "
                f"the model {shape_text(spec.shape)}"
            )
    if isinstance(given, pb.ModelInput):
        if given.optional and not spec.is_optional:
            raise FailedPrecondition(f"input '{given.name}' is optional in the configuration, and the model needs it")
        if given.allow_ragged_batch and not spec.is_ragged:
            raise FailedPrecondition(f"input '{given.name}': allow_ragged_batch is not supported: its rows are stacked")
        return replace(spec, shape=shape, is_optional=given.optional)
    return replace(spec, shape=shape)


def _place(group: pb.ModelInstanceGroup, gpus: Collection[int]) -> None:
    """Set the device of the instances of `group` where the configuration leaves it open."""
    is_gpu = bool(group.gpus) or group.kind == pb.ModelInstanceGroup.KIND_GPU
    if gpus and (is_gpu or group.kind == pb.ModelInstanceGroup.KIND_AUTO):
        group.kind = pb.ModelInstanceGroup.KIND_GPU
        group.gpus[:] = list(group.gpus) or sorted(gpus)
    elif group.kind != pb.ModelInstanceGroup.KIND_MODEL:
        group.kind = pb.ModelInstanceGroup.KIND_CPU


def _batchable(spec: TensorSpec, batched: int, role: str) -> TensorSpec:
    if batched and spec.shape[:1] != (-1,) and not (batched == 1 and spec.shape[:1] == (1,)):
        raise FailedPrecondition(
            f"max_batch_size is {batched}, but {role} '{spec.name}' of the model is {shape_text(spec.shape)}: "
            "its first dimension is not free; set max_batch_size to 0"
        )
    return spec


def _as_input(spec: TensorSpec, batched: int) -> pb.ModelInput:
    dims = spec.shape[1 if batched else 0 :]
    return pb.ModelInput(
        name=spec.name,
        data_type=spec.datatype.config_name,
        dims=dims,
        optional=spec.is_optional,
        allow_ragged_batch=spec.is_ragged,
    )


def _as_output(spec: TensorSpec, batched: int) -> pb.ModelOutput:
    return pb.ModelOutput(name=spec.name, data_type=spec.datatype.config_name, dims=spec.shape[1 if batched else 0 :])


def instances(config: pb.ModelConfig) -> int:
    """Return the number of executions of the model that may run at the same time."""
    return sum((group.count or 1) * (len(group.gpus) or 1) for group in config.instance_group) or 1
