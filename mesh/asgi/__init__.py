"""gRPC calls as an ASGI application: what the fronts that are not grpc.aio share (`mesh.embedded`, `mesh.h2`).

app       from a call's path to its handler, and back with a status, whatever happens
exchange  one call on the short way: no task, no coroutine
context   one call as a handler sees it
framing   messages in and out of bodies; compression
status    statuses, timeouts and metadata as HTTP/2 carries them
methods   the table of handlers
"""
