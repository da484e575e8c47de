"""Service level objectives of a policy: those of one model. Pure functions.

infer counts requests by them and publishes them as metrics, and the alerts of deploy/observability go by these. No call
is refused for an objective.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from shoal.access.patterns import matches_any
from shoal.access.policy import Objective


@dataclass(frozen=True, slots=True)
class ModelObjective:
    """Objectives of one model; the defaults hold where the policy states nothing."""

    availability: float = 0.999
    """Share of the requests that succeed."""
    latency: float = 0.99
    """Share of the successful requests that meet the latency goal."""
    latency_s: float | None = None
    """The latency goal, in place of the model's own; None: the model's own, if it has one."""


DEFAULT = ModelObjective()


def objective_of(objectives: Iterable[Objective], model: str) -> ModelObjective:
    """Return the objectives of a model: each number is that of the first objective that states it for the model."""
    availability = latency = latency_ms = None
    for objective in objectives:
        if matches_any(objective.models, model):
            availability = objective.availability_percent if availability is None else availability
            latency = objective.latency_percent if latency is None else latency
            latency_ms = objective.latency_ms if latency_ms is None else latency_ms
    return ModelObjective(
        DEFAULT.availability if availability is None else _share(availability),
        DEFAULT.latency if latency is None else _share(latency),
        None if latency_ms is None else latency_ms / 1000,
    )


def _share(percent: float) -> float:
    # 99.9 / 100 is not the number 0.999.
    return round(percent / 100, 9)


def described(objective: ModelObjective) -> str:
    """Return the objectives of a model in words."""
    goal = "its own latency goal" if objective.latency_s is None else f"{objective.latency_s * 1000:.12g} ms"
    succeed, within = (f"{share * 100:.9g} %" for share in (objective.availability, objective.latency))
    return f"{succeed} of the requests succeed, {within} of these within {goal}"
