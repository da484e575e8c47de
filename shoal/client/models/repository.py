"""Model repository: a folder of several model folders, and the order in which a push pushes them.

embeddings/                 not a model itself: no config.pbtxt, no versions
    embed/config.pbtxt      an ensemble: pushed last, because it is ready only when its models are
    tokenize/  minilm/      pushed before the ensemble
"""

from __future__ import annotations

from collections.abc import Iterable
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from shoal.client.models import bundle


def models_in(path: Path) -> list[Path]:
    """Return the model folders of the repository `path`, models before their ensembles; empty if `path` is none.

    Ensembles that contain each other are first.
    """
    if not path.is_dir() or bundle.looks_like_model(path):
        return []
    folders = {child.name: child for child in sorted(path.iterdir()) if bundle.looks_like_model(child)}
    first = circles(folders.values())
    graph = {name: (members(folder) & folders.keys()) - first.keys() for name, folder in folders.items()}
    others = [name for name in TopologicalSorter(graph).static_order() if name not in first]
    return [folders[name] for name in (*first, *others)]


def circles(folders: Iterable[Path]) -> dict[str, str]:
    """Return the ensembles that contain each other, each with its circle, as `a -> b -> a`."""
    graph = {folder.name: sorted(members(folder)) for folder in folders}
    found: dict[str, str] = {}
    while True:
        try:
            TopologicalSorter(graph).prepare()
            return found
        except CycleError as err:
            circle = err.args[1]
            found |= dict.fromkeys(circle, " -> ".join(reversed(circle)))
            graph = {name: [] if name in circle else of for name, of in graph.items()}


def members(folder: Path) -> set[str]:
    """Return the models that an ensemble's steps name; empty for other models."""
    return {step.model_name for step in bundle.configuration(folder).ensemble_scheduling.step}
