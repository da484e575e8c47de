"""gRPC on the HTTP/2 server core (`mesh.h2`), as one application of it.

    ServerStream ──> GrpcApp ──fast methods──> FastCall ──> handler        no task, no coroutine
                        └──────all others────> SlowCall ──> handler        one task for each call

server        the server of every service: start, health, reflection, drain, stop
grpc_app      method table: from the path of a request to its call
fast_call     a unary call on the fast path
slow_call     a call of any kind on the slow path
task_methods  fast methods that are coroutine functions
call_context  context of a slow call for its handler
copied        copies of messages into other messages
places        places for calls that stay open, shared by tenants
tenant_turns  room for which calls wait; tenants take turns
tail_spans    spans of failed and slow calls that were not sampled
span_listing  the RPC by which coord reads the spans of a process
framing       messages in bodies; compression
parsing       messages from bytes, in bounds
heavy_work    turns of work that would hold the event loop
status        statuses, timeouts and metadata as headers
"""
