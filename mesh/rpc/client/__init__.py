"""Lean gRPC client over plaintext HTTP/2, for calls to the service's own Envoy: one connection, few objects a call.

    caller ──> Channel ──call──> ClientConnection ──HEADERS, DATA in one write──> Envoy
                  │  no connection, or no capacity: the call waits                  │
                  └──connects, and reconnects             future, queue <──response─┘

The peer is an HTTP/2 server of this machine and is trusted: there is no TLS, name resolution, load balancing or
compression. A peer that restarts, hangs or breaks the protocol loses its connection; its calls fail with a clear error.

channel     one connection at a time, and the calls that wait for it
connection  streams of one connection: requests, responses, flow control, keepalive, GOAWAY
calls       one call, unary: a future
streams     one call with a stream of messages in both directions: a queue
request     headers of a call
failures    errors of calls; HTTP and HTTP/2 errors as gRPC statuses
stubs       interface of a channel for generated stubs
"""
