"""`python -m services.infer`: serves models until SIGTERM; inside Envoy where that can be, else over grpc.aio."""

import os

from services.infer import front

if __name__ == "__main__":
    choice = front.choose(os.environ)
    if choice.is_envoy:
        front.become_envoy(os.environ)

    from mesh.main import main
    from services.infer.app import run
    from services.infer.config import InferConfig

    main("infer", InferConfig, run)
