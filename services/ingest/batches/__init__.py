"""Batches: every row of the input files is sent to a model, and the answers are written to files. Survives any kill."""
