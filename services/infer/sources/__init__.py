"""Sources of models: a folder (`repository`, `poll`), or the store's registry with a cache of its files."""
