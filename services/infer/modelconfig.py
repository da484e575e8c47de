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

from services.infer import rules
from services.infer.datatypes import BY_CONFIG
from services.infer.runtime import Runtime, SessionOptions
from services.infer.signature import Signature, TensorSpec, fits
from services.infer.wording import listed, written
from shoal.errors import FailedPrecondition
from shoal.inference.v2 import model_config_pb2 as pb

GUESSED_BATCH_SIZE = 64
"""Rows at most for a model that says nothing: most of what batching gives is had by then, and memory stays modest."""

_MAX_INSTANCES = 64
_MAX_BATCH_SIZE = 1 << 16
_MAX_THREADS = 1024


def parse(text: str, where: str = "config.pbtxt") -> pb.ModelConfig:
    """Reads a configuration. Raises FailedPrecondition with line and column when it is not one."""
    try:
        return text_format.Parse(text, pb.ModelConfig())
    except (text_format.ParseError, UnicodeError) as err:
        raise FailedPrecondition(f"{where}: {err}") from err


def says_max_batch_size(text: str) -> bool:
    """Whether the text sets max_batch_size, be it to 0: the parsed message cannot tell."""
    return re.search(r"^[^#\"']*\bmax_batch_size\s*:", text, re.MULTILINE) is not None


def served_versions(config: pb.ModelConfig, available: Collection[int], stable: int | None = None) -> tuple[int, ...]:
    """Which of the available versions the policy picks, ascending; always the one that the alias `stable` names."""
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
    wrong = [*_not_done(config, runtime), *_out_of_range(config), *rules.wrong(config)]
    if wrong:
        raise FailedPrecondition("the model's configuration: " + "; ".join(wrong))


def _not_done(config: pb.ModelConfig, runtime: Runtime) -> Iterator[str]:
    if config.platform not in ("", runtime.platform):
        yield f"platform '{config.platform}' is not supported: use {runtime.platform}"
    if config.backend not in ("", runtime.backend):
        yield f"backend '{config.backend}' is not supported: use {runtime.backend}"
    if config.runtime not in ("", runtime.backend):
        yield f"runtime '{config.runtime}' is not supported: leave it out"
    unsupported = {
        "sequence_batching": config.HasField("sequence_batching"),
        "ensemble_scheduling": config.HasField("ensemble_scheduling"),
        "model_transaction_policy.decoupled": config.model_transaction_policy.decoupled and not runtime.can_decouple,
        "batch_input": bool(config.batch_input),
        "batch_output": bool(config.batch_output),
        "cc_model_filenames": bool(config.cc_model_filenames),
        "model_operations": bool(config.model_operations.op_library_filename),
        "model_repository_agents": bool(config.model_repository_agents.agents),
        "optimization.cuda": config.optimization.HasField("cuda"),
        "optimization.execution_accelerators": config.optimization.HasField("execution_accelerators"),
    }
    yield from (f"{name} is not supported" for name, is_set in unsupported.items() if is_set)
    yield from (f"input '{i.name}': {what} is not supported" for i in config.input for what in _odd_input(i))
    for output in config.output:
        if output.HasField("reshape"):
            yield f"output '{output.name}': reshape is not supported"
        if output.is_shape_tensor or output.is_non_linear_format_io:
            yield f"output '{output.name}': shape tensors and other formats are not supported"
    yield from (f"instance_group: {what}" for group in config.instance_group for what in _odd_group(group))


def _odd_input(given: pb.ModelInput) -> Iterator[str]:
    for name in ("allow_ragged_batch", "optional", "is_shape_tensor", "is_non_linear_format_io"):
        if getattr(given, name):
            yield name
    if given.HasField("reshape"):
        yield "reshape"


def _odd_group(group: pb.ModelInstanceGroup) -> Iterator[str]:
    if group.kind == pb.ModelInstanceGroup.KIND_GPU or group.gpus:
        yield "KIND_GPU is not supported: models run on the CPU"
    for name in ("rate_limiter", "secondary_devices", "profile", "passive", "host_policy"):
        if group.HasField(name) if name == "rate_limiter" else getattr(group, name):
            yield f"{name} is not supported"


def _out_of_range(config: pb.ModelConfig) -> Iterator[str]:
    if not 0 <= config.max_batch_size <= _MAX_BATCH_SIZE:
        yield f"max_batch_size {config.max_batch_size}: expected 0 to {_MAX_BATCH_SIZE}"
    for group in config.instance_group:
        if not 0 <= group.count <= _MAX_INSTANCES:
            yield f"instance_group count {group.count}: expected 0 (which means 1) to {_MAX_INSTANCES}"
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
            yield f"'{tensor.name}': dims {written(tensor.dims)}: expected 1 or more, or -1 for any"
        if tensor.data_type not in BY_CONFIG:
            yield f"'{tensor.name}': data_type is missing"


