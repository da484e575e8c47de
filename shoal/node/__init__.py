"""Launcher of a node on one machine: its processes, their start, supervision and stop."""
