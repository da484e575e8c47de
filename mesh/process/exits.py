"""Exit statuses that more than one part of the mesh knows."""

WRONG_SETTINGS = 2
"""A service was told something wrong: started again, it would only say so again."""
