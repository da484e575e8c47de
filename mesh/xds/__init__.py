"""Envoy's configuration: pure functions build resources, and delta ADS keeps each Envoy up to date with them.

instances, drains, routes ──snapshot──> Snapshot of a node ──delta.Session──> responses ──ads.AdsServer──> Envoy
"""
