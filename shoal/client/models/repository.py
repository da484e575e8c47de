"""Several models in one folder: what a push of the folder pushes, and in which order.

embeddings/                 no model itself: no config.pbtxt, no versions
    embed/config.pbtxt      an ensemble: pushed last, because it is ready only when its models are
    tokenize/  minilm/      pushed before it
"""

from __future__ import annotations

from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from shoal.client.models import bundle
from shoal.errors import InvalidArgument


def models_in(path: Path) -> list[Path]:
    """The model folders of the repository `path`, each behind those that it is made of; none: it is no repository.

    Raises:
        InvalidArgument: ensembles are made of each other.
    """
    if not path.is_dir() or bundle.looks_like_model(path):
        return []
    folders = {child.name: child for child in sorted(path.iterdir()) if bundle.looks_like_model(child)}
    parts = {name: sorted(_made_of(folder) & folders.keys()) for name, folder in folders.items()}
    try:
        return [folders[name] for name in TopologicalSorter(parts).static_order()]
    except CycleError as err:
        circle = " -> ".join(reversed(err.args[1]))
        raise InvalidArgument(f"{path}: ensembles are made of each other: {circle}") from err


def _made_of(folder: Path) -> set[str]:
    """The models that an ensemble's steps name; none of what is no ensemble."""
    return {step.model_name for step in bundle.configuration(folder).ensemble_scheduling.step}
