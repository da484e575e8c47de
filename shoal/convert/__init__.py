"""Models that were made elsewhere, as ONNX: converted by their own exporters, and checked against the original.

    file ──formats──> Original ──export──> ONNX ──┐
                        │ draw, answer            │ answer
                        └────────> rows ──────────┴──drift──> Report: accepted, or refused with the reason

Nothing here is imported unless a model is converted: each format's module imports its framework. It knows no node.
"""
