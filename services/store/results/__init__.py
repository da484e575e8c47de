"""Results of jobs: one for each job; the first recorded result stands."""
