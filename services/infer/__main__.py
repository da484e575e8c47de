"""`python -m services.infer`: serves models until SIGTERM, behind the front that suits its address (`front`)."""

import os
from functools import partial

from services.infer import front

if __name__ == "__main__":
    choice = front.choose(os.environ)
    if choice.name == "envoy":
        front.become_envoy(os.environ)

    from mesh.main import main
    from services.infer.app import GRPC, H2, run
    from services.infer.config import InferConfig

    main("infer", InferConfig, partial(run, front=H2 if choice.name == "h2" else GRPC))
