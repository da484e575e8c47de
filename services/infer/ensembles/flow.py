"""Whether tensors of one step are what the next one takes: datatypes and shapes, and what that makes the ensemble.

Every tensor has one type: its datatype and whole shape, batch dimension included, -1 where a dimension varies. A model
that batches takes and gives [-1, ...]; a step that is called for each row takes [-1, ...] of what its model takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from services.infer.ensembles import gpu_residency
from services.infer.ensembles.graph import PLATFORM, Graph, GraphStep
from services.infer.ensembles.other_models import StepVersion
from services.infer.ensembles.plan import EnsemblePlan, Feed, PlannedStep
from services.infer.error_text import listed, quoted, written
from services.infer.loading.model_config import Completed
from services.infer.requests.request import WantedOutput
from services.infer.requests.signature import Signature, TensorSpec
from shoal.errors import FailedPrecondition
from shoal.inference.v2 import model_config_pb2 as pb
from shoal.oip.datatypes import BY_NUMBER


@dataclass(frozen=True)
class Flow:
    """The type of one tensor."""

    spec: TensorSpec
    origin: str
    """Who gives it, for messages."""
    text: bool | None = None
    """BYTES are `str`, or `bytes`; None: some are, some are not."""


def plan(graph: Graph, versions: Sequence[StepVersion], labels: Mapping[str, tuple[str, ...]]) -> EnsemblePlan:
    """The plan with these versions, one for each step.

    Args:
        labels: class names by output, from the ensemble's own files.

    Raises:
        FailedPrecondition: they do not fit each other; the message names the step, tensor and model.
    """
    return _Weaver(graph, versions).plan(labels)


class _Weaver:
    """Follows the tensors through the steps."""

    def __init__(self, graph: Graph, versions: Sequence[StepVersion]) -> None:
        self._graph = graph
        self._versions = versions
        self._signatures = [version.loaded.model.signature for version in versions]
        self._flows: dict[str, Flow] = {}
        self._wrong: list[str] = []

    def plan(self, labels: Mapping[str, tuple[str, ...]]) -> EnsemblePlan:
        for step in self._graph.steps:
            self._wrong += self._wrong_names(step)
        self._check()
        rows = self._max_batch_size()
        self._wrong += self._wrong_batches(rows)
        for name in self._graph.inputs:
            self._flows[name] = self._input(name, rows)
        for given in self._graph.config.input:  # Those that only a condition looks at, too.
            self._flows.setdefault(given.name, self._input(given.name, rows))
        for index in self._graph.order:
            self._follow(self._graph.steps[index])
        self._check()
        for step in self._graph.steps:
            self._wrong += self._wrong_conditions(step)
        completed = self._completed(rows, labels)
        self._wrong += self._wrong_if_skipped(completed.signature)
        self._check()
        return self._planned(completed)

    def _check(self) -> None:
        if self._wrong:
            raise FailedPrecondition("the ensemble does not fit together: " + "; ".join(self._wrong))

    def _wrong_names(self, step: GraphStep) -> Iterator[str]:
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
        is_open = not (self._graph.says_batch or config.max_batch_size or config.input or config.output)
        if not is_open or any(step.each for step in self._graph.steps):
            return config.max_batch_size
        return min(signature.max_batch_size for signature in self._signatures)

    def _wrong_batches(self, rows: int) -> Iterator[str]:
        for step in self._graph.steps:
            most = self._signatures[step.index].max_batch_size
            if rows > most and not step.each:
                yield (
                    f"max_batch_size is {rows}, but {step.title} "
                    + (f"takes {most} rows at most" if most else "has no batch dimension")
                    + f"; set max_batch_size to {most}"
                )

    def _input(self, name: str, rows: int) -> Flow:
        for given in self._graph.config.input:
            if given.name == name:
                shape = ((-1,) if rows else ()) + tuple(given.dims)
                spec = TensorSpec(name, BY_NUMBER[given.data_type], shape, is_optional=given.optional)
                return Flow(spec, f"the ensemble's input '{name}'", text=False)
        expected = [(step, self._expected(step, key)) for step in self._graph.steps for key in _keys(step, name)]
        step, first = expected[0]
        shape = first.shape
        for _, other in expected[1:]:
            if len(other.shape) == len(shape):
                shape = tuple(b if a == -1 else a for a, b in zip(shape, other.shape, strict=True))
        is_optional = all(spec.is_optional for _, spec in expected)
        spec = TensorSpec(name, first.datatype, shape, is_optional=is_optional)
        return Flow(spec, f"{step.title}, which takes it", text=False)

    def _expected(self, step: GraphStep, key: str) -> TensorSpec:
        """What the step takes for its model's input `key`."""
        spec = self._signatures[step.index].inputs_by_name[key]
        if not step.each:
            return spec
        element = self._element(step, spec)
        return replace(spec, shape=(-1, *element) if step.inputs[key] in step.each else element)

    def _element(self, step: GraphStep, spec: TensorSpec) -> tuple[int, ...]:
        return spec.shape[1:] if self._signatures[step.index].max_batch_size else spec.shape

    def _follow(self, step: GraphStep) -> None:
        for key, tensor in step.inputs.items():
            self._wrong += _misfits(f"{step.title}, input '{key}'", self._expected(step, key), self._flows[tensor])
        for key, tensor in step.outputs.items():
            spec = self._signatures[step.index].outputs_by_name[key]
            shape = (-1, *self._element(step, spec)) if step.each else spec.shape
            text = self._signatures[step.index].text
            flow = Flow(replace(spec, name=tensor, shape=shape), f"{step.title}, output '{key}'", text)
            known = self._flows.get(tensor)
            if known is not None:
                self._wrong += _misfits(f"{step.title}, output '{key}'", flow.spec, known)
                flow = _merged(known, flow)
            self._flows[tensor] = flow

    def _wrong_conditions(self, step: GraphStep) -> Iterator[str]:
        for comparison in step.when:
            datatype = self._flows[comparison.tensor].spec.datatype
            if reason := comparison.wrong(datatype):
                yield f"{step.title}, its condition '{comparison}': {reason}"
            if comparison.is_count and not self._flows[comparison.tensor].spec.shape:
                yield f"{step.title}, its condition '{comparison}': the tensor has no dimension, and so no rows"

    def _completed(self, rows: int, labels: Mapping[str, tuple[str, ...]]) -> Completed:
        config = pb.ModelConfig()
        config.CopyFrom(self._graph.config)
        config.platform, config.max_batch_size = PLATFORM, rows
        if not config.HasField("version_policy"):
            config.version_policy.latest.num_versions = 1
        inputs = [given.name for given in config.input] or self._in_order(self._graph.inputs)
        outputs = [given.name for given in config.output] or self._in_order(self._graph.last)
        if not config.input:
            for name in inputs:
                spec = self._flows[name].spec
                config.input.add(name=name, data_type=spec.datatype.config_name, dims=spec.shape[1 if rows else 0 :])
        for given in config.output:
            shape = ((-1,) if rows else ()) + tuple(given.dims)
            spec = TensorSpec(given.name, BY_NUMBER[given.data_type], shape)
            self._wrong += _misfits(f"the ensemble's output '{given.name}'", spec, self._flows[given.name])
        if not config.output:
            for name in outputs:
                spec = self._flows[name].spec
                config.output.add(name=name, data_type=spec.datatype.config_name, dims=spec.shape[1 if rows else 0 :])
        signature = Signature(
            tuple(self._flows[name].spec for name in inputs),
            tuple(self._promised(given, rows, labels) for given in config.output),
            rows,
        )
        given_outputs = frozenset(output.name for output in self._graph.config.output)
        return Completed(config, signature, is_batch_guessed=False, given_outputs=given_outputs)

    def _in_order(self, tensors: Sequence[str]) -> list[str]:
        """By steps, and within each as its model has them: the configuration's maps have no order."""
        found: dict[str, None] = {}
        for step, signature in zip(self._graph.steps, self._signatures, strict=True):
            found.update(dict.fromkeys(step.inputs[spec.name] for spec in signature.inputs if spec.name in step.inputs))
            found.update(
                dict.fromkeys(step.outputs[spec.name] for spec in signature.outputs if spec.name in step.outputs)
            )
        return [name for name in found if name in tensors]

    def _promised(self, given: pb.ModelOutput, rows: int, labels: Mapping[str, tuple[str, ...]]) -> TensorSpec:
        spec = self._flows[given.name].spec
        shape = ((-1,) if rows else ()) + tuple(given.dims)
        return replace(spec, shape=shape, labels=labels.get(given.name, spec.labels))

    def _wrong_if_skipped(self, signature: Signature) -> Iterator[str]:
        for name in sorted(self._graph.empty_if_skipped & signature.outputs_by_name.keys()):
            spec = signature.outputs_by_name[name]
            if -1 not in spec.shape[1 if signature.max_batch_size else 0 :]:
                yield (
                    f"parameter 'skipped.{name}': output '{name}' is {written(spec.shape)} and cannot be empty: "
                    "it has no dimension of -1"
                )

    def _planned(self, completed: Completed) -> EnsemblePlan:
        places = {name: n for n, name in enumerate(self._flows)}
        steps = tuple(self._planned_step(step, places) for step in self._graph.steps)
        takers = tuple(tuple(s.step.index for s in steps if n in s.waits_for) for n in places.values())
        givers = tuple(self._graph.producers.get(name, ()) for name in places)
        specs = tuple(flow.spec for flow in self._flows.values())
        outputs = {places[spec.name] for spec in completed.signature.outputs}
        stay = gpu_residency.staying(steps, takers, givers, outputs)
        steps = tuple(_leaving(step, stay) for step in steps)
        return EnsemblePlan(self._graph, completed, steps, places, specs, takers, givers)

    def _planned_step(self, step: GraphStep, places: Mapping[str, int]) -> PlannedStep:
        signature = self._signatures[step.index]
        feeds = tuple(
            Feed(
                signature.inputs_by_name[key],
                tensor,
                places[tensor],
                tensor in step.each,
                signature.inputs_by_name[key].datatype.is_bytes and self._flows[tensor].text is not signature.text,
            )
            for key, tensor in step.inputs.items()
        )
        given = [spec for spec in signature.outputs if spec.name in step.outputs]
        return PlannedStep(
            step,
            self._versions[step.index],
            feeds,
            tuple(WantedOutput(spec) for spec in given),
            tuple(places[step.outputs[spec.name]] for spec in given),
            {name: places[name] for name in step.asked},
        )


