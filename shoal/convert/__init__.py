"""Conversion of models of other frameworks to ONNX by the frameworks' exporters, checked against the original.

    file ──formats──> Original ──export──> ONNX ──┐
                        │ draw, predict           │ predict
                        └────────> rows ──────────┴──drift──> Report: accepted, or refused with the reason

Each format's module imports its framework, so nothing here is imported unless a model is converted. No module here
knows a node.
"""
