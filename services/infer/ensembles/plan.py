"""A graph with the versions that its steps are of, ready to be run: tensors have places, steps know what they wait for.

A plan holds for as long as these versions are the ones that calls mean. It is never changed.
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

_MOST_ROUTES = 64
# Sets of outputs that callers ask for.


@dataclass(frozen=True, slots=True)
class Feed:
    """One input of a step."""

    spec: TensorSpec
    """The model's."""
    tensor: str
    place: int
    by_row: bool
    """The model gets a row of it at a time."""
    changes_text: bool
    """BYTES that come as the other of `str` and `bytes`, or may."""


@dataclass(frozen=True, eq=False)
class PlannedStep:
    """One step, and the version that it calls."""

    step: GraphStep
    version: StepVersion
    feeds: tuple[Feed, ...]
    wanted: tuple[WantedOutput, ...]
    """In the model's order, so that these calls stack with those that ask for everything."""
    places: tuple[int, ...]
    """Where `wanted` go."""
    looks_at: Mapping[str, int]
    """Places of the tensors of its condition."""

    @property
    def title(self) -> str:
        return self.step.title

    @cached_property
    def signature(self) -> Signature:
        """Its model's."""
        return self.version.loaded.model.signature

    @cached_property
    def max_rows(self) -> int:
        """Of its model; 0: it has no batch dimension."""
        return self.signature.max_batch_size

    @property
    def text(self) -> bool:
        return self.signature.text

    @property
    def waits_for(self) -> frozenset[int]:
        return frozenset((*(feed.place for feed in self.feeds), *self.looks_at.values()))


@dataclass(frozen=True, slots=True)
class Route:
    """The steps that some outputs need."""

    steps: frozenset[int]
    missing: tuple[int, ...]
    """How many tensors each step waits for at first, the ensemble's inputs among them."""
    targets: frozenset[int]
    """Places of the outputs."""


@dataclass(frozen=True, eq=False)
class EnsemblePlan:
    """An ensemble that can be run."""

    graph: Graph
    completed: Completed
    steps: tuple[PlannedStep, ...]
    places: Mapping[str, int]
    """By the tensor's name."""
    specs: tuple[TensorSpec, ...]
    """What flows there, by place."""
    takers: tuple[tuple[int, ...], ...]
    """Steps that wait for a place."""
    givers: tuple[tuple[int, ...], ...]
    """Steps that give it, in order; several only where each has a condition."""
    _routes: dict[tuple[str, ...], Route] = field(default_factory=dict)

    @cached_property
    def versions(self) -> dict[StepVersion, None]:
        """What has to stay loaded while it is run."""
        return dict.fromkeys(step.version for step in self.steps)

    @property
    def takes_numbers_only(self) -> bool:
        """Whether no model of it looks at the ids and parameters of requests."""
        return all(step.version.sees_numbers_only for step in self.steps)

    def route(self, outputs: tuple[WantedOutput, ...]) -> Route:
        """How to come to these outputs, and no others."""
        names = tuple([wanted.spec.name for wanted in outputs])
        known = self._routes.get(names)
        if known is None:
            if len(self._routes) >= _MOST_ROUTES:
                self._routes.clear()
            known = self._routes[names] = self._found(frozenset(self.places[name] for name in names))
        return known

    def _found(self, targets: frozenset[int]) -> Route:
        steps: set[int] = set()
        left = set(targets)
        while left:
            for n in self.givers[left.pop()]:
                if n not in steps:
                    steps.add(n)
                    left |= self.steps[n].waits_for
        return Route(frozenset(steps), tuple(len(step.waits_for) for step in self.steps), targets)
