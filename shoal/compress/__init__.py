"""ONNX models made smaller: int8, float16, without what nobody reads. Each is measured beside the original.

    model.onnx ──method──> smaller.onnx
        │                     │         rows: recorded requests, a file, or random
        └──answers, clock─────┴──> Report: size, latency, drift, label changes

Nothing here is imported unless a model is compressed. It knows no node.
"""
