"""infer: serves models through the Open Inference Protocol v2.

    front (rpc) ──> core ──> models ──> model version: request -> scheduler -> execution -> runtime (ONNX Runtime)
                               ^
          repository (a folder) or registry + cache (the store) say what should be served

The core knows no transport: it takes parsed requests and deadlines, and returns responses or raises shoal.errors.
"""
