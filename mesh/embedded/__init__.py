"""A gRPC server inside Envoy: Envoy speaks HTTP/2, and hands each call to Python in the same process (`mesh.asgi`).

    client ──HTTP/2──> Envoy's listener ──dynamic module (pyvoy)──> app ──> the service's handlers
                                                             the same process

launch   becomes Envoy: finds out whether it can, and replaces this process
entry    what Envoy imports: configuration, logs, and the service's own `run` beside the app
server   the twin of mesh.server.GrpcServer: health, reflection, drain
admin    what is asked of the own Envoy
guard    a loop that is dead ends the process; signals reach the loop
"""
