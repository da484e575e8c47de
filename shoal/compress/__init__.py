"""Compression of ONNX models: int8, float16, or pruning. Each result is measured beside the original.

    model.onnx ──method──> smaller.onnx
        │                     │         rows: recorded requests, a file, or random
        └──outputs, clock─────┴──> Compression: size, latency, drift, label changes

This package is imported only to compress a model, and does not depend on a node.
"""
