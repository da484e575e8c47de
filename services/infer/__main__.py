"""`python -m services.infer`: serves models until SIGTERM, configured by SHOAL_INFER_* variables."""

from mesh.process import uncollected_imports  # noqa: F401 - before the others.
from mesh.process.main import main
from services.infer.app import run
from services.infer.config import InferConfig

if __name__ == "__main__":
    main("infer", InferConfig, run)
