"""ingest: accepts durable jobs, runs them through the mesh, and gives each job exactly one result."""
