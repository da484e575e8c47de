"""Batches: every row of the input files is sent to a model, and its outputs are written to files. Survives any kill."""
