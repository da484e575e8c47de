"""Limits that several parts of the store check."""

MAX_TENANT_CHARACTERS = 1_024
