"""`python -m services.infer`."""

from mesh.main import main
from services.infer.app import run
from services.infer.config import InferConfig

if __name__ == "__main__":
    main("infer", InferConfig, run)
