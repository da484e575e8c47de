"""Limits that several packages of the store check."""

MAX_TENANT_CHARACTERS = 1_024
