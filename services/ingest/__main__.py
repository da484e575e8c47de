"""`python -m services.ingest`: one ingest instance, configured by SHOAL_INGEST_* variables."""

from mesh.process import uncollected_imports  # noqa: F401 - before the others.
from mesh.process.main import main
from services.ingest.app import run
from services.ingest.config import IngestConfig

if __name__ == "__main__":
    main("ingest", IngestConfig, run)
