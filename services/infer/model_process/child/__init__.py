"""Code that runs inside a model process; imports no gRPC and no protobuf."""
