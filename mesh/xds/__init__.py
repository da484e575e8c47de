"""What Envoy is told: resources built by pure functions, and the protocol (delta ADS) that keeps each Envoy up to date.

instances, drains, routes ──snapshot──> Snapshot of a node ──delta.Session──> responses ──ads.AdsServer──> Envoy
"""
