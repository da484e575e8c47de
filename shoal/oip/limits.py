"""Bounds of an inference request. This module imports nothing: services that read no tensors need them, too."""

MAX_DIMS = 64
"""Maximum dimensions of a tensor: NumPy's own limit. It also bounds the time of the product of a hostile shape."""

MAX_TENSORS = 4_096
"""Inputs, and requested outputs, of one request: each costs some microseconds. Tables have a few hundred columns."""

MAX_PARAMETERS = 1_024
"""Parameters of one request."""
