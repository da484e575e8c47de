"""Graph of an ensemble: its steps and the tensors between them, read from the configuration and validated.

ensemble_scheduling              as in Triton: `model_config.proto`
parameters                       Shoal's own: `parameters`
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from services.infer.ensembles.conditions import Condition
from services.infer.ensembles.parameters import EACH, WHEN, EnsembleParameters
from services.infer.error_text import listed, quoted
from services.infer.loading import model_config
from services.infer.model_files.wanted_models import ModelFiles
from shoal.errors import FailedPrecondition
from shoal.inference.v2 import model_config_pb2 as pb

PLATFORM = "ensemble"

_MAX_STEPS = 256


@dataclass(frozen=True)
class GraphStep:
    """One call of a model."""

    index: int
    model: str
    version: str
    """Version as in a request: empty for the default."""
    inputs: Mapping[str, str]
    """Name of the ensemble's tensor, by the model's input."""
    outputs: Mapping[str, str]
    """Name of the ensemble's tensor, by the model's output."""
    when: Condition = ()
    each: frozenset[str] = frozenset()
    """Tensors that are split into rows, one model call for each row; empty: the model is called once."""

    @property
    def title(self) -> str:
        return f"step {self.index}, model '{self.model}'"

    @cached_property
    def condition_tensors(self) -> frozenset[str]:
        """Tensors that the step's condition compares."""
        return frozenset(comparison.tensor for comparison in self.when)


@dataclass(frozen=True)
class Graph:
    """The steps of one ensemble, connected by the names of their tensors."""

    config: pb.ModelConfig
    """Configuration as in the file."""
    says_batch: bool
    """True when the file states `max_batch_size`, even as 0."""
    steps: tuple[GraphStep, ...]
    order: tuple[int, ...]
    """Topological order of the steps, as indices."""
    empty_if_skipped: frozenset[str] = frozenset()
    max_in_flight: int = 0
    """Largest number of requests in progress; 0: the server's limit."""
    rows_in_flight: int = 0
    """Largest number of rows in flight of one request at one `each` step; 0: enough for full batches."""
    producers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """By tensor, the steps that produce the tensor, in order."""

    @property
    def name(self) -> str:
        return self.config.name

    @cached_property
    def models(self) -> tuple[str, ...]:
        """Models of the steps, each once."""
        return tuple(dict.fromkeys(step.model for step in self.steps))

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """Tensors that no step produces, in the order of their use."""
        used = (tensor for step in self.steps for tensor in (*step.inputs.values(), *sorted(step.condition_tensors)))
        return tuple(dict.fromkeys(tensor for tensor in used if tensor not in self.producers))

    @cached_property
    def last(self) -> tuple[str, ...]:
        """Tensors that no step uses."""
        used = {tensor for step in self.steps for tensor in (*step.inputs.values(), *step.condition_tensors)}
        return tuple(tensor for tensor in self.producers if tensor not in used)


def is_ensemble(config: pb.ModelConfig) -> bool:
    return config.platform == PLATFORM or config.HasField("ensemble_scheduling")


def read(name: str, files: ModelFiles) -> Graph | None:
    """Return the graph of the ensemble that a model's files describe; None for another kind of model. Blocking.

    Raises:
        FailedPrecondition: the configuration is wrong; the message lists every error of the ensemble.
    """
    text = files.config_text()
    config = model_config.parse(text)
    if not is_ensemble(config):
        return None
    config.name = name
    model_config.check_ensemble(config)
    return graph_of(config, says_batch=model_config.says_max_batch_size(text))


def graph_of(config: pb.ModelConfig, *, says_batch: bool = True) -> Graph:
    """Return the graph of an ensemble's configuration. Raises FailedPrecondition that lists every error."""
    if config.platform not in ("", PLATFORM):
        raise FailedPrecondition(f"ensemble_scheduling: platform '{config.platform}': expected '{PLATFORM}'")
    step_configs = config.ensemble_scheduling.step
    if not 1 <= len(step_configs) <= _MAX_STEPS:
        raise FailedPrecondition(f"ensemble_scheduling has {len(step_configs)} steps: expected 1 to {_MAX_STEPS}")
    parameters = EnsembleParameters(config)
    steps = _with_parameters(config, parameters)
    errors = [*_step_errors(config), *parameters.errors]
    producers: dict[str, list[int]] = {}
    for step in steps:
        for tensor in step.outputs.values():
            producers.setdefault(tensor, []).append(step.index)
    errors += _tensor_errors(config, steps, producers)
    if errors:
        raise FailedPrecondition("ensemble_scheduling: " + "; ".join(errors))
    return Graph(
        config,
        says_batch,
        steps,
        _order(steps, producers),
        frozenset(parameters.skipped),
        parameters.in_flight,
        config.ensemble_scheduling.max_inflight_requests,
        {tensor: tuple(indices) for tensor, indices in producers.items()},
    )


