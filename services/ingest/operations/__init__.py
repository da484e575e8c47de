"""Operations on many jobs: cancel, requeue or purge every job that a filter selects."""
