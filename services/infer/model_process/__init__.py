"""Model processes: each model instance runs in a process of its own, so that a crash does not reach the server.

    server                                                          model process (`child`)
    session ── instance ──┬── supervisor thread: starts, logs, restarts ──> hosted model: ONNX, or model.py
                          └── channel <═══ frames; large tensors in memory passed as a file descriptor ═══> channel

Both sides use `channel`, `payload` and `hosted`. `child` and `python` run in the model process only, the rest in the
server only; `shared` has modules for each side. A model process imports neither gRPC nor protobuf: it starts quickly
and uses little memory.
"""
