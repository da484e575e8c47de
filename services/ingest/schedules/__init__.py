"""Recurring jobs: their times, and firing, which makes exactly one job for each time."""
