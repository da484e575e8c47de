"""Conversion of column cells to tensors of a model, and of its outputs to arrays."""
