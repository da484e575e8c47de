"""`python -m services.infer`: serves models until SIGTERM."""

from functools import partial

from mesh.main import main
from services.infer.app import H2, run
from services.infer.config import InferConfig

if __name__ == "__main__":
    main("infer", InferConfig, partial(run, front=H2))
