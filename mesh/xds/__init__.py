"""Envoy's configuration: pure functions build resources, and delta ADS keeps each Envoy up to date with them.

instances, drains, routes ──snapshot──> Snapshot of a node ──delta.Session──> responses ──ads.AdsServer──> Envoy
"""

ADS_CLUSTER = "ads"
"""Cluster of the control plane, which each Envoy's bootstrap configuration has."""
