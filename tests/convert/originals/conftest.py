"""The saved models, once for a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.convert.originals import made


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of models by name."""
    folder = tmp_path_factory.mktemp("originals")
    return {name: path for save in made.SAVERS for name, path in save(folder).items()}
