"""States of dependencies, by reference: one query by id, one by key."""

from __future__ import annotations

from collections.abc import Iterable

from services.ingest.dependencies.references import by_key, key_of
from services.ingest.job_store import DependencyState, JobStore


async def dependency_states(store: JobStore, tenant: str, references: Iterable[str]) -> dict[str, DependencyState]:
    """Return the states of the jobs of `tenant` that `references` name; missing jobs are left out.

    Raises:
        Unavailable: MongoDB is unavailable.
    """
    references = set(references)
    keys = [key for reference in references if (key := key_of(reference)) is not None]
    ids = [reference for reference in references if key_of(reference) is None]
    found: dict[str, DependencyState] = {}
    for dependency in await store.dependency_states(tenant, ids, keys):
        if dependency.id in references:
            found[dependency.id] = dependency
        if dependency.key and (reference := by_key(dependency.key)) in references:
            found[reference] = dependency
    return found
