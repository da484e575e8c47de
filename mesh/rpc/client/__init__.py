"""A lean gRPC client over plaintext HTTP/2, for the hop to the own Envoy: one connection, few objects a call.

    caller ──> Channel ──call──> Line ──HEADERS, DATA in one write──> Envoy
                  │  no line, or no room on it: the call waits          │
                  └──connects, again after a loss       future, queue <─┘ answer

The peer is trusted to be an HTTP/2 server of this machine: there is no TLS, no name resolution, no load balancing and
no compression. It may restart, hang, or be broken: that ends its connection, and its calls with a clear error.

channel     what callers hold: a connection at a time, and those who wait for it
line        one connection: frames in, answers out; streams, windows, keepalive, goodbyes
calls       one call: unary (a future) or a stream (a queue)
request     a call's headers
failures    what a call fails with, and what HTTP's and HTTP/2's words mean in gRPC's
stubs       what generated stubs ask of a channel
"""
