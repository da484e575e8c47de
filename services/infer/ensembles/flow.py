"""Type check of an ensemble: follows datatypes and shapes through the steps, and derives the ensemble's signature.

Each tensor has one type: its datatype and whole shape, batch dimension included, -1 where a dimension varies. The
tensors of a model that batches are [-1, ...]. A step that is called for each row has inputs [-1, *row of the model].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from services.infer.ensembles import gpu_residency
from services.infer.ensembles.graph import PLATFORM, Graph, GraphStep
from services.infer.ensembles.other_models import StepVersion
from services.infer.ensembles.plan import EnsemblePlan, Feed, PlannedStep
from services.infer.error_text import listed, quoted
from services.infer.loading.model_config import Completed
from services.infer.requests.request import WantedOutput
from services.infer.requests.signature import Signature, TensorSpec
from shoal.errors import FailedPrecondition
from shoal.inference.v2 import model_config_pb2 as pb
from shoal.oip.datatypes import BY_NUMBER
from shoal.oip.tensors import shape_text


@dataclass(frozen=True)
class TensorType:
    """Datatype and shape of one tensor."""

    spec: TensorSpec
    origin: str
    """Producer of the tensor, for messages."""
    text: bool | None = None
    """True: BYTES elements are `str`; False: `bytes`; None: one producer has `str`, another `bytes`."""


def plan(graph: Graph, versions: Sequence[StepVersion], labels: Mapping[str, tuple[str, ...]]) -> EnsemblePlan:
    """Return the plan with these versions, one for each step.

    Args:
        labels: class names by output, from the ensemble's own files.

    Raises:
        FailedPrecondition: the steps do not fit together; the message names the step, tensor and model.
    """
    return _TypeChecker(graph, versions).plan(labels)


class _TypeChecker:
    """Follows the tensors through the steps; collects all errors before it raises."""

    def __init__(self, graph: Graph, versions: Sequence[StepVersion]) -> None:
        self._graph = graph
        self._versions = versions
        self._signatures = [version.loaded.model.signature for version in versions]
        self._types: dict[str, TensorType] = {}
        self._errors: list[str] = []

    def plan(self, labels: Mapping[str, tuple[str, ...]]) -> EnsemblePlan:
        for step in self._graph.steps:
            self._errors += self._name_errors(step)
        self._check()
        rows = self._max_batch_size()
        self._errors += self._batch_errors(rows)
        for name in self._graph.inputs:
            self._types[name] = self._input(name, rows)
        # Inputs that only a condition compares are in no step's `inputs`.
        for declared in self._graph.config.input:
            self._types.setdefault(declared.name, self._input(declared.name, rows))
        for index in self._graph.order:
            self._check_step(self._graph.steps[index])
        self._check()
        for step in self._graph.steps:
            self._errors += self._condition_errors(step)
        completed = self._completed(rows, labels)
        self._errors += self._skipped_errors(completed.signature)
        self._check()
        return self._ensemble_plan(completed)

    def _check(self) -> None:
        if self._errors:
            raise FailedPrecondition("the ensemble does not fit together: " + "; ".join(self._errors))

    def _name_errors(self, step: GraphStep) -> Iterator[str]:
        signature = self._signatures[step.index]
        if self._versions[step.index].decoupled is not None:
            yield f"{step.title} gives any number of responses (decoupled), which no ensemble can wait for"
        if unknown := sorted(step.inputs.keys() - signature.inputs_by_name.keys()):
            yield f"{step.title} has no input {listed(unknown)}: its inputs are {listed(signature.inputs_by_name)}"
        if missing := sorted(signature.required - step.inputs.keys()):
            yield f"{step.title} gets no input {listed(missing)}: input_map leaves it out"
        if unknown := sorted(step.outputs.keys() - signature.outputs_by_name.keys()):
            yield f"{step.title} has no output {listed(unknown)}: its outputs are {listed(signature.outputs_by_name)}"

    def _max_batch_size(self) -> int:
        config = self._graph.config
        is_derived = not (self._graph.says_batch or config.max_batch_size or config.input or config.output)
        if not is_derived or any(step.each for step in self._graph.steps):
            return config.max_batch_size
        return min(signature.max_batch_size for signature in self._signatures)

    def _batch_errors(self, rows: int) -> Iterator[str]:
        for step in self._graph.steps:
            most = self._signatures[step.index].max_batch_size
            if rows > most and not step.each:
                yield (
                    f"max_batch_size is {rows}, but {step.title} "
                    + (f"takes {most} rows at most" if most else "has no batch dimension")
                    + f"; set max_batch_size to {most}"
                )

    def _input(self, name: str, rows: int) -> TensorType:
        for declared in self._graph.config.input:
            if declared.name == name:
                shape = ((-1,) if rows else ()) + tuple(declared.dims)
                spec = TensorSpec(name, BY_NUMBER[declared.data_type], shape, is_optional=declared.optional)
                return TensorType(spec, f"the ensemble's input '{name}'", text=False)
        expected = [(step, self._expected(step, key)) for step in self._graph.steps for key in _keys(step, name)]
        step, first = expected[0]
        shape = first.shape
        for _, other in expected[1:]:
            if len(other.shape) == len(shape):
                shape = tuple(b if a == -1 else a for a, b in zip(shape, other.shape, strict=True))
        is_optional = all(spec.is_optional for _, spec in expected)
        spec = TensorSpec(name, first.datatype, shape, is_optional=is_optional)
        return TensorType(spec, f"{step.title}, which takes it", text=False)

    def _expected(self, step: GraphStep, key: str) -> TensorSpec:
        """Return the type that the step needs for its model's input `key`."""
        spec = self._signatures[step.index].inputs_by_name[key]
        if not step.each:
            return spec
        element = self._element(step, spec)
        return replace(spec, shape=(-1, *element) if step.inputs[key] in step.each else element)

    def _element(self, step: GraphStep, spec: TensorSpec) -> tuple[int, ...]:
        return spec.shape[1:] if self._signatures[step.index].max_batch_size else spec.shape

    def _check_step(self, step: GraphStep) -> None:
        for key, tensor in step.inputs.items():
            self._errors += _type_errors(f"{step.title}, input '{key}'", self._expected(step, key), self._types[tensor])
        for key, tensor in step.outputs.items():
            spec = self._signatures[step.index].outputs_by_name[key]
            shape = (-1, *self._element(step, spec)) if step.each else spec.shape
            text = self._signatures[step.index].text
            tensor_type = TensorType(replace(spec, name=tensor, shape=shape), f"{step.title}, output '{key}'", text)
            known = self._types.get(tensor)
            if known is not None:
                self._errors += _type_errors(f"{step.title}, output '{key}'", tensor_type.spec, known)
                tensor_type = _merged(known, tensor_type)
            self._types[tensor] = tensor_type

    def _condition_errors(self, step: GraphStep) -> Iterator[str]:
        for comparison in step.when:
            datatype = self._types[comparison.tensor].spec.datatype
            if reason := comparison.misfit(datatype):
                yield f"{step.title}, its condition '{comparison}': {reason}"
            if comparison.is_count and not self._types[comparison.tensor].spec.shape:
                yield f"{step.title}, its condition '{comparison}': the tensor has no dimension, and so no rows"

    def _completed(self, rows: int, labels: Mapping[str, tuple[str, ...]]) -> Completed:
        config = pb.ModelConfig()
        config.CopyFrom(self._graph.config)
        config.platform, config.max_batch_size = PLATFORM, rows
        if not config.HasField("version_policy"):
            config.version_policy.latest.num_versions = 1
        inputs = [declared.name for declared in config.input] or self._in_order(self._graph.inputs)
        outputs = [declared.name for declared in config.output] or self._in_order(self._graph.last)
        if not config.input:
            for name in inputs:
                spec = self._types[name].spec
                config.input.add(name=name, data_type=spec.datatype.config_name, dims=spec.shape[1 if rows else 0 :])
        for declared in config.output:
            shape = ((-1,) if rows else ()) + tuple(declared.dims)
            spec = TensorSpec(declared.name, BY_NUMBER[declared.data_type], shape)
            self._errors += _type_errors(f"the ensemble's output '{declared.name}'", spec, self._types[declared.name])
        if not config.output:
            for name in outputs:
                spec = self._types[name].spec
                config.output.add(name=name, data_type=spec.datatype.config_name, dims=spec.shape[1 if rows else 0 :])
        signature = Signature(
            tuple(self._types[name].spec for name in inputs),
            tuple(self._declared_spec(declared, rows, labels) for declared in config.output),
            rows,
        )
        given_outputs = frozenset(output.name for output in self._graph.config.output)
        return Completed(config, signature, is_batch_guessed=False, given_outputs=given_outputs)

    def _in_order(self, tensors: Sequence[str]) -> list[str]:
        """Return tensors ordered by step, then by the model's signature: the configuration's maps have no order."""
        found: dict[str, None] = {}
        for step, signature in zip(self._graph.steps, self._signatures, strict=True):
            found.update(dict.fromkeys(step.inputs[spec.name] for spec in signature.inputs if spec.name in step.inputs))
            found.update(
                dict.fromkeys(step.outputs[spec.name] for spec in signature.outputs if spec.name in step.outputs)
            )
        return [name for name in found if name in tensors]

    def _declared_spec(self, declared: pb.ModelOutput, rows: int, labels: Mapping[str, tuple[str, ...]]) -> TensorSpec:
        spec = self._types[declared.name].spec
        shape = ((-1,) if rows else ()) + tuple(declared.dims)
        return replace(spec, shape=shape, labels=labels.get(declared.name, spec.labels))

    def _skipped_errors(self, signature: Signature) -> Iterator[str]:
        for name in sorted(self._graph.empty_if_skipped & signature.outputs_by_name.keys()):
            spec = signature.outputs_by_name[name]
            if -1 not in spec.shape[1 if signature.max_batch_size else 0 :]:
                yield (
                    f"parameter 'skipped.{name}': output '{name}' is {shape_text(spec.shape)} and cannot be empty: "
                    "it has no dimension of -1"
                )

    def _ensemble_plan(self, completed: Completed) -> EnsemblePlan:
        slots = {name: n for n, name in enumerate(self._types)}
        steps = tuple(self._planned_step(step, slots) for step in self._graph.steps)
        consumers = tuple(tuple(s.step.index for s in steps if n in s.waits_for) for n in slots.values())
        producers = tuple(self._graph.producers.get(name, ()) for name in slots)
        specs = tuple(tensor_type.spec for tensor_type in self._types.values())
        outputs = {slots[spec.name] for spec in completed.signature.outputs}
        resident = gpu_residency.resident_slots(steps, consumers, producers, outputs)
        steps = tuple(_with_resident_outputs(step, resident) for step in steps)
        sees_tensors_only = all(step.version.sees_tensors_only for step in steps)
        return EnsemblePlan(self._graph, completed, steps, slots, specs, consumers, producers, sees_tensors_only)

    def _planned_step(self, step: GraphStep, slots: Mapping[str, int]) -> PlannedStep:
        signature = self._signatures[step.index]
        feeds = tuple(
            Feed(
                signature.inputs_by_name[key],
                tensor,
                slots[tensor],
                tensor in step.each,
                signature.inputs_by_name[key].datatype.is_bytes and self._types[tensor].text is not signature.text,
            )
            for key, tensor in step.inputs.items()
        )
        used = [spec for spec in signature.outputs if spec.name in step.outputs]
        return PlannedStep(
            step,
            self._versions[step.index],
            feeds,
            tuple(WantedOutput(spec) for spec in used),
            tuple(slots[step.outputs[spec.name]] for spec in used),
            {name: slots[name] for name in step.condition_tensors},
        )


