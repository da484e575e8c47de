"""Exit statuses that services and their launcher share."""

WRONG_SETTINGS = 2
"""The configuration of a service is invalid: a restart would fail in the same way."""
