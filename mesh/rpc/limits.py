"""Limits that all services share."""

MESSAGE_BYTES = 128 << 20
"""Largest message that is sent or accepted: a tensor of 100 MB fits, with its request around it."""
