"""ingest: takes work that should not be lost, runs it through the mesh, and sees that each job ends with one result."""
