"""Origin of a converted version, as labels of the registry (64 at most, values of 256 characters)."""

from __future__ import annotations

import hashlib
from pathlib import Path

from shoal.convert.conversion import Conversion
from shoal.convert.drift import Drift

_CHARS = 256


def of_conversion(made: Conversion) -> dict[str, str]:
    """Return the labels of a converted version."""
    chosen = made.chosen
    labels = {
        "source": made.source.name,
        "source_sha256": digest(made.source),
        "source_format": made.framework,
        "converted_with": ", ".join(f"{name} {version}" for name, version in made.packages.items()),
        "conversion": chosen.plan,
        "checked_on": made.rows,
        "tolerance": f"{made.bounds.relative:g}",
        **(of_drift(chosen.drift) if chosen.drift is not None else {}),
    }
    return {key: value[:_CHARS] for key, value in labels.items()}


def of_drift(drift: Drift) -> dict[str, str]:
    """Return the drift as labels."""
    labels = {
        "drift_rows": str(drift.rows),
        "drift_max_abs": f"{drift.max_abs:.3g}",
        "drift_max_relative": f"{drift.max_relative:.3g}",
    }
    return labels if drift.flips is None else labels | {"drift_flips": str(drift.flips), "drift_ties": str(drift.ties)}


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