def _leaving(step: PlannedStep, stay: frozenset[int]) -> PlannedStep:
    """The step, with its outputs at these places left where they are made."""
    pairs = zip(step.wanted, step.places, strict=True)
    return replace(step, wanted=tuple(replace(wanted, stays=place in stay) for wanted, place in pairs))


def _keys(step: GraphStep, tensor: str) -> list[str]:
    return [key for key, given in step.inputs.items() if given == tensor]


def _misfits(what: str, expected: TensorSpec, flow: Flow) -> Iterator[str]:
    """Why a tensor cannot be taken where `expected` is; nothing when it can."""
    got = flow.spec
    if expected.datatype != got.datatype:
        yield (f"{what} is {expected.datatype.name}, tensor {quoted(got.name)} is {got.datatype.name} by {flow.origin}")
    elif not _may_fit(expected.shape, got.shape):
        yield (
            f"{what} is {written(expected.shape)}, tensor {quoted(got.name)} is {written(got.shape)} by {flow.origin}"
        )


def _may_fit(one: Sequence[int], other: Sequence[int]) -> bool:
    return len(one) == len(other) and all(-1 in (a, b) or a == b for a, b in zip(one, other, strict=True))


def _merged(one: Flow, other: Flow) -> Flow:
    """The type of a tensor that either of two steps gives."""
    if len(one.spec.shape) != len(other.spec.shape):
        return one
    shape = tuple(a if a == b else -1 for a, b in zip(one.spec.shape, other.spec.shape, strict=True))
    text = one.text if one.text is other.text else None
    return Flow(replace(one.spec, shape=shape), one.origin, text)
