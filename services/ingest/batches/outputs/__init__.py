"""Output of batches: Parquet parts and their summaries."""
