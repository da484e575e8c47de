"""Input of batches: storage locations, and a reader for each format."""
