"""Fast path of ModelInfer: known message forms are compared, not parsed."""
