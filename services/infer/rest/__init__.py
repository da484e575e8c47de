"""The Open Inference Protocol over REST: Triton's JSON form, with raw tensors beside it.

    stream ──path──> Target ──> RestCall ──body──> operation ──InferenceServer──> Reply

app         the application of mesh.h2: finds the operation of a request
web_pages   refusal of requests that a web page made
target      operation, model and version in a path
call        one call: its body, access, deadline, response
operations  each operation but inference
inference   infer: from a body to a message, from a response to a body
generation  generate: keys of a JSON object are inputs
json_text   JSON, bounded before it costs
tensor_json  tensors as JSON
"""
