"""Models and repositories of the client."""
