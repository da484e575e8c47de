"""A lean gRPC server over plaintext HTTP/2, for the trusted hop behind Envoy: one thread, one loop, few objects a call.

    Envoy ──HTTP/2, unix socket──> connection ──short methods──> Exchange ──> handler
                                       └──the rest──> stream (ASGI) ──> GrpcApp ──> handlers

Envoy has already checked whatever comes from outside: this speaks all of RFC 9113 that a gRPC peer may use, and ends a
connection that breaks it, but has no TLS, no HTTP/1, no priorities and no push.

frames      what goes over the wire, and what a frame may be
headers     HPACK: decoded once for each distinct field, encoded once for each distinct answer
peer        what a server's connection and a client's have in common: frames in, in order
connection  a server's: calls out; our windows; limits
sending     answers and requests out; the windows of the peer
stream      one call on the long way, as an ASGI app sees it
server      the twin of mesh.server.GrpcServer: health, reflection, drain
client      the other way: calls to the Envoy beside it
"""
