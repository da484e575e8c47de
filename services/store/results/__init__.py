"""What became of jobs, one result each, and the first stands."""