def _with_resident_outputs(step: PlannedStep, resident: frozenset[int]) -> PlannedStep:
    """Return the step with its outputs in these slots left on their GPU."""
    pairs = zip(step.outputs, step.output_slots, strict=True)
    return replace(step, outputs=tuple(replace(output, stays=slot in resident) for output, slot in pairs))


def _keys(step: GraphStep, tensor: str) -> list[str]:
    return [key for key, name in step.inputs.items() if name == tensor]


def _type_errors(what: str, expected: TensorSpec, found: TensorType) -> Iterator[str]:
    """Yield the reason why a tensor of this type cannot be used where `expected` is; nothing when it can."""
    got = found.spec
    if expected.datatype != got.datatype:
        yield (
            f"{what} is {expected.datatype.name}, tensor {quoted(got.name)} is {got.datatype.name} by {found.origin}"
        )
    elif not _shapes_fit(expected.shape, got.shape):
        yield (
            f"{what} is {shape_text(expected.shape)}, "
            f"tensor {quoted(got.name)} is {shape_text(got.shape)} by {found.origin}"
        )


def _shapes_fit(one: Sequence[int], other: Sequence[int]) -> bool:
    return len(one) == len(other) and all(-1 in (a, b) or a == b for a, b in zip(one, other, strict=True))


def _merged(one: TensorType, other: TensorType) -> TensorType:
    """Return the common type of a tensor that either of two steps produces."""
    if len(one.spec.shape) != len(other.spec.shape):
        return one
    shape = tuple(a if a == b else -1 for a, b in zip(one.spec.shape, other.spec.shape, strict=True))
    text = one.text if one.text is other.text else None
    return TensorType(replace(one.spec, shape=shape), one.origin, text)
