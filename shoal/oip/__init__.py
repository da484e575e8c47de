"""Codec of Open Inference Protocol tensors: datatypes, raw contents and typed contents."""
