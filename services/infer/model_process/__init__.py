"""A model in a process of its own, so that whatever it does to that process is not done to the server.

    server                                                          model process (`child`)
    session ── instance ──┬── keeper thread: starts, logs, restarts ──────> hosted model: ONNX, or model.py
                          └── channel <═══ frames; large tensors in memory passed as a file descriptor ═══> channel

`channel` and `payload` are used on both sides, `child` and `engine` run in the model process only, the rest in the
server only. The model process imports no gRPC, and protobuf for ONNX models only: it should start quickly and weigh
little.
"""
