"""The models of an instance: from what is wanted to versions that serve, and back to nothing (docs/models.md)."""
