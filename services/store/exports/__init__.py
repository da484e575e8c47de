"""Results as files that others read: Parquet, in parts, to an object store, a folder, or the caller."""
