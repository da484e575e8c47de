"""coord: the control plane, with cluster membership, leader election and the configuration of every Envoy."""
