"""A gRPC server inside Envoy: Envoy speaks HTTP/2, and hands each call to Python in the same process (an ASGI app).

    client ──HTTP/2──> Envoy's listener ──dynamic module (pyvoy)──> app ──> the service's handlers
                                                             the same process

launch      becomes Envoy: finds out whether it can, and replaces this process
entry       what Envoy imports: configuration, logs, and the service's own `run` beside the app
app         the ASGI app: from a call's path to its handler, and back with a status, whatever happens
server      the twin of mesh.server.GrpcServer: health, reflection, drain
exchange    one call on the short way: no task, no coroutine
context     one call as a handler sees it
framing     messages in and out of bodies; compression
status      statuses and timeouts as HTTP/2 carries them
methods     the table of handlers
guard       a loop that is dead ends the process; signals reach the loop
"""
