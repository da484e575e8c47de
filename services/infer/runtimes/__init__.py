"""Runtimes load model files into sessions. `runtime` has the interface, `choice` picks the runtime of a model."""
