"""What became of jobs, kept for ever: the first stands."""
