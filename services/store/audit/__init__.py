"""Audit log: who did what, or was refused, in chains of hashes that anchors join."""
