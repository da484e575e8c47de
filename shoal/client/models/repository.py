"""Model repository: a folder of several model folders, and the order in which a push pushes them.

embeddings/                 not a model itself: no config.pbtxt, no versions
    embed/config.pbtxt      an ensemble: pushed last, because it is ready only when its models are
    tokenize/  minilm/      pushed before the ensemble
"""

from __future__ import annotations

from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from shoal.client.models import bundle
from shoal.errors import InvalidArgument


def models_in(path: Path) -> list[Path]:
    """Return the model folders of the repository `path`, models before their ensembles; empty if `path` is none.

    Raises:
        InvalidArgument: ensembles contain each other.
    """
    if not path.is_dir() or bundle.looks_like_model(path):
        return []
    folders = {child.name: child for child in sorted(path.iterdir()) if bundle.looks_like_model(child)}
    graph = {name: sorted(members(folder) & folders.keys()) for name, folder in folders.items()}
    try:
        return [folders[name] for name in TopologicalSorter(graph).static_order()]
    except CycleError as err:
        cycle = " -> ".join(reversed(err.args[1]))
        raise InvalidArgument(f"{path}: ensembles contain each other: {cycle}") from err


def members(folder: Path) -> set[str]:
    """Return the models that an ensemble's steps name; empty for other models."""
    return {step.model_name for step in bundle.configuration(folder).ensemble_scheduling.step}
