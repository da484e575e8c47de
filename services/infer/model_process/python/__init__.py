"""Python models inside a model process: Shoal's own interface (`Model`) and Triton's (`TritonPythonModel`)."""
