"""Inference calls of the client."""
