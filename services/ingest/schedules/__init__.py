"""Recurring jobs: when they are due, and how each firing becomes exactly one job."""
