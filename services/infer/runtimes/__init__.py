"""What runs a model: files in, sessions out. `runtime` is the interface, `choice` picks one for a model."""
