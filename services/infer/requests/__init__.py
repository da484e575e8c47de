"""Inference requests as messages and as arrays: reading messages, writing responses. Independent of loaded models."""