def _step_errors(config: pb.ModelConfig) -> Iterator[str]:
    for n, step in enumerate(config.ensemble_scheduling.step):
        if not step.model_name:
            yield f"step {n} has no model_name"
        elif step.model_name == config.name:
            yield f"step {n} is the ensemble itself"
        if step.model_version < -1:
            yield f"step {n}: model_version {step.model_version}: expected a version, or -1 for the default"
        if step.model_namespace:
            yield f"step {n}: model_namespace is not supported"
        for what, tensors in (("input_map", step.input_map), ("output_map", step.output_map)):
            if not tensors:
                yield f"step {n} has no {what}"
            for name, tensor in sorted(tensors.items()):
                if not name or not tensor:
                    yield f"step {n}: {what} '{name}' to '{tensor}': expected two names"


def _tensor_errors(
    config: pb.ModelConfig, steps: tuple[GraphStep, ...], producers: Mapping[str, list[int]]
) -> Iterator[str]:
    declared, outputs = [tensor.name for tensor in config.input], [tensor.name for tensor in config.output]
    used = {tensor for step in steps for tensor in step.inputs.values()}
    for tensor, indices in producers.items():
        if len(set(indices)) < len(indices):
            yield f"step {indices[0]} gives tensor {quoted(tensor)} more than once"
        elif len(indices) > 1 and not all(steps[n].when for n in indices):
            yield (
                f"tensor {quoted(tensor)} is given by steps {', '.join(map(str, indices))}: only one may, unless each "
                f"of them has a parameter {WHEN}<step>"
            )
    for step in steps:
        for tensor in sorted({*step.inputs.values(), *step.condition_tensors}):
            if declared and tensor not in declared and tensor not in producers:
                yield f"step {step.index} takes tensor {quoted(tensor)}, which no step gives and which is no input"
            elif not declared and tensor not in producers and tensor not in used:
                yield f"step {step.index}: {WHEN}{step.index} looks at tensor {quoted(tensor)}, which there is not"
        for tensor in sorted(step.each - set(step.inputs.values())):
            yield f"step {step.index}: {EACH}{step.index} '{tensor}': expected one of {listed(step.inputs.values())}"
    compared = {tensor for step in steps for tensor in step.condition_tensors}
    for name in declared:
        if name in producers:
            yield f"input {quoted(name)} is given by step {producers[name][0]} as well"
        elif name not in used and name not in compared:
            yield f"input {quoted(name)} is taken by no step"
    for name in outputs:
        if name not in producers:
            yield f"output {quoted(name)} is given by no step"


def _with_parameters(config: pb.ModelConfig, parameters: EnsembleParameters) -> tuple[GraphStep, ...]:
    return tuple(
        GraphStep(
            n,
            step.model_name,
            str(step.model_version) if step.model_version > 0 else "",
            dict(sorted(step.input_map.items())),
            dict(sorted(step.output_map.items())),
            parameters.when.get(n, ()),
            parameters.each.get(n, frozenset()),
        )
        for n, step in enumerate(config.ensemble_scheduling.step)
    )


def _order(steps: tuple[GraphStep, ...], producers: Mapping[str, list[int]]) -> tuple[int, ...]:
    """Return the topological order of the steps. Raises FailedPrecondition when the steps form a cycle."""
    needs = {
        step.index: {
            n for tensor in (*step.inputs.values(), *step.condition_tensors) for n in producers.get(tensor, ())
        }
        for step in steps
    }
    order: list[int] = []
    while needs:
        free = [n for n, before in needs.items() if before.isdisjoint(needs)]
        if not free:
            cycle = ", ".join(str(n) for n in needs)
            raise FailedPrecondition(f"ensemble_scheduling: among the steps {cycle} are some that wait for each other")
        order += free
        for n in free:
            del needs[n]
    return tuple(order)
