"""Connections, calls, retries and errors of the client."""
