"""Where models come from: a folder (`repository`, `poll`), or the store's registry and a cache of its files."""
