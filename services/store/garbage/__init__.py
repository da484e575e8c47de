"""Garbage collection of unreferenced artifacts and blobs, and verification of the stored ones."""
