"""Objectives that the policy states, as they are now; none without a policy."""

from __future__ import annotations

from shoal.access.objectives import ModelObjective, objective_of
from shoal.access.policy import Objective


class Objectives:
    """Objectives of all models."""

    def __init__(self) -> None:
        self._stated: tuple[Objective, ...] = ()

    def set(self, stated: tuple[Objective, ...]) -> bool:
        """Replace the objectives. Return False when they are the same."""
        is_new = stated != self._stated
        self._stated = stated
        return is_new

    def of(self, model: str) -> ModelObjective:
        """Return the objectives of a model."""
        return objective_of(self._stated, model)
