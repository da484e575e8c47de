"""Entry point `python -m services.coord`: run the coord service until SIGTERM."""

from mesh.process import uncollected_imports  # noqa: F401 - before the others.
from mesh.process.main import main
from services.coord.app import run
from services.coord.config import CoordConfig

if __name__ == "__main__":
    main("coord", CoordConfig, run)
