"""Models of other servers: one call of ours there, and what comes back. `runtimes.remote_runtime` loads them.

settings ──> address, credentials ──> connection ──> session <── dialect: oip, tensorflow_serving, torchserve
                                                        └── execution runs its batches, as tasks of the loop
"""
