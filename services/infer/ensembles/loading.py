"""Loading of an ensemble: waits for the steps' models, resolves their versions, and checks that they fit together."""

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
    """An ensemble that is ready to run."""

    plan: EnsemblePlan
    renew: Callable[[EnsemblePlan], EnsemblePlan]
    """Returns the current plan for an older one. Raises Unavailable, with a step's name, when there is none."""


Resolved = tuple[StepVersion | None, ...]
"""The current versions of a graph's steps, nested ensembles included; None: the step has no ready version."""


async def wait_until_loaded(graph: Graph, others: OtherModels) -> None:
    """Request that an ensemble's models are served, and wait until each of them had its first load attempt.

    Raises:
        FailedPrecondition: the ensemble calls itself, through other ensembles.
    """
    for name in graph.models:
        if path := _path(name, graph.name, others, set()):
            raise FailedPrecondition(f"the ensemble calls itself: {' -> '.join(map(quoted, (graph.name, *path)))}")
    for name in graph.models:
        await others.need(name, graph.name)
    for name in graph.models:
        await others.tried(name)


def _path(name: str, target: str, others: OtherModels, visited: set[str]) -> tuple[str, ...]:
    """Return the path of dependencies from `name` to `target`, both included; empty when there is none."""
    if name == target:
        return (name,)
    visited.add(name)
    for other in others.needs(name):
        if other not in visited and (rest := _path(other, target, others, visited)):
            return (name, *rest)
    return ()


def resolved(graph: Graph, others: OtherModels) -> Resolved:
    """Return the current versions of the steps, and of the steps of nested ensembles. Raises nothing."""
    current: list[StepVersion | None] = []
    left, entered = [graph], set[StepVersion]()
    while left:
        versions = [_version(step, others) for step in left.pop().steps]
        current += versions
        for version in versions:
            if version is not None and version.graph is not None and version not in entered:
                entered.add(version)
                left.append(version.graph)
    return tuple(current)


def _version(step: GraphStep, others: OtherModels) -> StepVersion | None:
    try:
        return others.find(step.model, step.version)
    except ShoalError:
        return None


def composed(graph: Graph, others: OtherModels, labels: Labels) -> Composed:
    """Return the ensemble with the current versions of its steps.

    Raises:
        FailedPrecondition: a step's model is not ready, or the steps do not fit together.
    """
    plan = _plan(graph, others, labels)
    renew = partial(_renewed, others=others, labels=labels)
    return Composed(plan.completed, None, plan=plan, renew=renew)


def _plan(graph: Graph, others: OtherModels, labels: Labels) -> EnsemblePlan:
    versions = []
    for step in graph.steps:
        try:
            versions.append(others.find(step.model, step.version))
        except ShoalError as err:
            raise FailedPrecondition(f"{step.title} is not ready: {err.message}") from err
    return flow.plan(graph, versions, labels)


def _renewed(old: EnsemblePlan, *, others: OtherModels, labels: Labels) -> EnsemblePlan:
    try:
        for step in old.steps:
            if others.find(step.step.model, step.step.version) is not step.version:
                break
        else:
            return old
    except ShoalError as err:
        raise Unavailable(f"in ensemble '{old.graph.name}', {step.title}: {err.message}") from err
    try:
        new = _plan(old.graph, others, labels)
    except FailedPrecondition as err:
        raise Unavailable(f"in ensemble '{old.graph.name}': {err.message}") from err
    same = new.completed.signature == old.completed.signature and new.sees_tensors_only == old.sees_tensors_only
    # The ensemble has another signature and must be loaded again. The version does that on its own.
    if not same:
        raise Unavailable(
            f"in ensemble '{old.graph.name}', {step.title}: the model was loaded with other inputs or outputs, "
            "and so the ensemble has others: it is loaded again"
        )
    return new
