"""Cluster state in etcd: client, live copies, membership, leader election."""
