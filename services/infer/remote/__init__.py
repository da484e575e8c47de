"""Remote models: models of other servers, each batch one gRPC call. `remote_runtime` loads such models.

settings ──> address, credentials ──> connection ──> session <── dialect: oip, tensorflow_serving, torchserve
                                                        └── `scheduling.remote_execution` runs its batches, as tasks
"""
