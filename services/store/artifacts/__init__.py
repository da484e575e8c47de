"""Artifacts: bytes named by their digest."""
