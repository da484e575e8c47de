"""Models written in Python, as they are hosted inside a model process: Shoal's own interface, and Triton's."""
