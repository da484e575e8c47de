"""Bounds that every part of the mesh agrees on."""

MESSAGE_BYTES = 128 << 20
"""Largest message that is sent or accepted: requests of 100 MB pass, with room for the rest."""
