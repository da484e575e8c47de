"""Execution plan of an ensemble: the graph with its steps' versions, a slot for each tensor, and the dependencies.

A plan is immutable. It is valid as long as its versions are the current ones of their models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from services.infer.ensembles.graph import Graph, GraphStep
from services.infer.ensembles.other_models import StepVersion
from services.infer.loading.model_config import Completed
from services.infer.requests.request import WantedOutput
from services.infer.requests.signature import Signature, TensorSpec

# Sets of outputs that callers request; each has a route that is computed once.
_MAX_ROUTES = 64


@dataclass(frozen=True, slots=True)
class Feed:
    """One input of a step."""

    spec: TensorSpec
    """Spec of the model's input."""
    tensor: str
    slot: int
    by_row: bool
    """The model gets one row of the tensor at a time."""
    changes_text: bool
    """BYTES have to be converted between `str` and `bytes`, or may have to."""


@dataclass(frozen=True, eq=False)
class PlannedStep:
    """One step, and the version that it calls."""

    step: GraphStep
    version: StepVersion
    feeds: tuple[Feed, ...]
    outputs: tuple[WantedOutput, ...]
    """In the model's order, so that these calls stack with calls that request all outputs."""
    output_slots: tuple[int, ...]
    """Slots of `outputs`, in the same order."""
    condition_slots: Mapping[str, int]
    """Slots of the condition's tensors, by name."""

    @property
    def title(self) -> str:
        return self.step.title

    @cached_property
    def signature(self) -> Signature:
        """Signature of the step's model."""
        return self.version.loaded.model.signature

    @cached_property
    def max_rows(self) -> int:
        """Largest batch of the step's model; 0: the model has no batch dimension."""
        return self.signature.max_batch_size

    @property
    def text(self) -> bool:
        return self.signature.text

    @property
    def waits_for(self) -> frozenset[int]:
        """Slots of the inputs and of the condition's tensors."""
        return frozenset((*(feed.slot for feed in self.feeds), *self.condition_slots.values()))


@dataclass(frozen=True, slots=True)
class Route:
    """The steps that a set of outputs needs."""

    steps: frozenset[int]
    missing: tuple[int, ...]
    """By step, the number of tensors that the step waits for at the start, the ensemble's inputs included."""
    targets: frozenset[int]
    """Slots of the outputs."""


@dataclass(frozen=True, eq=False)
class EnsemblePlan:
    """An ensemble that is ready to run."""

    graph: Graph
    completed: Completed
    steps: tuple[PlannedStep, ...]
    slots: Mapping[str, int]
    """Slot of each tensor, by name."""
    specs: tuple[TensorSpec, ...]
    """Spec of each tensor, by slot."""
    consumers: tuple[tuple[int, ...], ...]
    """By slot, the steps that wait for the tensor."""
    producers: tuple[tuple[int, ...], ...]
    """By slot, the steps that produce the tensor, in order; several only where each has a condition."""
    sees_tensors_only: bool
    """True when none of the models sees more of a request than its tensors. A plan may outlive its models' versions."""
    _routes: dict[tuple[str, ...], Route] = field(default_factory=dict)

    @cached_property
    def versions(self) -> dict[StepVersion, None]:
        """The versions that must stay loaded during a run."""
        return dict.fromkeys(step.version for step in self.steps)

    def route(self, outputs: tuple[WantedOutput, ...]) -> Route:
        """Return the steps that these outputs need, and no others."""
        names = tuple([output.spec.name for output in outputs])
        known = self._routes.get(names)
        if known is None:
            if len(self._routes) >= _MAX_ROUTES:
                self._routes.clear()
            known = self._routes[names] = self._compute_route(frozenset(self.slots[name] for name in names))
        return known

    def _compute_route(self, targets: frozenset[int]) -> Route:
        steps: set[int] = set()
        left = set(targets)
        while left:
            for n in self.producers[left.pop()]:
                if n not in steps:
                    steps.add(n)
                    left |= self.steps[n].waits_for
        return Route(frozenset(steps), tuple(len(step.waits_for) for step in self.steps), targets)
