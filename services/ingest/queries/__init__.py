"""Queries, watches and completions of jobs, for clients."""