@dataclass(frozen=True)
class Completed:
    """A configuration with nothing left open, and the signature that it and the file agree on."""

    config: pb.ModelConfig
    signature: Signature
    is_batch_guessed: bool
    """Nobody said that the first dimension is a batch: a trial run has to show it, or `unbatched` holds."""

    def unbatched(self) -> Completed:
        """The same model, taken as one without a batch dimension."""
        config = pb.ModelConfig()
        config.CopyFrom(self.config)
        config.max_batch_size = 0
        for tensor, spec in zip(config.input, self.signature.inputs, strict=True):
            tensor.dims[:] = spec.shape
        for output, spec in zip(config.output, self.signature.outputs, strict=True):
            output.dims[:] = spec.shape
        return Completed(config, replace(self.signature, max_batch_size=0), False)


def complete(
    config: pb.ModelConfig,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    *,
    runtime: Runtime,
    text: bool,
    batch_is_given: bool,
    labels: Mapping[str, tuple[str, ...]],
) -> Completed:
    """Fills in what `config` leaves open from the file's inputs and outputs.

    Args:
        text: BYTES are UTF-8 for this session.
        batch_is_given: the configuration's max_batch_size is meant, even 0.
        labels: class names by output.

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
        done.instance_group.add(kind=pb.ModelInstanceGroup.KIND_CPU)
    for n, group in enumerate(done.instance_group):
        group.name, group.count = group.name or f"{done.name}_{n}", group.count or 1
        group.kind = pb.ModelInstanceGroup.KIND_CPU
    guess = not batch_is_given and not config.input and not config.output and not config.max_batch_size
    if guess and inputs and all(spec.shape[:1] == (-1,) for spec in (*inputs, *outputs)):
        done.max_batch_size = GUESSED_BATCH_SIZE
    batched = done.max_batch_size
    given_inputs = tuple(_agreed(given, inputs, batched, "input") for given in config.input)
    given_outputs = tuple(_agreed(given, outputs, batched, "output") for given in config.output)
    if given_inputs and (missing := {spec.name for spec in inputs} - {spec.name for spec in given_inputs}):
        raise FailedPrecondition(f"the configuration leaves out input {listed(sorted(missing))} of the model")
    all_inputs, all_outputs = given_inputs or tuple(inputs), given_outputs or tuple(outputs)
    if not config.input:
        done.input.extend(_as_input(_batchable(spec, batched, "input"), batched) for spec in all_inputs)
    if not config.output:
        done.output.extend(_as_output(_batchable(spec, batched, "output"), batched) for spec in all_outputs)
    all_outputs = tuple(replace(spec, labels=labels.get(spec.name, ())) for spec in all_outputs)
    return Completed(done, Signature(all_inputs, all_outputs, batched, text), guess and batched > 0)


def _agreed(given: pb.ModelInput | pb.ModelOutput, specs: Sequence[TensorSpec], batched: int, role: str) -> TensorSpec:
    spec = next((spec for spec in specs if spec.name == given.name), None)
    if spec is None:
        known = listed(spec.name for spec in specs)
        raise FailedPrecondition(f"the configuration has {role} '{given.name}', the model has {known}")
    datatype = BY_CONFIG[given.data_type]
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
                f"{role} '{given.name}': the configuration says {written(given.dims)}{batch}, "
                f"the model {written(spec.shape)}"
            )
    return replace(spec, shape=shape)


def _batchable(spec: TensorSpec, batched: int, role: str) -> TensorSpec:
    if batched and spec.shape[:1] != (-1,) and not (batched == 1 and spec.shape[:1] == (1,)):
        raise FailedPrecondition(
            f"max_batch_size is {batched}, but {role} '{spec.name}' of the model is {written(spec.shape)}: "
            "its first dimension is not free; set max_batch_size to 0"
        )
    return spec


def _as_input(spec: TensorSpec, batched: int) -> pb.ModelInput:
    return pb.ModelInput(name=spec.name, data_type=spec.datatype.config, dims=spec.shape[1 if batched else 0 :])


def _as_output(spec: TensorSpec, batched: int) -> pb.ModelOutput:
    return pb.ModelOutput(name=spec.name, data_type=spec.datatype.config, dims=spec.shape[1 if batched else 0 :])


def session_options(config: pb.ModelConfig, threads: int) -> SessionOptions:
    """How the configuration wants its model run; `threads` where it does not say.

    Raises:
        FailedPrecondition: a thread count is no number, or out of range.
    """
    values = {key: parameter.string_value for key, parameter in config.parameters.items()}
    return SessionOptions(
        intra_op_threads=_threads(values, "intra_op_thread_count", threads),
        inter_op_threads=_threads(values, "inter_op_thread_count", 1),
        graph_level=config.optimization.graph.level,
        entries={key: value for key, value in values.items() if key.startswith("session.")},
    )


def _threads(values: Mapping[str, str], key: str, default: int) -> int:
    written_value = values.get(key, "0").strip()
    if not re.fullmatch(r"[0-9]{1,9}", written_value) or int(written_value) > _MAX_THREADS:
        raise FailedPrecondition(
            f"parameter {key} '{written_value}': expected a number from 0 (ours) to {_MAX_THREADS}"
        )
    return int(written_value) or default


def instances(config: pb.ModelConfig) -> int:
    """How many executions of the model may run at the same time."""
    return sum(group.count or 1 for group in config.instance_group) or 1
