"""Backups of the whole store at one moment, and their restore."""
