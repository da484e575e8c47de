"""Where answers go: parts of Parquet, and what is said about them."""
