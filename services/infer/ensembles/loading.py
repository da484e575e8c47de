"""From a graph to an ensemble that can be called: its steps' models are waited for, looked up, and fitted together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from services.infer.ensembles import flow
from services.infer.ensembles.graph import Graph, GraphStep
from services.infer.ensembles.other_models import OtherModels, StepVersion
from services.infer.ensembles.plan import EnsemblePlan
from services.infer.error_text import quoted
from services.infer.loading.loading import Loaded
from shoal.errors import FailedPrecondition, ShoalError, Unavailable

Labels = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class Composed(Loaded):
    """An ensemble that can be called."""

    plan: EnsemblePlan
    renew: Callable[[EnsemblePlan], EnsemblePlan]
    """The plan that holds now. Raises Unavailable, with a step's name, when none does."""


Seen = tuple[StepVersion | None, ...]
"""The versions that the steps of a graph mean at some time, and the steps of these; None: none is ready."""


async def until_tried(graph: Graph, neighbours: OtherModels) -> None:
    """Has the models that an ensemble is made of served, and waits for what comes of that.

    Raises:
        FailedPrecondition: the ensemble is made of itself, through others.
    """
    for name in graph.models:
        if ring := _ring(name, graph.name, neighbours, set()):
            raise FailedPrecondition(f"the ensemble calls itself: {' -> '.join(map(quoted, (graph.name, *ring)))}")
    for name in graph.models:
        await neighbours.need(name, graph.name)
    for name in graph.models:
        await neighbours.tried(name)


def _ring(name: str, target: str, neighbours: OtherModels, seen: set[str]) -> tuple[str, ...]:
    """The way from `name` to `target`, both included; empty when there is none."""
    if name == target:
        return (name,)
    seen.add(name)
    for other in neighbours.needs(name):
        if other not in seen and (found := _ring(other, target, neighbours, seen)):
            return (name, *found)
    return ()


def seen(graph: Graph, neighbours: OtherModels) -> Seen:
    """What the steps mean now, and those of steps that are ensembles themselves. Raises nothing."""
    found: list[StepVersion | None] = []
    left, entered = [graph], set[StepVersion]()
    while left:
        versions = [_version(step, neighbours) for step in left.pop().steps]
        found += versions
        for version in versions:
            if version is not None and version.graph is not None and version not in entered:
                entered.add(version)
                left.append(version.graph)
    return tuple(found)


def _version(step: GraphStep, neighbours: OtherModels) -> StepVersion | None:
    try:
        return neighbours.find(step.model, step.version)
    except ShoalError:
        return None


def composed(graph: Graph, neighbours: OtherModels, labels: Labels) -> Composed:
    """The ensemble with the versions that its steps mean now.

    Raises:
        FailedPrecondition: one of them is not ready, or they do not fit together.
    """
    made = _plan(graph, neighbours, labels)
    renew = partial(_renewed, neighbours=neighbours, labels=labels)
    return Composed(made.completed, None, plan=made, renew=renew)


def _plan(graph: Graph, neighbours: OtherModels, labels: Labels) -> EnsemblePlan:
    versions = []
    for step in graph.steps:
        try:
            versions.append(neighbours.find(step.model, step.version))
        except ShoalError as err:
            raise FailedPrecondition(f"{step.title} is not ready: {err.message}") from err
    return flow.plan(graph, versions, labels)


def _renewed(old: EnsemblePlan, *, neighbours: OtherModels, labels: Labels) -> EnsemblePlan:
    try:
        for step in old.steps:
            if neighbours.find(step.step.model, step.step.version) is not step.version:
                break
        else:
            return old
    except ShoalError as err:
        raise Unavailable(f"in ensemble '{old.graph.name}', {step.title}: {err.message}") from err
    try:
        new = _plan(old.graph, neighbours, labels)
    except FailedPrecondition as err:
        raise Unavailable(f"in ensemble '{old.graph.name}': {err.message}") from err
    same = new.completed.signature == old.completed.signature and new.takes_numbers_only == old.takes_numbers_only
    if not same:  # Then it is another model: it has to be loaded again, which is on its way.
        raise Unavailable(
            f"in ensemble '{old.graph.name}', {step.title}: the model was loaded with other inputs or outputs, "
            "and so the ensemble has others: it is loaded again"
        )
    return new
