"""REST beside gRPC, at the same server: JSON, and the Open Inference Protocol's raw tensors.

    stream ──path──> Target ──> RestCall ──body──> operation ──> Reply, or Events

app            the application of mesh.h2: finds the operation of a request
web_pages      refusal of requests that a web page made
target         operation, model and other values in a path
call           one call: its body, access, deadline, response
handlers       calls of the server's own handlers of gRPC
json_streams   streams of responses as NDJSON or server-sent events
heartbeats     bytes for a response without events
infer_request  infer: from a body to a message
plain_json     messages as JSON, in Triton's form
long_lists     JSON with long lists, in steps
json_text      JSON, bounded before it costs
tensor_json    tensors as JSON
tenant_lock    a lock whose waiting tenants take turns
"""
