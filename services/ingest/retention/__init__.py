"""Retention of ended jobs: rules, and their removal."""
