"""Batches: all rows of files go through one model, and their answers into files, whatever is killed when."""
