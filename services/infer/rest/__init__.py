"""The Open Inference Protocol over REST: Triton's JSON form, with raw tensors beside it.

    RestCall (mesh.rest) ──body──> operation ──InferenceServer──> Reply

app         the application: its operations, and its fast path
operations  each operation but inference
inference   infer: from a body to a message, from a response to a body
load_request  from JSON with files to a message
fast_infer  infer without a task
generation  generate: keys of a JSON object are inputs
"""
